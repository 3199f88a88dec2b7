"A fast path must answer as the plain one, in every layout, batch, mode and precision."
import copy, itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest, torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional as autograd
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import remove_weight_norm, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils.checkpoint import checkpoint

import gcnn_stn.cache, gcnn_stn.layer, gcnn_stn.layout, gcnn_stn.norm, gcnn_stn.separable
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.kernel import basis_operator
from gcnn_stn.layer import Downsample2d, GroupAvgPool2d, GroupDropout, GroupMaxPool2d
from gcnn_stn.layer import GlobalPool, GroupConv2d, GroupPool, LiftingConv2d
from gcnn_stn.layer import GroupBatchNorm, GroupInstanceNorm, GroupLayerNorm
from gcnn_stn.model import CNN, GCNN, STCNN, published_gcnn, published_stcnn
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import DepthwiseGroupConv2d, GroupPointwise, SeparableGroupConv2d
from gcnn_stn.stn import AreaPool2d, LocalizationNet, SpatialLayerNorm, SpatialTransformer
from gcnn_stn.subgroup import CosetPool, Restrict

C1, C4, C8, D4 = CyclicGroup(1), CyclicGroup(4), CyclicGroup(8), DihedralGroup(4)
IMAGE, SMALL = (6, 10, 10), (1, 30, 30)
FEATURE, TRIVIAL = (6, 8, 10, 10), (6, 1, 10, 10)
ROW, HIGH, COLUMN, PIXEL = (6, 8, 1, 10), (6, 8, 2, 10), (6, 8, 10, 1), (6, 8, 1, 1)


# what is tested: how it is made, and the shape of one input

