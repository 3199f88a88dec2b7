"A fast path must answer as the plain one does, whatever the layout, the batch, the mode and the precision: outputs, buffers and gradients."
import copy, itertools
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest, torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import gcnn_stn.cache, gcnn_stn.layer, gcnn_stn.separable
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.kernel import basis_operator
from gcnn_stn.layer import (Downsample2d, GlobalPool, GroupAvgPool2d, GroupBatchNorm, GroupConv2d, GroupDropout,
                            GroupInstanceNorm, GroupLayerNorm, GroupMaxPool2d, GroupPool, LiftingConv2d, check_module)
from gcnn_stn.model import CNN, GCNN, STCNN, published_gcnn, published_stcnn
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import DepthwiseGroupConv2d, GroupPointwise, SeparableGroupConv2d
from gcnn_stn.stn import AreaPool2d, LocalizationNet, SpatialLayerNorm, SpatialTransformer
from gcnn_stn.subgroup import CosetPool, Restrict

C1, C4, C8, D4 = CyclicGroup(1), CyclicGroup(4), CyclicGroup(8), DihedralGroup(4)
IMAGE, FEATURE, TRIVIAL = (6, 10, 10), (6, 8, 10, 10), (6, 1, 10, 10)
ROW, HIGH, COLUMN = (6, 8, 1, 10), (6, 8, 2, 10), (6, 8, 10, 1)


def shaken(module):
    "With weights, biases and statistics that are nothing special."
    for name, t in module.state_dict().items():
        if t.is_floating_point(): t.copy_(torch.rand(t.shape) + .5 if 'running' in name or t.ndim == 1 else torch.randn(t.shape)/3)
    return module


