"What the chapter can't hold: what may stand in the way of folding, exports at every size, no package, a real compiler."
import io, json, shutil, subprocess, sys, warnings
from types import MethodType

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision.models import mobilenet_v2, resnet18

from book import ROOT
from gcnn_stn.data import mnist, normalize
from gcnn_stn.fold import fold
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.layer import Downsample2d, GlobalPool, GroupAvgPool2d, GroupBatchNorm, GroupConv2d
from gcnn_stn.layer import GroupDropout, GroupInstanceNorm, GroupLayerNorm, GroupMaxPool2d
from gcnn_stn.layer import GroupPool, LiftingConv2d
from gcnn_stn.model import CNN, GCNN, STCNN, published_gcnn, published_stcnn
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import SeparableGroupConv2d
from gcnn_stn.stn import AreaPool2d, LocalizationNet, SpatialTransformer
from gcnn_stn.subgroup import CosetPool, Restrict

BATCH = {0: torch.export.Dim('batch')}
C4 = CyclicGroup(4)


def hourglass():
    "The layers that no model of the book uses."
    return nn.Sequential(
        LiftingConv2d(1, 4, 5, C4), GroupInstanceNorm(4), nn.ReLU(), MaxBlurPool2d(),
        SeparableGroupConv2d(4, 4, 3, C4), GroupBatchNorm(4), nn.ReLU(), BlurPool2d(), Upsample2d(),
        GroupConv2d(4, 4, 3, C4), GlobalPool('mean', 'max'))


NETS = {
    'gcnn-c8': lambda: GCNN(CyclicGroup(8), (2, 3, 4)),
    'gcnn-d4': lambda: GCNN(DihedralGroup(4), (2, 3, 4)),
    'cnn': lambda: CNN((2, 3, 4)),
    'stcnn': lambda: STCNN((2, 3, 4)),
    'stcnn-affine': lambda: STCNN((2, 3, 4), transformation='affine'),
    'stcnn-similarity': lambda: STCNN((2, 3, 4), transformation='similarity'),
    'published-gcnn': lambda: published_gcnn(8, 2, 4),
    'published-stcnn': lambda: published_stcnn('single', 3, 4, 4, 'random'),
    'published-stcnn-multi': lambda: published_stcnn('multi', 3, 4, 4, 'random', 'affine'),
    'hourglass': hourglass,
}


@pytest.fixture(scope='module')
def digits(): return normalize(mnist(train=False)[0][:64])


def made(name):
    "A network with running statistics, in evaluation."
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad():
        for p in net.parameters(): p.add_(.1*torch.randn_like(p))
        net(torch.randn(16, 1, 28, 28))
    return net.eval()


def run(code, cwd):
    command = [sys.executable, '-W', 'ignore', '-c', code]
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def near(a, b): return a.shape == b.shape and ((a - b).norm()/b.norm()).item() < 1e-5


# What may stand in the way of folding

class Net(nn.Module):
    "Parts by their names, and what to do with them."
    def __init__(self, forward, **parts):
        super().__init__()
        self.way = forward
        for name, part in parts.items(): self.add_module(name, part)

    def forward(self, x): return self.way(self, x)


def lift(): return LiftingConv2d(1, 4, 3, C4, padding=1)
def conv(): return GroupConv2d(4, 4, 3, C4, padding=1)
def norm(): return GroupBatchNorm(4)
def pair(): return nn.Sequential(lift(), norm())
def plain(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
def whole(): return nn.Sequential(*pair(), nn.ReLU(), SeparableGroupConv2d(4, 4, 3, C4), GroupPool())


class Block(nn.Module):
    "A residual block that calls its parts in forward."
    def __init__(self, ins, outs, stride):
        super().__init__()
        options = dict(padding=1, bias=False)
        self.conv1, self.norm1 = GroupConv2d(ins, outs, 3, C4, stride=stride, **options), GroupBatchNorm(outs)
        self.conv2, self.norm2 = GroupConv2d(outs, outs, 3, C4, **options), GroupBatchNorm(outs)
        self.short = nn.Identity()
        if ins != outs or stride > 1:
            self.short = nn.Sequential(GroupConv2d(ins, outs, 1, C4, stride=stride), GroupBatchNorm(outs))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short(x))