CONVOLUTIONS = {
    'lifting': (lambda: LiftingConv2d(6, 4, 3, C8), IMAGE),
    'group': (lambda: GroupConv2d(6, 4, 3, C8, stride=2, padding=1), FEATURE),
    'group of groups': (lambda: GroupConv2d(6, 4, 3, D4, groups=2, bias=False), FEATURE),
    'pointwise': (lambda: GroupPointwise(6, 4, C8), FEATURE),
    'depthwise': (lambda: DepthwiseGroupConv2d(6, 3, C8), FEATURE),
}
NORMS = {
    'batch norm': (lambda: GroupBatchNorm(6), FEATURE),
    'batch norm, no momentum': (lambda: GroupBatchNorm(6, momentum=None), FEATURE),
    'batch norm, no scale': (lambda: GroupBatchNorm(6, affine=False), FEATURE),
    'batch norm, no past': (lambda: GroupBatchNorm(6, track_running_stats=False), FEATURE),
    'batch norm on C1': (lambda: GroupBatchNorm(6), TRIVIAL),
    'batch norm of a row': (lambda: GroupBatchNorm(6), ROW),
    'batch norm of two rows': (lambda: GroupBatchNorm(6), HIGH),
    'batch norm of a column': (lambda: GroupBatchNorm(6), COLUMN),
    'batch norm of a pixel': (lambda: GroupBatchNorm(6), PIXEL),
    'batch norm of one channel': (lambda: GroupBatchNorm(1), (1, 8, 10, 10)),
    'layer norm': (lambda: GroupLayerNorm(6), FEATURE),
    'layer norm on C1': (lambda: GroupLayerNorm(6), TRIVIAL),
    'instance norm': (lambda: GroupInstanceNorm(6), FEATURE),
    'instance norm, no scale': (lambda: GroupInstanceNorm(6, affine=False), ROW),
}
LAYERS = CONVOLUTIONS | NORMS | {
    'lifting on C1': (lambda: LiftingConv2d(6, 4, 3, C1, padding=1), IMAGE),
    'group on C1': (lambda: GroupConv2d(6, 4, 3, C1), TRIVIAL),
    'group of 1 × 1': (lambda: GroupConv2d(6, 4, 1, C8), FEATURE),
    'group to one row': (lambda: GroupConv2d(6, 4, 3, C8, stride=2, padding=1), HIGH),
    'group on a row': (lambda: GroupConv2d(6, 4, 3, C8, padding=1), ROW),
    'group by frequency': (lambda: GroupConv2d(6, 4, 3, C8, algorithm='fourier'), FEATURE),
    'group by frequency, on a row': (lambda: GroupConv2d(6, 4, 3, C8, padding=1, algorithm='fourier'), ROW),
    'group of 1 × 1 by frequency': (lambda: GroupConv2d(6, 4, 1, C8, algorithm='fourier'), FEATURE),
    'group by few functions': (lambda: GroupConv2d(6, 4, 3, D4, basis='harmonic', stride=2, algorithm='basis'), FEATURE),
    'lifting by few functions': (lambda: LiftingConv2d(6, 4, 3, C8, algorithm='basis'), IMAGE),
    'group to one pixel': (lambda: GroupConv2d(6, 4, 9, C8), (6, 8, 9, 9)),
    'depthwise on a row': (lambda: DepthwiseGroupConv2d(6, 3, D4, padding=1), ROW),
    'separable': (lambda: SeparableGroupConv2d(6, 4, 3, C8, stride=2), FEATURE),
    'dropout': (lambda: GroupDropout(.4), FEATURE),
    'max pool': (lambda: GroupMaxPool2d(2), FEATURE),
    'max pool to one row': (lambda: GroupMaxPool2d(2), HIGH),
    'average pool': (lambda: GroupAvgPool2d(3, 2, 1), FEATURE),
    'downsample': (lambda: Downsample2d(), FEATURE),
    'downsample to one row': (lambda: Downsample2d(), HIGH),
    'downsample an image': (lambda: Downsample2d(), IMAGE),
    'blur': (lambda: BlurPool2d(), FEATURE),
    'blur an image': (lambda: BlurPool2d(3), IMAGE),
    'max blur': (lambda: MaxBlurPool2d(), FEATURE),
    'upsample': (lambda: Upsample2d(), FEATURE),
    'upsample an image': (lambda: Upsample2d(2, 'nearest'), IMAGE),
    'pose pool': (lambda: GroupPool(), FEATURE),
    'mean pose pool': (lambda: GroupPool('mean'), FEATURE),
    'global pool': (lambda: GlobalPool(), FEATURE),
    'global pool, max': (lambda: GlobalPool('max', 'mean'), FEATURE),
    'global pool of an image': (lambda: GlobalPool('max'), IMAGE),
    'cosets': (lambda: CosetPool(C8, [0, 4]), FEATURE),
    'mean over cosets': (lambda: CosetPool(D4, [0, 5], 'mean'), FEATURE),
    'restricted': (lambda: Restrict(D4, [0, 6]), FEATURE),
    'area pool': (lambda: AreaPool2d(3), IMAGE),
    'spatial norm': (lambda: SpatialLayerNorm(), IMAGE),
    'transformer': (lambda: SpatialTransformer(LocalizationNet(6, 4, position=2)), IMAGE),
}


def lift(): return LiftingConv2d(6, 4, 3, C8)

def with_a_norm():
    return nn.Sequential(lift(), GroupBatchNorm(4), nn.GELU(), Downsample2d(),
                         GroupConv2d(4, 4, 3, C8), GlobalPool())

def in_place():
    return nn.Sequential(lift(), GroupBatchNorm(4), nn.ReLU(True), GroupConv2d(4, 4, 3, C8),
                         nn.ReLU(True), GlobalPool('max'))

def separable():
    return nn.Sequential(lift(), nn.SiLU(), SeparableGroupConv2d(4, 4, 3, C8),
                         GroupBatchNorm(4), nn.Tanh(), Downsample2d())

def hourglass():
    return nn.Sequential(lift(), GroupInstanceNorm(4), nn.GELU(), MaxBlurPool2d(),
                         GroupBatchNorm(4), nn.GELU(), BlurPool2d(), Upsample2d())

