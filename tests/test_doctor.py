"Whom the doctor names, and with which cause; and that it finds no fault where there is none."
import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models import DenseNet

from gcnn_stn.doctor import diagnose
from gcnn_stn.equivariance import smooth_images
from gcnn_stn.fold import fold
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.layer import GlobalPool, GroupBatchNorm, GroupConv2d, GroupMaxPool2d, LiftingConv2d
from gcnn_stn.model import CNN, GCNN
from gcnn_stn.sampling import Upsample2d

C4, C5, C8, D4 = CyclicGroup(4), CyclicGroup(5), CyclicGroup(8), DihedralGroup(4)
GROUPS = dict(C4=C4, C8=C8, C5=C5, D4=D4)
DEPTHS = 'early', 'middle', 'late'
SIDES = dict(early=19, middle=17, late=15)               # of the maps there


def chain(**layers):
    return nn.Sequential(OrderedDict(layers))


def network(group, c=3, **replaced):
    "A sound one with three places where a part can be put in."
    layers = dict(
        lift=LiftingConv2d(1, c, 5, group, padding=2), norm=GroupBatchNorm(c), relu=nn.ReLU(), early=nn.Identity(),
        conv=GroupConv2d(c, c, 3, group), relu2=nn.ReLU(), middle=nn.Identity(),
        conv2=GroupConv2d(c, c, 3, group), relu3=nn.ReLU(), late=nn.Identity(),
        read=GlobalPool(), linear=nn.Linear(c, 5))
    return lively(chain(**layers | replaced))


def lively(model):
    "Statistics and affine parameters as training leaves them: not all alike."
    gen = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)):
            for t in [*m.parameters(), *m.buffers()]:
                if t.is_floating_point():
                    nn.init.uniform_(t, .5, 1.5, generator=gen)
    return model.eval()


class Does(nn.Module):
    "A module whose code is a function."
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Folded(nn.Module):
    "Runs a layer for plain images on features whose poses are put into the channels."
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(1, 2)).unflatten(1, (-1, x.shape[2]))


class OneCopyOff(GroupConv2d):
    "The filters of pose 1 are a little off."
    def __init__(self, *args, by=1e-3, **kwargs):
        super().__init__(*args, **kwargs)
        self.by = by

    def filters(self):
        bank = super().filters().unflatten(0, (-1, self.group.order)).clone()
        bank[:, 1] += self.by*torch.randn(bank[:, 1].shape, generator=torch.Generator().manual_seed(0)).to(bank)
        return bank.flatten(0, 1)

    def forward(self, x):
        return self._convolve(x.flatten(1, 2), self.filters())


class Own(nn.Module):
    "A convolution block written with functions only."
    def __init__(self, n):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(n, n, 3, 3)/(3*n**.5)), nn.Parameter(torch.randn(n))

    def forward(self, x):
        y = F.conv2d(x.flatten(1, 2), self.w, self.b, padding=1)
        return F.silu(y).unflatten(1, x.shape[1:3])


def scaled(x, by):
    "Pose 1 is multiplied."
    return torch.cat([x[:, :, :1], by*x[:, :, 1:2], x[:, :, 2:]], 2)


def added(x, by):
    "Something is added to pose 1."
    return torch.cat([x[:, :, :1], x[:, :, 1:2] + by, x[:, :, 2:]], 2)


def ramp(x, by):
    return x*(1 + by*torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype))


def shelved(x):
    return x.transpose(1, 2).reshape(x.shape)


def half_mixed(x):
    "A sound norm, then a little of a lopsided convolution."
    y = F.layer_norm(x, x.shape[1:])
    return y + 1e-3*y.roll(1, -1)