LAYERS = {    # what makes it, and the shape of one input
    'lifting': (lambda: LiftingConv2d(6, 4, 3, C8), IMAGE),
    'lifting on C1': (lambda: LiftingConv2d(6, 4, 3, C1, padding=1), IMAGE),
    'group': (lambda: GroupConv2d(6, 4, 3, C8, stride=2, padding=1), FEATURE),
    'group of groups': (lambda: GroupConv2d(6, 4, 3, D4, groups=2, bias=False), FEATURE),
    'group on C1': (lambda: GroupConv2d(6, 4, 3, C1), TRIVIAL),
    'group of 1 × 1': (lambda: GroupConv2d(6, 4, 1, C8), FEATURE),
    'group to one row': (lambda: GroupConv2d(6, 4, 3, C8, stride=2, padding=1), HIGH),
    'group on a row': (lambda: GroupConv2d(6, 4, 3, C8, padding=1), ROW),
    'group to one pixel': (lambda: GroupConv2d(6, 4, 9, C8), (6, 8, 9, 9)),
    'pointwise': (lambda: GroupPointwise(6, 4, C8), FEATURE),
    'depthwise': (lambda: DepthwiseGroupConv2d(6, 3, C8), FEATURE),
    'depthwise on a row': (lambda: DepthwiseGroupConv2d(6, 3, D4, padding=1), ROW),
    'separable': (lambda: SeparableGroupConv2d(6, 4, 3, C8, stride=2), FEATURE),
    **{f'batch norm {name}': (lambda kw=kw: GroupBatchNorm(6, **kw), shape) for (name, kw), shape in zip(
        {'': {}, 'without momentum': dict(momentum=None), 'without scale': dict(affine=False), 'without statistics': dict(track_running_stats=False),
         'on C1': {}, 'of a row': {}, 'of two rows': {}, 'of a column': {}, 'of a pixel': {}}.items(),
        (FEATURE, FEATURE, FEATURE, FEATURE, TRIVIAL, ROW, HIGH, COLUMN, (6, 8, 1, 1)))},
    'batch norm of one channel': (lambda: GroupBatchNorm(1), (1, 8, 10, 10)),
    'layer norm': (lambda: GroupLayerNorm(6), FEATURE),
    'layer norm on C1': (lambda: GroupLayerNorm(6), TRIVIAL),
    'instance norm': (lambda: GroupInstanceNorm(6), FEATURE),
    'instance norm without scale': (lambda: GroupInstanceNorm(6, affine=False), ROW),
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
SMALL = (1, 30, 30)
NETS = {
    'a norm at work': (lambda: nn.Sequential(LiftingConv2d(6, 4, 3, C8), GroupBatchNorm(4), nn.GELU(), Downsample2d(), GroupConv2d(4, 4, 3, C8), GlobalPool()), IMAGE),
    'in place': (lambda: nn.Sequential(LiftingConv2d(6, 4, 3, C8), GroupBatchNorm(4), nn.ReLU(True), GroupConv2d(4, 4, 3, C8), nn.ReLU(True), GlobalPool('max')), IMAGE),
    'separable': (lambda: nn.Sequential(LiftingConv2d(6, 4, 3, C8), nn.SiLU(), SeparableGroupConv2d(4, 4, 3, C8), GroupBatchNorm(4), nn.Tanh(), Downsample2d()), IMAGE),
    'hourglass': (lambda: nn.Sequential(LiftingConv2d(6, 4, 3, C4), GroupInstanceNorm(4), nn.GELU(), MaxBlurPool2d(), GroupBatchNorm(4), nn.GELU(), BlurPool2d(), Upsample2d()), IMAGE),
    'GCNN': (lambda: GCNN(C8, (2, 3, 4)), SMALL), 'GCNN on C1': (lambda: GCNN(C1, (2, 3, 4)), SMALL), 'GCNN, separable': (lambda: GCNN(D4, (2, 3, 4), separable=True), SMALL),
    'CNN': (lambda: CNN((2, 3, 4)), SMALL), 'STCNN': (lambda: STCNN((2, 3, 4)), SMALL),
    'published GCNN': (lambda: published_gcnn(4, 2, 4), SMALL), 'published STCNN': (lambda: published_stcnn('multi', 3, 4, 4, 'random'), SMALL),
}
EVERYTHING = {**LAYERS, **{f'net: {name}': case for name, case in NETS.items()}}


def by_pixel(t): # as channels_last has it
    return t.flatten(1, -3).to(memory_format=torch.channels_last).view_as(t) if t.ndim > 3 else t

def settled_by_pixel(t): # with strides that can't be mistaken
    if t.ndim < 4: return t
    pixels = t.flatten(1, -3).permute(0, 2, 3, 1).contiguous()
    return pixels.unflatten(-1, t.shape[1:-2]).movedim((1, 2), (-2, -1))

def with_gaps(t): # a part of something larger
    larger = torch.zeros(2*t.shape[0], *t.shape[1:-1], t.shape[-1] + 1, dtype=t.dtype)
    part = larger[::2, ..., :-1]
    return part.copy_(t)

def part_by_pixel(t): # some channels of something larger
    if t.ndim < 4: return t
    return by_pixel(torch.cat([t, t], 1))[:, :t.shape[1]]

def backwards(t): # axes in the opposite order
    return t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1])

def open_by_pixel(t): # a stride without a meaning for an axis of one
    t = by_pixel(t)
    return t.as_strided(t.shape, [1 if n == 1 else s for n, s in zip(t.shape, t.stride())])

LAYOUTS = [torch.Tensor.contiguous, by_pixel, settled_by_pixel, open_by_pixel, part_by_pixel, with_gaps, backwards]
GRADIENTS = [torch.Tensor.contiguous, by_pixel, backwards]      # what comes back


@contextmanager
def plain():
    "In here nothing takes a fast path."
    with ExitStack() as stack:
        for part in (gcnn_stn.cache, gcnn_stn.layer, gcnn_stn.separable):
            stack.enter_context(mock.patch.object(part, '_transformed', lambda: True))
        yield