NETS = {
    'net with a norm': (with_a_norm, IMAGE),
    'net in place': (in_place, IMAGE),
    'net, separable': (separable, IMAGE),
    'hourglass': (hourglass, IMAGE),
    'GCNN': (lambda: GCNN(C8, (2, 3, 4)), SMALL),
    'GCNN on C1': (lambda: GCNN(C1, (2, 3, 4)), SMALL),
    'GCNN, separable': (lambda: GCNN(D4, (2, 3, 4), separable=True), SMALL),
    'CNN': (lambda: CNN((2, 3, 4)), SMALL),
    'STCNN': (lambda: STCNN((2, 3, 4)), SMALL),
    'published GCNN': (lambda: published_gcnn(4, 2, 4), SMALL),
    'published STCNN': (lambda: published_stcnn('multi', 3, 4, 4, 'random'), SMALL),
}


# layouts: the same numbers, laid otherwise

def by_pixel(t):
    "As `channels_last` has it; for a single image, with strides that say nothing."
    if t.ndim < 4: return t
    return t.flatten(1, -3).to(memory_format=torch.channels_last).view_as(t)

def settled_by_pixel(t):
    "With strides that can't be mistaken."
    if t.ndim < 4: return t
    pixels = t.flatten(1, -3).permute(0, 2, 3, 1).contiguous()
    return pixels.unflatten(-1, t.shape[1:-2]).movedim((1, 2), (-2, -1))

def open_by_pixel(t):
    "With a stride of 1 for each axis of one element."
    t = by_pixel(t)
    return t.as_strided(t.shape, [1 if n == 1 else s for n, s in zip(t.shape, t.stride())])

def part_by_pixel(t):
    "Some channels of something larger."
    return by_pixel(torch.cat([t, t], 1))[:, :t.shape[1]] if t.ndim > 3 else t

def with_gaps(t):
    "A part of something larger."
    larger = torch.zeros(2*t.shape[0], *t.shape[1:-1], t.shape[-1] + 1, dtype=t.dtype)
    return larger[::2, ..., :-1].copy_(t)

def backwards(t):
    "Axes in the opposite order."
    axes = range(t.ndim)[::-1]
    return t.permute(*axes).contiguous().permute(*axes)

def channels_last(t):
    "As a convolution of PyTorch's gives it."
    return t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

PLAIN = Tensor.contiguous
LAYOUTS = [PLAIN, by_pixel, settled_by_pixel, open_by_pixel, part_by_pixel, with_gaps,
           backwards]
GRADIENTS = [PLAIN, by_pixel, backwards]        # what comes back


# asking and comparing

@contextmanager
def plain():
    "In here nothing takes a fast path."
    with ExitStack() as stack:
        parts = [gcnn_stn.cache, gcnn_stn.layer, gcnn_stn.layout, gcnn_stn.norm, gcnn_stn.separable]
        for part in parts:
            stack.enter_context(mock.patch.object(part, '_transformed', lambda: True))
        yield

def draw(shape, dtype=torch.float64, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice, dtype=torch.float64).to(dtype)

def shaken(module):
    "With weights, scales and statistics that are nothing special."
    for name, t in module.state_dict().items():
        if not t.is_floating_point(): continue
        scale = 'running' in name or t.ndim == 1
        t.copy_(torch.rand(t.shape) + .5 if scale else torch.randn(t.shape)/3)
    return module

def made(case, dtype=torch.float64):
    "A module of the table."
    torch.manual_seed(0)
    return shaken(case[0]()).to(dtype)

def answers(module, x, layout=PLAIN, train=True, back=PLAIN):
    "Output, gradients and buffers of a copy."
    torch.manual_seed(0)                        # the same dice
    twin, x = copy.deepcopy(module).train(train), layout(x).detach().requires_grad_()
    y = twin(x)
    wanted = {'the input': x}
    wanted |= {name: p for name, p in twin.named_parameters() if p.requires_grad}
    toward = back(draw(y.shape, y.dtype, 1))
    grads = torch.autograd.grad(y, [*wanted.values()], toward, allow_unused=True)
    found = {f'gradient of {name}': g for name, g in zip(wanted, grads) if g is not None}
    return {'output': y} | found | dict(twin.named_buffers())