# name: a layer for c channels, a group and maps of n pixels; the cause; where in it the fault is made
FAULTS = {
    'plain convolution':       (lambda c, G, n: Folded(nn.Conv2d(c*G, c*G, 3, padding=1)), 'kernel', '.inner'),
    'plain 1×1 convolution':   (lambda c, G, n: Folded(nn.Conv2d(c*G, c*G, 1)), 'kernel', '.inner'),
    'depthwise convolution':   (lambda c, G, n: Folded(nn.Conv2d(c*G, c*G, 3, padding=1, groups=c*G)), 'kernel', '.inner'),
    'batch norm':              (lambda c, G, n: Folded(nn.BatchNorm2d(c*G)), 'norm', '.inner'),
    'group norm':              (lambda c, G, n: Folded(nn.GroupNorm(c, c*G)), 'norm', '.inner'),
    'instance norm':           (lambda c, G, n: Folded(nn.InstanceNorm2d(c*G, affine=True)), 'norm', '.inner'),
    'layer norm':              (lambda c, G, n: Folded(nn.LayerNorm((c*G, n, n))), 'norm', '.inner'),
    'layer norm over rows':    (lambda c, G, n: Does(lambda x: F.layer_norm(x, x.shape[-1:])), 'norm', ''),
    'a pose multiplied':       (lambda c, G, n: Does(lambda x: scaled(x, 1.5)), 'norm', ''),
    'a pose multiplied, 1e-3': (lambda c, G, n: Does(lambda x: scaled(x, 1.001)), 'norm', ''),
    'a bias per pose':         (lambda c, G, n: Does(lambda x: added(x, .3)), 'bias', ''),
    'a bias per pose, 1e-3':   (lambda c, G, n: Does(lambda x: added(x, 1e-3)), 'bias', ''),
    'a curve for one pose':    (lambda c, G, n: Does(lambda x: torch.cat([x[:, :, :1].tanh(), x[:, :, 1:]], 2)), 'non-linearity', ''),
    'dropout left on':         (lambda c, G, n: Does(lambda x: F.dropout(x, .1)), 'randomness', ''),
    'noise, 1e-3':             (lambda c, G, n: Does(lambda x: x + 1e-3*torch.randn_like(x)), 'randomness', ''),
    'noise for each image':    (lambda c, G, n: Does(lambda x: x*(1 + torch.rand(()))), 'randomness', ''),
    'poses backwards':         (lambda c, G, n: Does(lambda x: x.flip(2)), 'pose order', ''),
    'put away as (G, C)':      (lambda c, G, n: Does(shelved), 'pose order', ''),
    'against the first pose':  (lambda c, G, n: Does(lambda x: x - .5*x[:, :, :1]), 'kernel', ''),
    'a ramp':                  (lambda c, G, n: Does(lambda x: ramp(x, .5)), 'position', ''),
    'a ramp, 1e-3':            (lambda c, G, n: Does(lambda x: ramp(x, 1e-3)), 'position', ''),
    'a map added':             (lambda c, G, n: Does(lambda x: x + torch.linspace(0, 1, n*n).reshape(n, n).to(x)), 'position', ''),
    'a pixel to the right':    (lambda c, G, n: Does(lambda x: x.roll(1, -1)), 'position', ''),
    'mirrored':                (lambda c, G, n: Does(lambda x: x.flip(-1)), 'position', ''),
    'padded on one side':      (lambda c, G, n: Does(lambda x: F.pad(x, (1, 0, 1, 0))), 'border', ''),
    'rows averaged':           (lambda c, G, n: Folded(nn.AvgPool2d((1, 3), 1, (0, 1))), 'kernel', '.inner'),
    'functions only':          (lambda c, G, n: Own(c*G), 'kernel', ''),
    'a sound norm and 1e-3':   (lambda c, G, n: Does(half_mixed), 'kernel', ''),
}
# Where nothing is exact, what is smaller than interpolation's own error can't be seen.
BELOW_THE_FLOOR = 'a ramp, 1e-3', 'rows averaged', 'a sound norm and 1e-3'