class Asking(Block):
    def forward(self, x):
        if x.ndim != 5: raise ValueError(f"features are wanted, got {tuple(x.shape)}")
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if y.shape != x.shape: x = self.short(x)
        return F.relu(y + x)


class ResNet(nn.Module):
    "Twenty norms, as in a ResNet-18."
    def __init__(self, block):
        super().__init__()
        self.conv, self.norm = LiftingConv2d(1, 4, 3, C4, padding=1), norm()
        stages = ((4, 4, 1), (4, 6, 2), (6, 8, 2), (8, 10, 2))
        self.stages = nn.ModuleList(nn.Sequential(block(a, b, s), block(b, b, 1)) for a, b, s in stages)
        self.pool, self.fc = GlobalPool(), nn.Linear(10, 3)

    def forward(self, x, weights=None):
        if x.ndim != 4 or x.shape[1] != 1: raise ValueError(f"images are wanted, got {tuple(x.shape)}")
        assert x.shape[-1] > 8, f"too small: {tuple(x.shape)}"
        x = F.relu(self.norm(self.conv(x)))
        for stage in self.stages: x = stage(x)
        if weights is not None: x = x*weights
        return self.fc(self.pool(x))


class Skip(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


class Doubled(nn.Sequential):
    def forward(self, x): return 2*super().forward(x)


class Optional(nn.Module):
    "Its last argument decides whether the norm is heard."
    def __init__(self): super().__init__(); self.conv, self.norm = lift(), norm()
    def forward(self, x, raw=False):
        y = self.conv(x)
        return y if raw else self.norm(y)


class Kept(nn.Module):
    "Keeps what it sees."
    def __init__(self): super().__init__(); self.conv, self.norm = lift(), norm()
    def forward(self, x):
        self.seen = [self.conv(x)]
        return self.norm(self.seen[0])


class Tied(nn.Module):
    "Uses the weights of its convolution by another name."
    def __init__(self):
        super().__init__()
        self.weight = None
        self.conv, self.norm = plain()
        self.weight = self.conv.weight
    def forward(self, x): return self.norm(self.conv(x)) + F.conv2d(x, self.weight)


class Own(nn.Module):
    "Asks what it got."
    def __init__(self): super().__init__(); self.conv, self.norm = lift(), norm()
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y if isinstance(y, torch.Tensor) else self.norm(y)


class Awake(GroupBatchNorm):
    def train(self, mode=True): return super().train(True)


class Wakes(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].training = True
        return self


class Loud(GroupConv2d):
    def forward(self, x): return 2*super().forward(x)


class Inner(GroupConv2d):
    def _convolve(self, x, filters): return 2*super()._convolve(x, filters)


class OtherFilters(GroupConv2d):
    def filters(self): return 2*super().filters()


class LoudPool(GroupPool):
    def forward(self, x): return 2*super().forward(x)


class LoudNet(GCNN):
    def embed(self, x): return 2*super().embed(x)


class LoudSeparable(SeparableGroupConv2d):
    def forward(self, x): return 2*super().forward(x)


class Double(nn.Module):
    def forward(self, x): return 2*x


class Many(nn.Module):
    "More optional arguments than anybody could combine."
    def __init__(self): super().__init__(); self.conv, self.norm = lift(), norm()
    def forward(self, x, a=1, b=2, c=3, d=4, e=5, f=6, g=7, h=8, i=9, j=10, k=11, l=12, m=13, n=14, o=15, p=16,
                q=17, r=18, s=19, t=20, u=21, v=22, w=23, y=24, z=25): return self.norm(self.conv(x))


class Masked(nn.Module):
    "Its second argument may be None, and it asks."
    def __init__(self): super().__init__(); self.conv, self.norm = lift(), norm()
    def forward(self, x, mask):
        if mask is None: return self.conv(x)
        return self.norm(self.conv(x))*(mask if mask.sum() > 0 else 1)


def while_large(net, x):
    x = net.norm(net.conv(x))
    while x.abs().max() > 1: x = x/2
    return x


def in_place(net, x):
    y = net.conv(x)
    z = net.norm(y)
    y.add_(1)
    return y + z


def changed(net, change):
    change(net)
    return net


def at(path, name, bound=False):
    "A network with a method of one of its parts replaced by a function."
    net = whole()
    part = net.get_submodule(path)
    old = getattr(type(part), name)
    def new(self, *args): return old(self, *args)
    setattr(part, name, MethodType(new, part) if bound else lambda *args: new(part, *args))
    return net


def hooked(path, kind, net=whole):
    net = net()
    def hook(module, args, *out): return None if 'backward' in kind else 2*out[0] if out else (2*args[0],)
    getattr(net.get_submodule(path), f'register_{kind}_hook')(hook)
    return net


def shared(second):
    "A convolution and a norm in two places; `second`: what the second sequence shares."
    first = pair()
    other = nn.Sequential(*(a if i in second else b for i, (a, b) in enumerate(zip(first, pair()))))
    return Net(lambda m, x: m.a(x) + 2*m.b(x), a=first, b=other)


def derive(*changes):
    def make():
        net = whole()
        for path, name, change in changes: change(net.get_submodule(path), name)
        return net
    return make


def parametrized(layer, name): parametrize.register_parametrization(layer, name, Double())
def pruned(layer, name): prune.l1_unstructured(layer, name, amount=.5)


def both(net, x): return net.norm(net.conv(x))
def parts(): return dict(conv=lift(), norm=norm())
def flat(**kw): return dict(conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4))
PHOTO, LARGE = (3, 32, 32), (1, 33, 33)