def attempt(f, *args):
    "What `f` gives, or the kind of error it raises."
    try: return f(*args)
    except (ValueError, RuntimeError, NotImplementedError) as e: return type(e)

def compare(got, want, tol=1e-6):
    "Relative to the largest number of each, or to a trace of the largest of all."
    if isinstance(want, type) or isinstance(got, type):
        assert got == want
        return
    assert [*got] == [*want]
    sizes = {name: t.abs().max().item() for name, t in want.items() if t.numel()}
    for name, b in want.items():
        a = got[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if name not in sizes: continue
        off = (a.double() - b.double()).abs().max().item()
        assert off <= tol*max(sizes[name], 1e-6*max(sizes.values())), f'{name}: {off:.1e}'


# the tests

@pytest.mark.parametrize('name', [*LAYERS, *NETS])
def test_layouts(name):
    "Layouts of the input and of the gradient × batches × modes."
    case = (LAYERS | NETS)[name]
    module, layouts = made(case), LAYOUTS if name in LAYERS else LAYOUTS[:2]
    for train, batch in itertools.product((True, False), (1, 2, 4)):
        x = draw((batch, *case[1]))
        with plain(): want = attempt(answers, module, x, PLAIN, train)
        for layout, back in itertools.product(layouts, GRADIENTS):
            compare(attempt(answers, module, x, layout, train, back), want)


class Between(nn.Module):
    "Norms of PyTorch's own before and behind a layer, with something smooth behind each."
    def __init__(self, layer, shape, behind):
        super().__init__()
        before = shape[0]*(shape[1] if len(shape) == 4 else 1)
        self.shape, self.layer = shape, layer
        self.before = nn.Sequential(shaken(nn.BatchNorm2d(before)), nn.GELU())
        self.behind = nn.Sequential(shaken(nn.BatchNorm2d(behind)), nn.SiLU())

    def forward(self, x): # maps (B, ·, H, W) to maps
        x = self.before(x)
        if len(self.shape) == 4: x = x.unflatten(1, self.shape[:2])
        return self.behind(self.layer(x).flatten(1, -3))

@pytest.mark.parametrize('name', LAYERS)
def test_torchs_own_norms(name):
    "`nn.BatchNorm2d` before and behind a layer has the gradients that it has map by map."
    layer, shape = made(LAYERS[name]), LAYERS[name][1]
    y = layer(draw((2, *shape)))
    if y.ndim < 4: pytest.skip("gives no maps")
    net = Between(layer, shape, y.flatten(1, -3).shape[1]).double()
    proper = (PLAIN, channels_last)             # what PyTorch's own norm can cope with
    for train, batch in itertools.product((True, False), (1, 2)):
        x = draw((batch, *shape)).flatten(1, -3)
        with plain(): want = attempt(answers, net, x, PLAIN, train)
        for layout, back in itertools.product(proper, proper):
            compare(attempt(answers, net, x, layout, train, back), want)


def put(name, value): return lambda norm: setattr(norm, name, value)

def without_statistics(norm): norm.running_mean = norm.running_var = None

STATES = {    # arguments, and what is done to the norm afterwards
    'as made': ({}, None),
    'no momentum': (dict(momentum=None), None),
    'all of the momentum': (dict(momentum=1.), None),
    'no scale': (dict(affine=False), None),
    'no statistics': (dict(track_running_stats=False), None),
    'neither': (dict(affine=False, track_running_stats=False), None),
    'large eps': (dict(eps=.5), None),
    'no more tracking': ({}, put('track_running_stats', False)),
    'no tracking or momentum': (dict(momentum=None), put('track_running_stats', False)),
    'nothing to track': (dict(track_running_stats=False), put('track_running_stats', True)),
    'no count': ({}, put('num_batches_tracked', None)),
    'no count, no momentum': (dict(momentum=None), put('num_batches_tracked', None)),
    'statistics taken away': ({}, without_statistics),
    'scale taken away': ({}, put('weight', None)),
    'shift taken away': ({}, put('bias', None)),
    'frozen scale': ({}, lambda norm: norm.weight.requires_grad_(False)),
    'frozen': ({}, lambda norm: norm.requires_grad_(False)),
    'momentum changed': ({}, put('momentum', .7)),
    'eps changed': ({}, put('eps', 1.)),
}

def both_norms(**kwargs):
    "Ours and PyTorch's, in the same state."
    kinds = GroupBatchNorm, nn.BatchNorm3d
    ours, theirs = (shaken(kind(6, **kwargs)).double() for kind in kinds)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs

def third_step(norm, x, layout, train, back=PLAIN):
    "Statistics build on one another."
    norm = copy.deepcopy(norm).train(train)
    for seed in (1, 2): norm(layout(draw(x.shape, seed=seed)))
    return answers(norm, x, layout, train, back)

@pytest.mark.parametrize('name', STATES)
def test_norm_states(name):
    "`GroupBatchNorm` does what `nn.BatchNorm3d` does, in whatever state it is put."
    kwargs, change = STATES[name]
    ours, theirs = both_norms(**kwargs)
    for norm in (ours, theirs):
        if change: change(norm)
    for train, batch in itertools.product((True, False), (0, 1, 2)):
        x = draw((batch, *FEATURE))
        want = attempt(third_step, theirs, x, PLAIN, train)
        for layout, back in itertools.product(LAYOUTS[:5], GRADIENTS):
            compare(attempt(third_step, ours, x, layout, train, back), want)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = dict(zip(DTYPES, (1e-6, 1e-4, .05, .05)))

@pytest.mark.parametrize('statistics', DTYPES)
@pytest.mark.parametrize('parameters', DTYPES)
@pytest.mark.parametrize('data', DTYPES)
def test_mixed_precisions(data, parameters, statistics):
    "What `nn.BatchNorm3d` refuses is refused; what it takes has its precision."
    norms = [kind(6).to(parameters) for kind in (GroupBatchNorm, nn.BatchNorm3d)]
    for norm in norms:
        norm.running_mean = norm.running_mean.to(statistics)
        norm.running_var = norm.running_var.to(statistics)
    for train in (True, False):
        x = draw((2, *FEATURE), data)
        want = attempt(answers, norms[1], x, PLAIN, train)
        for layout in LAYOUTS[:3]:
            compare(attempt(answers, norms[0], x, layout, train), want, TOLERANCE[data])


@pytest.mark.parametrize('name', LAYERS)
def test_autocast(name):
    "Under autocast, in the precision that the plain path has there, with gradients or not."
    module = made(LAYERS[name], torch.float32)
    x = draw((2, *LAYERS[name][1]), torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        for train, data in itertools.product((True, False), (x, x.bfloat16())):
            with plain(): want = answers(module, data, PLAIN, train)
            for layout in LAYOUTS[:2]:
                compare(answers(module, data, layout, train), want, .05)
            with torch.no_grad(): test = module.train(train)(data)
            assert test.dtype == want['output'].dtype


@pytest.mark.parametrize('name', [n for n in LAYERS if n not in ('dropout', 'transformer')])
def test_function_transforms(name):
    "`torch.func`'s gradients and `vmap`, in all layouts."
    module = made(LAYERS[name]).eval()
    weights = dict(module.named_parameters())
    def call(weights, x): return functional_call(module, weights, (x,))
    for batch, layout in itertools.product((1, 2), LAYOUTS):
        x = draw((batch, *LAYERS[name][1]))
        with plain(): want = answers(module, x, train=False)
        y, pull = torch.func.vjp(call, weights, layout(x))
        of_weights, of_input = pull(draw(y.shape, y.dtype, 1))
        grads = {'the input': of_input} | of_weights
        got = {'output': y} | {f'gradient of {n}': g for n, g in grads.items()}
        compare(got | dict(module.named_buffers()), want)
        for axis in (0, -1):
            pair = torch.stack([layout(x), layout(x)], axis)
            both = torch.func.vmap(module, in_dims=axis)(pair)
            compare({'output': both[1]}, {'output': want['output']})


# derivatives of all kinds: of a norm at x, in the direction t

def forward_mode(norm, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, t))).tangent