def draw(shape, dtype=torch.float64, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def answers(module, x, layout=torch.Tensor.contiguous, train=True, layout_of_gradient=torch.Tensor.contiguous):
    "Outputs, buffers and gradients of a fresh copy."
    torch.manual_seed(0)
    twin, x = copy.deepcopy(module).train(train), layout(x).detach().requires_grad_()
    y = twin(x)
    wanted = {'the input': x} | {name: p for name, p in twin.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [*wanted.values()], layout_of_gradient(draw(y.shape, y.dtype, 1)), allow_unused=True)
    found = {f'gradient of {name}': g for name, g in zip(wanted, grads) if g is not None}
    return {'output': y} | found | {name: b.clone() for name, b in twin.named_buffers()}


def attempt(f, *args):
    "What `f` gives, or the kind of error it raises."
    try: return f(*args)
    except (ValueError, RuntimeError, NotImplementedError) as e: return type(e)


def compare(got, want, tol=1e-6):
    "The same, relative to the largest number of each, or to a small part of the largest of all."
    if isinstance(want, type) or isinstance(got, type):
        assert got == want
        return
    assert [*got] == [*want]
    largest = max([t.abs().max().item() for t in want.values() if t.numel()], default=0)
    for name, b in want.items():
        a = got[name]
        assert a.shape == b.shape and a.dtype == b.dtype, name
        if not b.numel(): continue
        scale = max(b.abs().max().item(), 1e-6*largest)
        assert (a.double() - b.double()).abs().max().item() <= tol*scale, f'{name}: off by {(a - b).abs().max()/scale:.1e}'


@pytest.mark.parametrize('name', EVERYTHING)
def test_layouts(name):
    "Layouts of the input and of the gradient × batches × modes."
    make, shape = EVERYTHING[name]
    torch.manual_seed(0)
    module = shaken(make()).double()
    some = LAYOUTS if name in LAYERS else LAYOUTS[:2]
    for train, batch in itertools.product((True, False), (1, 2, 4)):
        x = draw((batch, *shape))
        with plain(): want = attempt(answers, module, x, torch.Tensor.contiguous, train)
        for layout, back in itertools.product(some, GRADIENTS): compare(attempt(answers, module, x, layout, train, back), want)


def channels_last(t): # as a convolution of PyTorch's gives it
    pixels = t.permute(0, 2, 3, 1).contiguous()
    return pixels.permute(0, 3, 1, 2)

PROPER = [torch.Tensor.contiguous, channels_last]      # what PyTorch's own norm can cope with

class Between(nn.Module):
    "Norms of PyTorch's own before and behind a layer, each followed by something that wants its input as it was."
    def __init__(self, layer, shape, behind):
        super().__init__()
        maps = shape[0]*shape[1] if len(shape) == 4 else shape[0]
        self.shape, self.layer = shape, layer
        self.before = nn.Sequential(shaken(nn.BatchNorm2d(maps)), nn.GELU())
        self.behind = nn.Sequential(shaken(nn.BatchNorm2d(behind)), nn.SiLU())
    def forward(self, x):
        x = self.before(x)
        if len(self.shape) == 4: x = x.unflatten(1, self.shape[:2])
        return self.behind(self.layer(x).flatten(1, -3))


@pytest.mark.parametrize('name', LAYERS)
def test_torchs_own_norms(name):
    "`nn.BatchNorm2d` before a layer and behind it has the gradients that it has map by map."
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = shaken(make()).double()
    y = layer(draw((2, *shape)))
    if y.ndim < 4: pytest.skip("gives no maps")
    net = Between(layer, shape, y.flatten(1, -3).shape[1]).double()
    for train, batch in itertools.product((True, False), (1, 2)):
        x = draw((batch, *shape)).flatten(1, -3)
        with plain(): want = attempt(answers, net, x, torch.Tensor.contiguous, train)
        for layout, back in itertools.product(PROPER, PROPER): compare(attempt(answers, net, x, layout, train, back), want)


def put(name, value):
    def change(norm): setattr(norm, name, value)
    return change

STATES = {    # arguments, and what is done to the norm afterwards
    'as made': ({}, None), 'no momentum': (dict(momentum=None), None), 'all of the momentum': (dict(momentum=1.), None),
    'no scale': (dict(affine=False), None), 'no statistics': (dict(track_running_stats=False), None),
    'neither': (dict(affine=False, track_running_stats=False), None), 'large eps': (dict(eps=.5), None),
    'no more statistics': ({}, put('track_running_stats', False)), 'no more statistics, no momentum': (dict(momentum=None), put('track_running_stats', False)),
    'statistics wanted, but none there': (dict(track_running_stats=False), put('track_running_stats', True)),
    'not counted': ({}, put('num_batches_tracked', None)), 'not counted, no momentum': (dict(momentum=None), put('num_batches_tracked', None)),
    'statistics taken away': ({}, lambda norm: [setattr(norm, name, None) for name in ('running_mean', 'running_var')]),
    'scale taken away': ({}, put('weight', None)), 'shift taken away': ({}, put('bias', None)),
    'frozen scale': ({}, lambda norm: norm.weight.requires_grad_(False)), 'frozen': ({}, lambda norm: norm.requires_grad_(False)),
    'momentum changed': ({}, put('momentum', .7)), 'eps changed': ({}, put('eps', 1.)),
}

@pytest.mark.parametrize('name', STATES)
def test_norm_states(name):
    "`GroupBatchNorm` does what `nn.BatchNorm3d` does, in whatever state it is put."
    kwargs, change = STATES[name]
    ours, theirs = (shaken(kind(6, **kwargs)).double() for kind in (GroupBatchNorm, nn.BatchNorm3d))
    theirs.load_state_dict(ours.state_dict())
    for norm in (ours, theirs):
        if change: change(norm)
    for train, batch, (layout, back) in itertools.product((True, False), (0, 1, 2), itertools.product(LAYOUTS[:5], GRADIENTS)):
        x = draw((batch, *FEATURE))
        compare(attempt(steps, ours, x, layout, train, back), attempt(steps, theirs, x, torch.Tensor.contiguous, train))

def steps(module, *args):
    "The third of three steps: statistics build on one another."
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for seed in (1, 2): twin.train(args[2])(args[1](draw(args[0].shape, seed=seed)))
    return answers(twin, *args)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

@pytest.mark.parametrize('statistics', DTYPES)
@pytest.mark.parametrize('parameters', DTYPES)
@pytest.mark.parametrize('data', DTYPES)
def test_mixed_precisions(data, parameters, statistics):
    "What `nn.BatchNorm3d` refuses is refused; what it takes has the same precision and, within it, the same numbers."
    ours, theirs = (kind(6).to(parameters) for kind in (GroupBatchNorm, nn.BatchNorm3d))
    for norm in (ours, theirs):
        for name in ('running_mean', 'running_var'): setattr(norm, name, getattr(norm, name).to(statistics))
    for train, layout in itertools.product((True, False), LAYOUTS[:3]):
        x = draw((2, *FEATURE), data)
        tol = 1e-6 if data == torch.float64 else 1e-4 if data == torch.float32 else .05
        compare(attempt(answers, ours, x, layout, train), attempt(answers, theirs, x, torch.Tensor.contiguous, train), tol)


@pytest.mark.parametrize('name', LAYERS)
def test_autocast(name):
    "Under autocast, too, in the precision that the plain path has there, and with gradients as exact."
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module, x = shaken(make()), draw((2, *shape), torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        for train, data in itertools.product((True, False), (x, x.bfloat16())):
            with plain(): want = attempt(answers, module, data, torch.Tensor.contiguous, train)
            for layout in LAYOUTS[:2]: compare(attempt(answers, module, data, layout, train), want, .05)
            with torch.no_grad(): test = module.train(train)(data)
            assert test.dtype == want['output'].dtype


def forward_mode(norm, x, t):
    with forward_ad.dual_level(): return forward_ad.unpack_dual(norm(forward_ad.make_dual(x, t))).tangent

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

def second_derivatives(norm, x, t):
    inputs = [x.detach().requires_grad_(), *norm.parameters()]
    first = torch.autograd.grad(norm(inputs[0]).sin().sum(), inputs, create_graph=True)
    return torch.cat([g.flatten() for g in torch.autograd.grad(sum((g*g).sum() for g in first), inputs)])

def third_derivatives(norm, x, t):
    x, y = x.detach().requires_grad_(), 0
    for _ in range(3):
        y = (norm(x) if isinstance(y, int) else y).sin().sum()
        y, = torch.autograd.grad(y, x, create_graph=True)
    return y

def many_at_once(norm, x, t):
    x = x.detach().requires_grad_()
    y = norm(x)
    toward = torch.stack([torch.ones_like(y), y.detach().sin(), 0*y.detach()])
    return torch.autograd.grad(y, [x, *norm.parameters()], toward, is_grads_batched=True)[0]

def jacobian(norm, x, t, **how):
    return torch.autograd.functional.jacobian(lambda x: norm(x)[:, :1, :1, :1], x[..., :2, :2], vectorize=True, **how)

def checkpointed(norm, x, t):
    x = x.detach().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)
    return torch.autograd.grad(y.sin().sum(), x)[0]

def loss(norm): return lambda x: norm(x).sin().sum()
def small(x): return x[..., :2, :2]

DERIVATIVES = {
    'forward mode': forward_mode, 'forward mode, of the scale': forward_mode_of_scale, 'reverse over forward': reverse_over_forward,
    'second': second_derivatives, 'third': third_derivatives, 'many at once': many_at_once, 'Jacobian': jacobian,
    'Jacobian in forward mode': lambda *args: jacobian(*args, strategy='forward-mode'),
    'Hessian': lambda norm, x, t: torch.autograd.functional.hessian(loss(norm), small(x)),
    'Hessian, vectorized': lambda norm, x, t: torch.autograd.functional.hessian(loss(norm), small(x), vectorize=True),
    'Hessian times vector': lambda norm, x, t: torch.autograd.functional.hvp(loss(norm), x, t)[1],
    'by double reverse': lambda norm, x, t: torch.autograd.functional.jvp(norm, x, t)[1],
    'func.grad': lambda norm, x, t: torch.func.grad(loss(norm))(x), 'func.jvp': lambda norm, x, t: torch.func.jvp(norm, (x,), (t,))[1],
    'func.hessian': lambda norm, x, t: torch.func.hessian(loss(norm))(small(x)),
    'of each sample': lambda norm, x, t: torch.func.vmap(torch.func.grad(lambda x: loss(norm)(x[None])))(x),
    'checkpointed': checkpointed,
}

@pytest.mark.parametrize('name', DERIVATIVES)
def test_derivatives(name):
    "Whatever derivative `nn.BatchNorm3d` has map by map, `GroupBatchNorm` has in each layout; what it refuses is refused."
    f, x, t = DERIVATIVES[name], draw((2, *FEATURE)), draw((2, *FEATURE), seed=1)
    for train, kwargs, batch in itertools.product((True, False), ({}, dict(affine=True, track_running_stats=False)), (1, 2)):
        ours, theirs = (shaken(kind(6, **kwargs)).double().train(train) for kind in (GroupBatchNorm, nn.BatchNorm3d))
        theirs.load_state_dict(ours.state_dict())
        want = attempt(f, copy.deepcopy(theirs), x[:batch], t[:batch])
        for layout in LAYOUTS[:3]:
            got = attempt(f, copy.deepcopy(ours), layout(x[:batch]), layout(t[:batch]))
            if isinstance(want, type): assert got == want
            else: assert (got - want).abs().max() <= 1e-9*want.abs().max()


CONVOLUTIONS = [name for name in LAYERS if name in ('lifting', 'group', 'group of groups', 'pointwise', 'depthwise')]
DERIVED = {
    'as it is': lambda m: m, 'pruned': lambda m: prune.l1_unstructured(m, 'weight', amount=.5),
    'weight norm, old': weight_norm, 'spectral norm, old': spectral_norm,
    'weight norm': parametrizations.weight_norm, 'spectral norm': parametrizations.spectral_norm,
    'parametrized': lambda m: register_parametrization(m, 'weight', nn.Softplus()),
}
WAYS = {    # what is done, and in which precision that leaves the layer
    'double()': (lambda m: m.double(), torch.float64), 'half()': (lambda m: m.half(), torch.float16), 'bfloat16()': (lambda m: m.bfloat16(), torch.bfloat16),
    'there and back': (lambda m: m.half().float(), torch.float32), 'type()': (lambda m: m.type(torch.float64), torch.float64),
    'inside a net': (lambda m: nn.Sequential(m).double()[0], torch.float64), 'loaded': (lambda m: put_back(m).double(), torch.float64),
    'channels_last': (lambda m: m.to(memory_format=torch.channels_last), torch.float32),
    'channels_last, double': (lambda m: m.to(torch.float64, memory_format=torch.channels_last), torch.float64),
    'share_memory()': (lambda m: m.share_memory(), torch.float32),
}

def put_back(m):
    m.load_state_dict(copy.deepcopy(m.state_dict()))
    return m

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('derived', DERIVED)
def test_derived_weights(derived, way):
    "A weight that is made from others follows a cast, as that of `nn.Conv2d` does, and R with it."
    move, dtype = WAYS[way]
    for name, train in itertools.product(CONVOLUTIONS, (True, False)):
        make, shape = LAYERS[name]
        torch.manual_seed(0)
        module, x = shaken(make()).train(train), draw((2, *shape), torch.float32)
        DERIVED[derived](module)(x)
        module.eval()                              # spectral norm iterates in training
        want = module(x)
        for _ in range(2):
            with torch.no_grad(): module(x)        # filters are kept
        module = move(module)
        got = module(x.to(dtype))
        assert got.dtype == module.R.dtype == dtype
        assert torch.equal(module.R, basis_operator(module.group, module.kernel_size, module.basis).to(dtype))
        coarse = dtype.itemsize < 4 or way == 'there and back'
        assert (got - want).norm() <= (.03 if coarse else 1e-5)*want.norm()
        got.float().square().sum().backward()


def lent(m): return lambda x: functional_call(m, {name: p.double() for name, p in m.named_parameters()}, x)

def with_weights_of_its_own(m):
    m.weight, m.bias = (None if p is None else nn.Parameter(p.detach().double()) for p in (m.weight, m.bias))
    return m

def with_data(m):
    for p in m.parameters(): p.data = p.data.double()
    return m

def assigned(m):
    m.load_state_dict({name: t.double() for name, t in m.state_dict().items()}, assign=True)
    return m

def built_without_memory(m):
    empty = copy.deepcopy(m).to('meta')
    empty.load_state_dict({name: t.double() for name, t in m.state_dict().items()}, assign=True)
    return empty

def through_meta(m):
    weights = copy.deepcopy(m.state_dict())
    m = m.to('meta').to_empty(device='cpu')
    m.load_state_dict(weights)
    return m.double()

def unparametrized(m):
    weight_norm(m.double())
    return remove_weight_norm(m.float().double())

def reparametrized(m):
    register_parametrization(m, 'weight', nn.Identity())
    return remove_parametrizations(m.double(), 'weight')

@pytest.mark.parametrize('change', [lent, with_weights_of_its_own, with_data, assigned, built_without_memory, through_meta, unparametrized, reparametrized])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_weights_of_another_precision(name, change):
    "Weights that come in float64, by whatever door, are used in float64, with an R as precise; for `filters()` that are kept, too."
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module, x = shaken(make()).eval(), draw((2, *shape))
    want = copy.deepcopy(module).double()(x)
    with torch.no_grad(): module(x.float())
    changed = change(module)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients): got = changed(x)
        tol = 1e-6 if change is unparametrized else 1e-10          # its weights went through float32
        assert (got - want).abs().max() <= tol*want.abs().max()


@pytest.mark.parametrize('name', [name for name in LAYERS if name not in ('dropout', 'transformer')])
def test_function_transforms(name):
    "`torch.func`'s gradients and `vmap`, in all layouts."
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module = shaken(make()).double().eval()
    weights = dict(module.named_parameters())
    for batch, layout in itertools.product((1, 2), LAYOUTS):
        x = draw((batch, *shape))
        with plain(): want = answers(module, x, train=False)
        y, pull = torch.func.vjp(lambda weights, x: functional_call(module, weights, (x,)), weights, layout(x))
        of_weights, of_input = pull(draw(y.shape, y.dtype, 1))
        grads = {'the input': of_input} | of_weights
        compare({'output': y} | {f'gradient of {n}': g for n, g in grads.items()} | dict(module.named_buffers()), want)
        for axis in (0, -1):
            both = torch.func.vmap(module, in_dims=axis)(torch.stack([layout(x), layout(x)], axis))
            compare({'output': both[1]}, {'output': want['output']})