EXACT = {   # how a network is made, the batch norms that are left in it, and its images
    'a sequence': (pair, 0),
    'three norms in a row': (lambda: nn.Sequential(*pair(), norm(), nn.Identity(), norm()), 0),
    'a ReLU between': (lambda: nn.Sequential(lift(), nn.ReLU(), norm()), 1),
    'dropout between': (lambda: nn.Sequential(lift(), GroupDropout(), norm()), 0),
    'called in forward': (lambda: Net(both, **parts()), 0),
    'ResNet-18': (resnet18, 0, PHOTO),
    'MobileNet': (mobilenet_v2, 0, PHOTO),
    'ResNet': (lambda: ResNet(Block), 0, LARGE),
    'ResNet of blocks that ask': (lambda: ResNet(Asking), 0, LARGE),
    'ModuleList': (lambda: Net(lambda m, x: m.steps[1](m.steps[0](x)), steps=nn.ModuleList(pair())), 0),
    'ModuleDict': (lambda: Net(lambda m, x: m.steps['n'](m.steps['c'](x)),
                               steps=nn.ModuleDict(dict(c=lift(), n=norm()))), 0),
    'a list': (lambda: changed(Net(lambda m, x: m.steps[1](m.conv(x)), **parts()),
                               lambda m: setattr(m, 'steps', [m.conv, m.norm])), 0),
    'items one by one': (lambda: Net(lambda m, x: m.s[1](m.s[0](x)).relu(), s=pair()), 0),
    'items one by one, and a skip': (lambda: Skip(lift(), norm()), 1),
    'an item as well': (lambda: Net(lambda m, x: m.s(x) + m.s[0](x), s=pair()), 1),
    'a sequence with its own forward': (lambda: Doubled(lift(), norm()), 0),
    'both twice': (lambda: Net(lambda m, x: m.norm(m.conv(m.norm(m.conv(m.lift(x))))),
                               lift=lift(), conv=conv(), norm=norm()), 0),
    'one convolution, two norms': (lambda: Net(lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x)),
                                               conv=lift(), a=norm(), b=norm()), 2),
    'one norm, two convolutions': (lambda: Net(lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)),
                                               a=lift(), b=lift(), norm=norm()), 1),
    'a convolution in two places': (lambda: shared([0]), 0),
    'a norm in two places': (lambda: shared([1]), 0),
    'a sequence in two places': (lambda: shared([0, 1]), 0),
    'a branch without the norm': (lambda: Net(lambda m, x: both(m, x) if len(x.unbind()) > 1 else m.conv(x),
                                              **parts()), 1),
    'a branch that nobody takes': (lambda: Net(lambda m, x: both(m, x) if x.shape[0] > 0 else m.conv(x),
                                               **parts()), 1),
    'both branches': (lambda: Net(lambda m, x: both(m, x)*(2 if x.mean() > 0 else 3), **parts()), 0),
    'an optional argument': (Optional, 1),
    'too many arguments': (Many, 1),
    'no argument': (lambda: Net(lambda m, x: m.part(x, None), part=Masked()), 1),
    'a tensor of its size': (lambda: Net(lambda m, x: both(m, x) + torch.zeros(x.shape[0], 1, 1, 1, 1), **parts()), 1),
    'a loop': (lambda: Net(while_large, **parts()), 1),
    'an int': (lambda: Net(lambda m, x: both(m, x)[..., :int(x.shape[2])], **parts()), 1),
    'an int in a part': (lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1),
                                               Net(lambda m, x: both(m, x)[..., :int(x.shape[2])], **parts())), 1),
    'a type': (Own, 1),
    'something kept': (Kept, 1),
    'a change in place': (lambda: Net(in_place, **parts()), 1),
    'weights that are read': (lambda: Net(lambda m, x: both(m, x)*m.conv.weight.mean(), **flat()), 1),
    'a norm that is read': (lambda: Net(lambda m, x: both(m, x)*m.norm.weight.mean(), **flat()), 1),
    'weights with two names': (Tied, 1),
    'the batch unfolded': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Unflatten(0, (1, -1)), nn.BatchNorm3d(2)), 1),
    'the height unfolded': (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Unflatten(2, (7, 1)), nn.BatchNorm3d(4)), 1),
    'the channels unfolded': (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Unflatten(1, (-1, 2)), nn.BatchNorm3d(4)), 0),
    'poses as channels': (lambda: Net(lambda m, x: m.norm(m.conv(x).flatten(1, 2)), conv=lift(), norm=nn.BatchNorm2d(16)), 0),
    'poses and channels exchanged': (lambda: Net(lambda m, x: m.norm(m.conv(x).transpose(1, 2)), **parts()), 1),
    'no running statistics': (lambda: nn.Sequential(lift(), GroupBatchNorm(4, track_running_stats=False)), 1),
    'statistics switched off': (lambda: changed(pair(), lambda m: setattr(m[1], 'track_running_stats', False)), 0),
    'statistics taken away': (lambda: changed(pair(), lambda m: vars(m[1])['_buffers'].update(running_mean=None, running_var=None)), 1),
    'a norm of torch in training': (lambda: Wakes(*plain()), 1),
    'SyncBatchNorm': (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(pair()), 0),
    'data parallel': (lambda: nn.DataParallel(pair()), 0),
    'data parallel inside': (lambda: nn.Sequential(nn.DataParallel(pair()), nn.ReLU()), 0),
    'compiled inside': (lambda: nn.Sequential(torch.compile(pair(), backend='eager'), nn.ReLU()), 0),
    'wrapped three times': (lambda: torch.compile(nn.DataParallel(torch.compile(pair(), backend='eager')), backend='eager'), 0),
    'compiled in place': (lambda: changed(pair(), lambda m: m.compile(backend='eager')), 0),
    'scripted inside': (lambda: nn.Sequential(torch.jit.script(nn.Conv2d(1, 1, 3)), *pair()), 0),
    'a graph inside': (lambda: nn.Sequential(torch.fx.symbolic_trace(plain()), nn.Conv2d(4, 1, 1), *pair()), 0),
    'parts exchanged': (lambda: changed(whole(), lambda m: setattr(m[3], 'mix', nn.Sequential(conv(), norm()))), 0),
    'pruned': (derive(('0', 'weight', pruned), ('0', 'bias', pruned), ('1', 'weight', pruned), ('3.mix', 'weight', pruned)), 0),
    'pruned twice': (derive(('0', 'weight', pruned), ('0', 'weight', pruned)), 0),
    'a pruned convolution of torch': (lambda: changed(plain(), lambda m: pruned(m[0], 'weight')), 1),
    'weight norm': (derive(('0', 'weight', parametrizations.weight_norm), ('3.mix', 'weight', weight_norm)), 0),
    'spectral norm': (derive(('0', 'weight', parametrizations.spectral_norm), ('3.mix', 'weight', spectral_norm)), 0),
    'parametrized': (derive(('0', 'weight', parametrized), ('0', 'weight', parametrized), ('1', 'bias', parametrized),
                            ('1', 'running_mean', parametrized), ('3.spatial', 'bias', parametrized)), 0),
    'other filters': (lambda: nn.Sequential(lift(), OtherFilters(4, 4, 3, C4), norm()), 0),
    'a pooling of your own': (lambda: nn.Sequential(*pair(), LoudPool()), 0),
    'a network of your own': (lambda: LoudNet(C4, (2, 3, 4)), 3, (1, 28, 28)),
    'parts of your own': (lambda: nn.Sequential(lift(), LoudSeparable(4, 4, 3, C4)), 0),
    'a method bound to a part': (lambda: at('2', 'forward', bound=True), 0),
    'a hook on the network': (lambda: hooked('', 'forward', plain), 1),
    'a hook on a convolution': (lambda: hooked('0', 'forward', plain), 1),
    'a hook on a norm': (lambda: hooked('1', 'forward_pre', plain), 1),
    'a hook elsewhere': (lambda: hooked('2', 'forward'), 0),
    'a transformer of your own': (lambda: SpatialTransformer(nn.Sequential(
        *plain(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.Unflatten(-1, (2, 3)))), 0),
}