def forward_mode_of_scale(norm, x, t):
    scale = norm.weight.detach()
    del norm.weight
    with forward_ad.dual_level():
        norm.weight = forward_ad.make_dual(scale, scale.cos())
        return forward_ad.unpack_dual(norm(x)).tangent

def reverse_over_forward(norm, x, t):
    x = x.detach().requires_grad_()
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, t))).tangent
        return torch.autograd.grad(y.sin().sum(), x)[0]

def second(norm, x, t):
    inputs = [x.detach().requires_grad_(), *norm.parameters()]
    first = torch.autograd.grad(norm(inputs[0]).sin().sum(), inputs, create_graph=True)
    again = torch.autograd.grad(sum((g*g).sum() for g in first), inputs)
    return torch.cat([g.flatten() for g in again])

def third(norm, x, t):
    x = x.detach().requires_grad_()
    y = norm(x)
    for _ in range(3): y, = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    return y

def many_at_once(norm, x, t):
    x = x.detach().requires_grad_()
    y = norm(x)
    toward = torch.stack([torch.ones_like(y), y.detach().sin(), 0*y.detach()])
    inputs = [x, *norm.parameters()]
    return torch.autograd.grad(y, inputs, toward, is_grads_batched=True)[0]

def jacobian(norm, x, t, **how):
    def part(x): return norm(x)[:, :1, :1, :1]
    return autograd.jacobian(part, x[..., :1, :2], vectorize=True, **how)

