"Sick and sound networks: whom the doctor names, and with which cause; that it finds no fault where there is none."
from collections import OrderedDict

import pytest, torch
import torch.nn.functional as F
from torch import nn

from gcnn_stn.doctor import diagnose
from gcnn_stn.equivariance import smooth_images
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.layer import GlobalPool, GroupBatchNorm, GroupConv2d, GroupLayerNorm, GroupMaxPool2d, LiftingConv2d
from gcnn_stn.sampling import Upsample2d

GROUPS = {'C4': CyclicGroup(4), 'C8': CyclicGroup(8), 'C5': CyclicGroup(5), 'D4': DihedralGroup(4)}
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
    "One fault, at three depths, among sound layers."
    make, cause, where = FAULTS[fault]
    group = GROUPS[name]
    for depth in DEPTHS if name == 'C4' else DEPTHS[1:2]:
        torch.manual_seed(0)
        sick = network(group, **{depth: make(3, group.order, SIDES[depth])})
        unseen = name == 'C5' and fault in BELOW_THE_FLOOR
        assert guilty(sick, group) == ({} if unseen else {depth + where: cause})