def lively(net):
    "In evaluation, with statistics that do something."
    for m in net.modules():
        for name in ('running_mean', 'running_var'):
            if isinstance(getattr(m, name, None), torch.Tensor): getattr(m, name).data.uniform_(.5, 1.5)
    return net.eval()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', EXACT)
def test_same_function(name):
    "The same function, made of torch's classes and the user's, with as many batch norms left as must be."
    make, left, *shape = EXACT[name]
    torch.manual_seed(0)
    net = lively(make())
    x = torch.randn(2, *(shape[0] if shape else (1, 9, 10)))
    state, dice = [t.clone() for t in net.state_dict().values()], torch.get_rng_state()
    folded = fold(net)
    assert torch.equal(dice, torch.get_rng_state()) and all(map(torch.equal, state, net.state_dict().values()))
    with torch.no_grad(): assert near(folded(x), net(x))
    kinds = [type(m) for m in folded.modules()]
    assert not any(kind.__module__.startswith('gcnn_stn') for kind in kinds)
    assert sum(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds) == left


PLACES = ('0', '1', '3', '3.mix', '3.spatial', '4')
KINDS = ('forward', 'forward_pre', 'full_backward', 'full_backward_pre')
REFUSED = {   # how a network is made, and the part that the error names
    **{f'forward of {p}': (lambda p=p: at(p, 'forward'), f'got {p} ') for p in (*PLACES, '2')},
    **{f'forward bound to {p}': (lambda p=p: at(p, 'forward', bound=True), f'got {p} ') for p in PLACES},
    **{f'{f} of {p}': (lambda p=p, f=f: at(p, f), f'got {p} ') for p in ('0', '3.mix', '3.spatial')
       for f in ('filters', 'cached_filters', '_convolve', 'train', 'eval')},
    **{f'a {kind} hook on {p}': (lambda p=p, kind=kind: hooked(p, kind), f'got {p} ') for p in PLACES for kind in KINDS},
    'forward of the network': (lambda: changed(pair(), lambda m: setattr(m, 'forward', lambda x: x)), 'got the model '),
    'embed of a network': (lambda: changed(GCNN(C4, (2, 3, 4)), lambda m: setattr(m, 'embed', lambda x: x)), 'got the model '),
    'a subclass': (lambda: nn.Sequential(lift(), Loud(4, 4, 3, C4)), 'got 1 (Loud) with another forward'),
    'a subclass, inside': (lambda: nn.Sequential(lift(), Inner(4, 4, 3, C4)), 'got 1 (Inner) with another _convolve'),
    'a norm that stays in training': (lambda: nn.Sequential(lift(), Awake(4)), 'got 1 (Awake), which stays in training'),
    'a norm that is kept in training': (lambda: Wakes(lift(), norm()), 'got 1 (GroupBatchNorm), which stays in training'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    "What can't be known is refused by the name of the part, and the model is left as it was."
    make, part = REFUSED[name]
    net = make().train()
    with pytest.raises(ValueError) as error: fold(net)
    assert part in str(error.value)
    assert all(m.training for m in net.modules())


def test_hooks_everywhere():
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        with pytest.raises(ValueError, match='hooks on all modules'): fold(pair())
    finally: handle.remove()


def test_original_stays_parametrized():
    net = lift()
    parametrized(net, 'weight')
    fold(net)
    assert parametrize.is_parametrized(net) and net.eval()(torch.zeros(1, 1, 9, 9)).shape[1] == 4


# Exports

def onnx_file(net, x, **kwargs):
    for module in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(module, reason="needs pip install 'gcnn_stn[onnx]'")
    file = io.BytesIO()
    program = torch.onnx.export(net, (x,), *([] if kwargs['dynamo'] else [file]), verbose=False, **kwargs)
    if kwargs['dynamo']: program.save(file)
    return file.getvalue()


def in_onnxruntime(content):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4       # shapes of the traced example are only a hint
    session = onnxruntime.InferenceSession(content, options)
    def answers(x): return [*map(torch.from_numpy, session.run(None, {session.get_inputs()[0].name: x.numpy()}))]
    return lambda x: answers(x)[0] if len(session.get_outputs()) == 1 else answers(x)


@pytest.mark.parametrize('name', NETS)
def test_onnx(name, digits):
    "Exported with four digits, run in onnxruntime on one and on 64."
    net = made(name)
    f = in_onnxruntime(onnx_file(fold(net), digits[:4], dynamic_shapes=(BATCH,), dynamo=True))
    for x in (digits, digits[:1]):
        with torch.no_grad(): assert near(f(x), net(x))


def free(shape, name='d'): return {i: f'{name}{i}' for i in (0, len(shape) - 2, len(shape) - 1)}


def by_dims(net, x):
    dims = {i: torch.export.Dim(name, min=2 if i == 0 else 28) for i, name in free(x.shape).items()}
    return in_onnxruntime(onnx_file(net, x, dynamic_shapes=(dims,), dynamo=True))


def by_axes(net, x):
    names = dict(input_names=['x'], output_names=['y'], dynamic_axes={'x': free(x.shape)})
    return in_onnxruntime(onnx_file(net, x, dynamo=True, **names))


def by_torchscript(net, x):
    names = dict(input_names=['x'], output_names=['y'], dynamic_axes={'x': free(x.shape)})
    return in_onnxruntime(onnx_file(net, x, dynamo=False, **names))


def by_export(net, x):
    dims = dict.fromkeys(free(x.shape), torch.export.Dim.AUTO)
    return torch.export.export(net, (x,), dynamic_shapes=(dims,)).module()


def by_trace(net, x): return torch.jit.trace(net, x, check_trace=False)


WAYS = dict(onnx=by_dims, onnx_axes=by_axes, onnx_torchscript=by_torchscript, export=by_export, trace=by_trace)
FEATURES = {   # layers of features (B, 4, 4, H, W)
    'downsample': Downsample2d(), 'blur': BlurPool2d(), 'blur 3': BlurPool2d(3), 'max blur': MaxBlurPool2d(),
    'max blur 4': MaxBlurPool2d(4), 'upsample': Upsample2d(), 'nearest': Upsample2d(3, 'nearest'),
    'max pool': GroupMaxPool2d(3, 2), 'average pool': GroupAvgPool2d(2), 'pose pool': GroupPool(),
    'global pool': GlobalPool(), 'coset pool': CosetPool(C4, (0, 2)), 'restriction': Restrict(C4, (0, 2)),
    'convolution': conv(), 'separable': SeparableGroupConv2d(4, 4, 3, C4, stride=2, padding=1),
    'layer norm': GroupLayerNorm(4), 'batch norm': norm(),
    'twice': nn.Sequential(Downsample2d(), conv(), Downsample2d(), GlobalPool()),
    'all ways down': nn.Sequential(MaxBlurPool2d(), BlurPool2d(3), conv(), Downsample2d(), GlobalPool())}
IMAGES = {     # layers of images (B, 4, H, W)
    'downsample': Downsample2d(), 'blur': BlurPool2d(), 'max blur': MaxBlurPool2d(3), 'upsample': Upsample2d(),
    'global pool': GlobalPool('max'), 'area pool': AreaPool2d(4), 'area pool 3': AreaPool2d(3),
    'localization': LocalizationNet(4, 2), 'transformer': SpatialTransformer(LocalizationNet(4, 2)),
    'zooming transformer': SpatialTransformer(LocalizationNet(4, 2, 'similarity'), size=9, zoom=1.5),
    'lifting': LiftingConv2d(4, 4, 3, C4)}
SIZES = ((2, 36, 36), (3, 29, 29), (5, 31, 34), (1, 40, 33))     # (B, H, W); exported with (3, 32, 34)


class Side(nn.ModuleDict):
    "All layers beside each other."
    def forward(self, x): return tuple(layer(x) for layer in self.values())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('folded, way', [*((False, way) for way in WAYS), *((True, way) for way in WAYS if way != 'onnx_axes')])
@pytest.mark.parametrize('layers, shape', ((FEATURES, (4, 4)), (IMAGES, (4,))), ids=('features', 'images'))
def test_layers_at_every_size(layers, shape, folded, way):
    "Batch, height and width are free: right at even and odd sizes."
    side = Side(layers).eval().requires_grad_(False)
    f = WAYS[way](fold(side) if folded else side, torch.randn(3, *shape, 32, 34))
    for batch, *size in SIZES:
        x = torch.randn(batch, *shape, *size)
        for name, got, want in zip(layers, f(x), side(x)): assert near(got, want), f'{name} at {batch, *size}'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name, folded, way', [
    *(('gcnn-c8', folded, way) for folded in (False, True) for way in WAYS),
    *((name, True, way) for name in ('stcnn', 'published-stcnn', 'published-gcnn') for way in ('onnx', 'onnx_torchscript'))])