def forward_jacobian(*args): return jacobian(*args, strategy='forward-mode')

def recomputed(norm, x, t):
    x = x.detach().requires_grad_()
    y = checkpoint(norm, x, use_reentrant=False)
    return torch.autograd.grad(y.sin().sum(), x)[0]

def loss(norm): return lambda x: norm(x).sin().sum()
def hessian(norm, x, t): return autograd.hessian(loss(norm), x[..., :1, :2])
def hessian_times(norm, x, t): return autograd.hvp(loss(norm), x, t)[1]
def double_reverse(norm, x, t): return autograd.jvp(norm, x, t)[1]
def func_grad(norm, x, t): return torch.func.grad(loss(norm))(x)
def func_jvp(norm, x, t): return torch.func.jvp(norm, (x,), (t,))[1]
def func_hessian(norm, x, t): return torch.func.hessian(loss(norm))(x[..., :1, :2])

def of_each_sample(norm, x, t):
    return torch.func.vmap(torch.func.grad(lambda x: loss(norm)(x[None])))(x)

DERIVATIVES = [forward_mode, forward_mode_of_scale, reverse_over_forward, second, third,
               many_at_once, forward_jacobian, jacobian, hessian, hessian_times,
               double_reverse, func_grad, func_jvp, func_hessian, of_each_sample,
               recomputed]

@pytest.mark.parametrize('f', DERIVATIVES)
def test_derivatives(f):
    "Whatever derivative `nn.BatchNorm3d` has or refuses, so do we in each layout."
    for train, track, batch in itertools.product((True, False), (True, False), (1, 2)):
        x, t = draw((batch, *FEATURE)), draw((batch, *FEATURE), seed=1)
        ours, theirs = (norm.train(train) for norm in both_norms(track_running_stats=track))
        want = attempt(f, copy.deepcopy(theirs), x, t)
        for layout in LAYOUTS[:3]:
            got = attempt(f, copy.deepcopy(ours), layout(x), layout(t))
            if isinstance(want, type): assert got == want
            else: assert (got - want).abs().max() <= 1e-9*want.abs().max()


# weights that are made from others, and weights that come in another precision