def guilty(model, group, x=None, **options):
    return diagnose(model, group, smooth_images(1, 19) if x is None else x, **options).guilty


@pytest.mark.parametrize('name', GROUPS)
@pytest.mark.parametrize('fault', FAULTS)
def test_fault(fault, name):
    "One fault among sound layers: early, in the middle or late."
    make, cause, where = FAULTS[fault]
    group = GROUPS[name]
    depth = DEPTHS[(list(FAULTS).index(fault) + list(GROUPS).index(name)) % 3]
    torch.manual_seed(0)
    sick = network(group, **{depth: make(3, group.order, SIDES[depth])})
    unseen = name == 'C5' and fault in BELOW_THE_FLOOR
    assert guilty(sick, group) == ({} if unseen else {depth + where: cause})


# As many channels as poses, where a wrong order still fits.
SQUARE = {
    'none':              (lambda n: nn.Identity(), None, ''),
    'plain convolution': (lambda n: Folded(nn.Conv2d(n, n, 3, padding=1)), 'kernel', '.inner'),
    'batch norm':        (lambda n: Folded(nn.BatchNorm2d(n)), 'norm', '.inner'),
    'group norm':        (lambda n: Folded(nn.GroupNorm(2, n)), 'norm', '.inner'),
    'wrong reshape':     (lambda n: Does(shelved), 'pose order', ''),
    'transposed':        (lambda n: Does(lambda x: x.transpose(1, 2)), 'pose order', ''),
}


@pytest.mark.parametrize('group', [C4, D4], ids=str)
@pytest.mark.parametrize('fault', SQUARE)
def test_as_many_channels_as_poses(fault, group):
    make, cause, where = SQUARE[fault]
    torch.manual_seed(0)
    sick = network(group, group.order, middle=make(group.order**2))
    assert guilty(sick, group) == ({'middle' + where: cause} if cause else {})


CHANCE = {
    'dropout': lambda x: F.dropout(x, .1),
    'noise':   lambda x: x + 1e-3*torch.randn_like(x),
    'Python':  lambda x: x*(1 + random.random()),
    'NumPy':   lambda x: x + float(np.random.rand()),
}


@pytest.mark.parametrize('n', [3, 5, 7, 9])
@pytest.mark.parametrize('kind', CHANCE)
def test_randomness_without_a_lattice(kind, n):
    sick = network(CyclicGroup(n), 2, middle=Does(CHANCE[kind]))
    assert guilty(sick, CyclicGroup(n)) == {'middle': 'randomness'}


def even_poses(f):
    "f for the odd poses of C8, nothing for the even: quarter turns don't mind."
    return Does(lambda x: torch.stack([f(u) if h % 2 else u for h, u in enumerate(x.unbind(2))], 2))