def test_network_at_every_size(name, folded, way):
    "The same for networks; an exported program may refuse sizes that leave one pixel somewhere."
    net = made(name).requires_grad_(False)
    f = WAYS[way](fold(net) if folded else net, torch.randn(3, 1, 32, 34))
    for size in SIZES:
        x = torch.randn(size)[:, None]
        try: got = f(x)
        except AssertionError: assert way == 'export' and min(size[1:]) < 32
        else: assert near(got, net(x)), f'{size}'


WITHOUT = """import sys; sys.modules['gcnn_stn'] = None
import torch
x, y = torch.load('data.pt')
programs = torch.export.load('net.pt2').module(), torch.jit.load('net.ts')
for f in (*programs, torch.load('net.pt', weights_only=False)):
    with torch.no_grad(): assert ((f(x) - y).norm()/y.norm()).item() < 1e-5
try: import gcnn_stn.layer
except ImportError: print('it is not there')"""


@pytest.mark.filterwarnings('ignore')   # tracing is deprecated, and checks of shapes are traced away
@pytest.mark.parametrize('name', NETS)
def test_without_this_package(name, digits, tmp_path):
    "A fresh interpreter that can't import gcnn_stn runs the exported program, the traced one and the pickled network."
    net = made(name)
    folded = fold(net)
    torch.export.save(torch.export.export(folded, (digits[:4],), dynamic_shapes=(BATCH,)), tmp_path/'net.pt2')
    torch.jit.trace(folded, (digits[:4],)).save(tmp_path/'net.ts')
    torch.save(folded, tmp_path/'net.pt')
    with torch.no_grad(): torch.save((digits, net(digits)), tmp_path/'data.pt')
    done = run(WITHOUT, tmp_path)
    assert 'it is not there' in done.stdout, done.stdout


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_inductor(digits):
    net = made('gcnn-c8')
    with torch.no_grad(): assert near(torch.compile(fold(net), fullgraph=True)(digits), net(digits))


def test_ten_lines(tmp_path):
    "The chapter's ten lines are ten, and run in an empty folder."
    cells = json.loads((ROOT/'nbs'/'networks/fold.ipynb').read_text())['cells']
    code, = [''.join(c['source']) for c in cells if c['cell_type'] == 'code' and 'program = torch.export.export(fold(net)' in ''.join(c['source'])]
    assert len([line for line in code.split('\n') if line.strip() and not line.startswith('#|')]) == 10
    done = run(code + "\nassert program.module()(x[:3]).shape == (3, 10)\nprint('ran')", tmp_path)
    assert done.stdout.endswith('ran\n'), done.stdout