DERIVED = {
    'as it is': lambda m: m,
    'pruned': lambda m: prune.l1_unstructured(m, 'weight', amount=.5),
    'weight norm, old': weight_norm,
    'spectral norm, old': spectral_norm,
    'weight norm': parametrizations.weight_norm,
    'spectral norm': parametrizations.spectral_norm,
    'parametrized': lambda m: register_parametrization(m, 'weight', nn.Softplus()),
}

def loaded(m):
    m.load_state_dict(copy.deepcopy(m.state_dict()))
    return m

def laid(m, dtype): return m.to(dtype, memory_format=torch.channels_last)

WAYS = {    # what is done, and in which precision that leaves the layer
    'double()': (lambda m: m.double(), torch.float64),
    'half()': (lambda m: m.half(), torch.float16),
    'bfloat16()': (lambda m: m.bfloat16(), torch.bfloat16),
    'type()': (lambda m: m.type(torch.float64), torch.float64),
    'there and back': (lambda m: m.half().float(), torch.float32),
    'inside a net': (lambda m: nn.Sequential(m).double()[0], torch.float64),
    'loaded': (lambda m: loaded(m).double(), torch.float64),
    'channels_last': (lambda m: laid(m, torch.float32), torch.float32),
    'channels_last, double': (lambda m: laid(m, torch.float64), torch.float64),
    'share_memory()': (lambda m: m.share_memory(), torch.float32),
}

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('derived', DERIVED)
def test_derived_weights(derived, way):
    "A weight that is made from others follows a cast, as `nn.Conv2d`'s does; so does R."
    move, dtype = WAYS[way]
    tol = .03 if dtype.itemsize < 4 or way == 'there and back' else 1e-5
    for case in CONVOLUTIONS.values():
        module, x = made(case, torch.float32), draw((2, *case[1]), torch.float32)
        DERIVED[derived](module)(x)
        want = module.eval()(x)                    # spectral norm iterates in training
        with torch.no_grad(): module(x)            # filters are kept
        module = move(module)
        got = module(x.to(dtype))
        R = basis_operator(module.group, module.kernel_size, module.basis)
        assert got.dtype == dtype and torch.equal(module.R, R.to(dtype))
        assert (got - want).norm() <= tol*want.norm()
        got.float().square().sum().backward()


def doubled(tensors): return {name: t.double() for name, t in tensors}

def lent(m): return lambda x: functional_call(m, doubled(m.named_parameters()), x)

def new_parameters(m):
    for name, t in doubled(m.named_parameters()).items():
        setattr(m, name, nn.Parameter(t.detach()))
    return m

def new_data(m):
    for p in m.parameters(): p.data = p.data.double()
    return m

def assigned(m):
    m.load_state_dict(doubled(m.state_dict().items()), assign=True)
    return m

def made_without_memory(m):
    empty = copy.deepcopy(m).to('meta')
    empty.load_state_dict(doubled(m.state_dict().items()), assign=True)
    return empty

def through_meta(m):
    weights = copy.deepcopy(m.state_dict())
    m = m.to('meta').to_empty(device='cpu')
    m.load_state_dict(weights)
    return m.double()

def norm_removed(m): return remove_weight_norm(weight_norm(m).double())

def parametrization_removed(m):
    register_parametrization(m, 'weight', nn.Identity())
    return remove_parametrizations(m.double(), 'weight')

DOORS = [lent, new_parameters, new_data, assigned, made_without_memory, through_meta,
         norm_removed, parametrization_removed]

@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_weights_of_another_precision(name, door):
    "Weights that come in float64, by whatever door, are used so, with as precise an R."
    case = CONVOLUTIONS[name]
    module, x = made(case, torch.float32).eval(), draw((2, *case[1]))
    want = copy.deepcopy(module).double()(x)
    with torch.no_grad(): module(x.float())        # filters are kept
    changed = door(module)
    tol = 1e-6 if door is norm_removed else 1e-10  # its scale was found in float32
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients): got = changed(x)
        assert (got - want).abs().max() <= tol*want.abs().max()