def central(x):
    "A square in the middle: quarter turns don't mind."
    n = x.shape[-1]
    return F.pad(x[..., n//4:n - n//4, n//4:n - n//4], (n//4,)*4)


class Pairs(GroupConv2d):
    "Pose 1 gets the answer of pose 0, and so on."
    def forward(self, x):
        return super().forward(x)[:, :, [0, 0, 2, 2, 4, 4, 6, 6]]


HALF = {   # exact at quarter turns, wrong at 45°: what replaces what, and the cause
    'filters':  (dict(conv=lambda: Pairs(3, 3, 3, C8)), 'kernel'),
    'bias':     (dict(middle=lambda: even_poses(lambda u: u + .3)), 'bias'),
    'scale':    (dict(middle=lambda: even_poses(lambda u: 1.3*u)), 'norm'),
    'a little': (dict(middle=lambda: even_poses(lambda u: 1.001*u)), 'norm'),
    'curve':    (dict(middle=lambda: even_poses(torch.tanh)), 'non-linearity'),
    'swapped':  (dict(middle=lambda: Does(lambda x: x[:, :, [0, 3, 2, 5, 4, 7, 6, 1]])), 'pose order'),
    'read-out': (dict(read=lambda: Does(lambda x: x[:, :, ::2].mean((2, 3, 4)))), 'read-out'),
    'window':   (dict(middle=lambda: Does(central)), 'position'),
    'blocks':   (dict(middle=lambda: Upsample2d(mode='nearest')), 'resampling'),
    'bilinear': (dict(conv=lambda: GroupConv2d(3, 3, 3, C8, basis='bilinear')), 'kernel sampling'),
}


@pytest.mark.parametrize('fault', HALF)
def test_exact_at_lattice_turns_only(fault):
    replaced, cause = HALF[fault]
    [(where, make)] = replaced.items()
    torch.manual_seed(0)
    assert guilty(network(C8, **{where: make()}), C8) == {where: cause}


@pytest.mark.parametrize('group', [C4, D4], ids=str)
def test_one_copy_a_thousandth_off(group):
    torch.manual_seed(0)
    assert guilty(network(group, conv=OneCopyOff(3, 3, 3, group)), group) == {'conv': 'kernel'}


class Arrows(nn.Module):
    "The first moment over the poses: (B, C, G, …) → (B, C, 2, …)."
    def __init__(self, group):
        super().__init__()
        self.register_buffer('ends', group.matrices[:, :, 0].float())

    def forward(self, x):
        return torch.einsum('bcg...,gi->bci...', x, self.ends)


def pointing(group, *more, middle=None):
    "A network whose answer is an arrow."
    middle = middle or nn.Identity()
    return nn.Sequential(OrderedDict(
        lift=LiftingConv2d(1, 3, 5, group, padding=2), relu=nn.ReLU(), middle=middle,
        conv=GroupConv2d(3, 3, 3, group), mean=Does(lambda x: x.mean((3, 4))), arrow=Arrows(group),
        **{str(i): m for i, m in enumerate(more)}))


VECTORS = {
    'C4':       (lambda: pointing(C4), C4),
    'C8':       (lambda: pointing(C8), C8),
    'C5':       (lambda: pointing(C5), C5),
    'flat':     (lambda: pointing(C8, nn.Flatten()), C8),
    'mirrored': (lambda: pointing(D4), D4),
    'a field':  (lambda: nn.Sequential(LiftingConv2d(1, 3, 5, C8), nn.ReLU(), Arrows(C8)), C8),
}


@pytest.mark.parametrize('name', VECTORS)
def test_vectors(name):
    "An arrow that turns with the picture is sound, if it is said to be one."
    make, group = VECTORS[name]
    torch.manual_seed(0)
    assert guilty(make(), group, output='vector') == {}


def test_sick_vectors():
    torch.manual_seed(0)
    sick = pointing(C4, middle=Folded(nn.Conv2d(12, 12, 3, padding=1)))
    assert guilty(sick, C4, output='vector') == {'middle.inner': 'kernel'}
    assert 'read-out' in guilty(pointing(C4, nn.Flatten()), C4).values()      # not said
    with pytest.raises(ValueError, match='vectors are'):
        diagnose(network(C4), C4, smooth_images(1, 19), output='vector')
    with pytest.raises(ValueError, match="'vector'"):
        diagnose(network(C4), C4, smooth_images(1, 19), output='arrow')


class Saving(nn.Module):
    "Recomputes its inner module for the gradients."
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class SavingSequence(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint_sequential(self.inner, 2, x, use_reentrant=False)


class Passing(nn.Module):
    "Its parts hand on something that holds the features."
    def __init__(self, inner, wrap, pick):
        super().__init__()
        self.inner, self.pick = Wrapping(inner, wrap), pick

    def forward(self, x):
        return self.pick(self.inner(x))


class Wrapping(nn.Module):
    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


class Without(nn.Module):
    "Switches gradients off."
    def __init__(self, inner, context):
        super().__init__()
        self.inner, self.context = inner, context

    def forward(self, x):
        with self.context():
            return self.inner(x)


class Again(nn.Module):
    "A ReLU in place, on something that is used again."
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        h = self.inner(x)
        return F.relu_(h) + h


@dataclass(frozen=True)
class Out:
    h: torch.Tensor
    aux: object = None


Pair = namedtuple('Pair', 'h aux')


def compiled(model):
    return torch.compile(model, backend='eager')


def compiled_in_place(model):
    model.compile(backend='eager')
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend='eager')
    return model


WRAPPERS = {
    'recomputed':           lambda b: Saving(b, False),
    'recomputed, reentrant': lambda b: Saving(b, True),
    'a recomputed sequence': SavingSequence,
    'compiled':             compiled,
    'compiled in place':    compiled_in_place,
    'a compiled forward':   compiled_forward,
    'data parallel':        nn.DataParallel,
    'both':                 lambda b: compiled(nn.DataParallel(b)),
    'a dict':               lambda b: Passing(b, lambda h: OrderedDict(out=h, n=None), lambda o: o['out']),
    'a dataclass':          lambda b: Passing(b, Out, lambda o: o.h),
    'a named tuple':        lambda b: Passing(b, lambda h: Pair(h, 3), lambda o: o.h),
    'no_grad':              lambda b: Without(b, torch.no_grad),
    'inference_mode':       lambda b: Without(b, torch.inference_mode),
    'in place':             Again,
}


def block(*more):
    return nn.Sequential(OrderedDict(
        conv=GroupConv2d(3, 3, 3, C4, padding=1), relu=nn.ReLU(), sick=nn.Sequential(*more)))


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize('name', WRAPPERS)
def test_wrapped(name):
    "A block in a network, sound and sick, in training mode and left as it was."
    torch.manual_seed(0)
    for inner, found in ((), []), ((Folded(nn.Conv2d(12, 12, 3, padding=1)),), ['kernel']):
        model = network(C4, middle=WRAPPERS[name](block(*inner))).train()
        state = torch.get_rng_state()
        assert list(guilty(model, C4).values()) == found
        assert torch.equal(torch.get_rng_state(), state)
        assert all(m.training and not m._forward_hooks for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize('name', ['compiled', 'data parallel', 'both'])
def test_whole_model_wrapped(name):
    torch.manual_seed(0)
    sick = network(C4, middle=Folded(nn.Conv2d(12, 12, 3, padding=1)))
    assert guilty(WRAPPERS[name](sick), C4) == {'middle.inner': 'kernel'}
    assert guilty(WRAPPERS[name](network(C4)), C4) == {}


def test_dense_network():
    "Every plain convolution of torchvision's, with and without saving memory; nothing else."
    found = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = DenseNet(4, (2, 1), 8, memory_efficient=saving)
        found.append(guilty(model, C4, smooth_images(1, 33, 3)))
    assert found[0] == found[1]
    kernels = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size > (1, 1)}
    assert {n for n, cause in found[0].items() if cause == 'kernel'} == kernels


class Residual(nn.Module):
    "As in a ResNet, with ReLUs in place."
    def __init__(self, group, c=3):
        super().__init__()
        self.a = GroupConv2d(c, c, 3, group, padding=1)
        self.b = GroupConv2d(c, c, 3, group, padding=1)
        self.norm = GroupBatchNorm(c)

    def forward(self, x):
        h = self.norm(self.b(F.relu(self.a(x), inplace=True)))
        h += x
        return F.relu_(h)


class ChannelsLast(nn.Module):
    "Norm and dense layers with the channels at the end."
    def __init__(self, group, c=3):
        super().__init__()
        self.conv = GroupConv2d(c, c, 3, group, padding=1)
        self.norm, self.wide, self.back = nn.LayerNorm(c), nn.Linear(c, 2*c), nn.Linear(2*c, c)

    def forward(self, x):
        h = self.norm(self.conv(x).permute(0, 2, 3, 4, 1))
        return x + self.back(F.gelu(self.wide(h))).permute(0, 4, 1, 2, 3)


class Attention(nn.Module):
    "All poses and places attend to each other."
    def __init__(self, c=3):
        super().__init__()
        self.pool, self.qkv, self.out = nn.MaxPool3d((1, 3, 3), (1, 2, 2)), nn.Linear(c, 3*c), nn.Linear(c, c)

    def forward(self, x):
        x = self.pool(x)
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, -1)
        weights = (q @ k.mT/x.shape[1]**.5).softmax(-1)
        return self.out(weights @ v).mT.reshape(x.shape)


def poses_last():
    return nn.Sequential(
        LiftingConv2d(1, 4, 5, C4, padding=2), Does(lambda x: x.transpose(1, 2).flatten(1, 2)),
        nn.ReLU(), nn.MaxPool2d(3, 2), Does(lambda x: x.unflatten(1, (4, 4)).transpose(1, 2)),
        GroupConv2d(4, 4, 3, C4), GlobalPool())


def poses_in_batch():
    return nn.Sequential(
        LiftingConv2d(1, 3, 5, C4, padding=2), Does(lambda x: x.transpose(1, 2).flatten(0, 1)),
        nn.MaxPool2d(3, 2), nn.BatchNorm2d(3), Does(lambda x: x.unflatten(0, (-1, 4)).transpose(1, 2)),
        GlobalPool())


SOUND = {
    'C2':              (lambda: network(CyclicGroup(2)), CyclicGroup(2)),
    'C8':              (lambda: network(C8), C8),
    'D4':              (lambda: network(D4), D4),
    'C3':              (lambda: network(CyclicGroup(3), 2), CyclicGroup(3)),
    'C7':              (lambda: network(CyclicGroup(7), 2), CyclicGroup(7)),
    'C9':              (lambda: network(CyclicGroup(9), 2), CyclicGroup(9)),
    'D3':              (lambda: network(DihedralGroup(3), 2), DihedralGroup(3)),
    'a residual':      (lambda: network(C4, middle=Residual(C4)), C4),
    'a residual, D4':  (lambda: network(D4, middle=Residual(D4)), D4),
    'channels last':   (lambda: network(C8, middle=ChannelsLast(C8)), C8),
    'attention':       (lambda: network(C4, late=Attention()), C4),
    'poses last':      (poses_last, C4),
    'poses in a batch': (poses_in_batch, C4),
    'folded':          (lambda: fold(lively(GCNN(C8, (2, 3, 4)))), C8),
    'plain norms':     (lambda: network(C4, middle=Folded(nn.GroupNorm(3, 12, affine=False))), C4),
    'half precision':  (lambda: network(C4).half(), C4),
    'softmax of poses': (lambda: network(D4, middle=Does(lambda x: x*x.mean((3, 4), keepdim=True).softmax(2))), D4),
    'one channel':     (lambda: network(C4, 1), C4),
}


@pytest.mark.parametrize('name', SOUND)
def test_sound(name):
    make, group = SOUND[name]
    torch.manual_seed(0)
    assert guilty(make(), group, smooth_images(2, 28 if name == 'folded' else 19)) == {}


class Copied(LiftingConv2d):
    "The second half of the poses gets the kernels of the first."
    def forward(self, x):
        y = super().forward(x)
        n = y.shape[2]//2
        return torch.cat([y[:, :, :n], y[:, :, :n]], 2)


class TwoBorders(GroupConv2d):
    "Zeros left and right, the edge repeated above and below."
    def forward(self, x):
        tall = F.pad(x.flatten(1, 2), (0, 0, 2, 2), mode='replicate')
        return super().forward(F.pad(tall, (2, 2)).unflatten(1, x.shape[1:3]))


class Uneven(GroupConv2d):
    "Two pixels of padding on one side, one on the other."
    def forward(self, x):
        return super().forward(F.pad(x, (2, 1, 2, 1)))


class Gate(nn.Module):
    "Squeeze and excite, over pairs of channel and pose."
    def __init__(self, n):
        super().__init__()
        self.mix = nn.Linear(n, n)

    def forward(self, x):
        gate = self.mix(x.mean((-2, -1)).flatten(1)).sigmoid()
        return x*gate.unflatten(1, x.shape[1:3])[..., None, None]


class Lengths(nn.Module):
    def forward(self, x):
        return x.norm(dim=2)


def arrows(part):
    return chain(lift=LiftingConv2d(1, 3, 5, C8, padding=2), relu=nn.ReLU(), arrows=Arrows(C8),
                 part=part, lengths=Lengths(), read=GlobalPool())


def half_norm(x):
    "Statistics over one half of the poses at a time."
    return F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)


def off_centre(x):
    "A soft window around a centre that is half a pixel off."
    p = torch.arange(x.shape[-1]).to(x) - x.shape[-1]/2
    return x*torch.exp(-(p[:, None]**2 + p**2)/128)


SICK = {
    'a gate':           (lambda: network(C8, middle=Gate(24)), C8, {'middle.mix': 'kernel'}),
    'half a norm':      (lambda: network(C8, norm=Does(half_norm)), C8, {'norm': 'norm'}),
    'uneven padding':   (lambda: network(C8, conv=Uneven(3, 3, 5, C8)), C8, {'conv': 'border'}),
    'two borders':      (lambda: network(C8, conv=TwoBorders(3, 3, 5, C8)), C8, {'conv': 'border'}),
    'copies twice':     (lambda: network(C8, lift=Copied(1, 3, 5, C8, padding=2)), C8, {'lift': 'kernel'}),
    'no mirrors':       (lambda: network(D4, lift=Copied(1, 3, 5, D4, padding=2)), D4, {'lift': 'kernel'}),
    'off the centre':   (lambda: network(C8, relu=Does(off_centre)), C8, {'relu': 'position'}),
    'half of D4':       (lambda: network(D4, read=Does(lambda x: x[:, :, :4].mean((2, 3, 4)))), D4, {'read': 'read-out'}),
    'ReLU on arrows':   (lambda: arrows(nn.ReLU()), C8, {'part': 'non-linearity'}),
    'one component':    (lambda: arrows(Does(lambda v: v*v[:, :, :1].sigmoid())), C8, {'part': 'non-linearity'}),
    'a grey ground':    (lambda: network(C8), C8, {'lift': 'border'}, smooth_images(1, 19) + 1),
    'a stride':         (lambda: network(C8, conv=GroupConv2d(3, 3, 3, C8, stride=2, padding=1)), C8,
                         {'conv': 'stride and size'}, smooth_images(1, 20)),
    'an even window':   (lambda: network(C5, middle=GroupMaxPool2d(2)), C5, {'middle': 'stride and size'}),
    'a plain network':  (lambda: CNN((4, 4, 4)), C4, {f'blocks.block{i}.0': 'kernel' for i in (1, 2, 3)},
                         smooth_images(1, 28)),
    'two, adjacent':    (lambda: network(C4, early=Folded(nn.Conv2d(12, 12, 3, padding=1)), conv=Folded(nn.BatchNorm2d(12))),
                         C4, {'early.inner': 'kernel', 'conv.inner': 'norm'}),
    'two, apart':       (lambda: network(C4, early=Folded(nn.Conv2d(12, 12, 3, padding=1)), late=Does(lambda x: x.flip(2))),
                         C4, {'early.inner': 'kernel', 'late': 'pose order'}),
}


@pytest.mark.parametrize('name', SICK)
def test_sick(name):
    make, group, expected, *x = SICK[name]
    torch.manual_seed(0)
    assert guilty(lively(make()), group, *x) == expected
