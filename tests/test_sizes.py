"The size check beside the truth: an operation is judged by what it does, not by its name."
import copy, logging, math, warnings

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from gcnn_stn.equivariance import equivariance_error, size_rule
from gcnn_stn.fold import fold
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.layer import Downsample2d, GlobalPool, GroupAvgPool2d, GroupBatchNorm
from gcnn_stn.layer import GroupConv2d, GroupMaxPool2d, LiftingConv2d
from gcnn_stn.model import GCNN, published_gcnn
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import SeparableGroupConv2d
from gcnn_stn.sizes import check_sizes
from gcnn_stn.subgroup import CosetPool

C2, C4, C8, D4 = CyclicGroup(2), CyclicGroup(4), CyclicGroup(8), DihedralGroup(4)


# ── single operations on images (B, 1, H, W)

class Layer(nn.Module):
    "A function as a module."
    def __init__(self, f, *parts):
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(parts)

    def forward(self, x): return self.f(x)


def ones(*args, cls=nn.Conv2d, **kwargs):
    "A convolution whose learned kernel happens to be ones."
    conv = cls(1, 1, *args, **kwargs)
    nn.init.ones_(conv.weight)
    return conv


def fixed(kernel, **kwargs):
    "A convolution with a kernel of fixed numbers."
    kernel = torch.tensor(kernel, dtype=torch.float64)[None, None]
    return lambda x: F.conv2d(x, kernel.to(x), **kwargs)


def each(size, f):
    "Along height and then along width."
    return lambda x: f(f(x, 2, size), 3, size)


def numbered(step, start=0):
    def pick(x, dim, _): return x.index_select(dim, torch.arange(start, x.shape[dim], step))
    return each(None, pick)


def subscripted(step, start=0):
    def f(x):
        rows, columns = (torch.arange(start, n, step) for n in x.shape[2:])
        return x[:, :, rows[:, None], columns]
    return f


def gathered(x):
    "Mirrored twice, by gathering."
    backwards = torch.arange(x.shape[3] - 1, -1, -1).expand_as(x)
    return x.flip(2).gather(3, backwards)


def patches(k, stride=1, padding=0, read=lambda u: u.amax(1)):
    "Windows as columns (B, k², L), and what is read of them, as an image."
    def f(x):
        u = F.unfold(x, k, stride=stride, padding=padding)
        size = [(n + 2*padding - k)//stride + 1 for n in x.shape[2:]]
        return read(u).unflatten(-1, size)[:, None]
    return f


def refolded(k, stride):
    return lambda x: F.fold(F.unfold(x, k, stride=stride), x.shape[2:], k, stride=stride)


def windowed(k, stride, read):
    return lambda x: read(x.unfold(2, k, stride).unfold(3, k, stride))


def unpooled(k):
    def f(x):
        y, places = F.max_pool2d(x, k, return_indices=True)
        return F.max_unpool2d(y, places, k, output_size=x.shape[2:])
    return f


def fractional(x):
    samples = torch.full((len(x), x.shape[1], 2), .4).to(x)
    size = [n//2 for n in x.shape[2:]]
    return F.fractional_max_pool2d(x, 2, size, _random_samples=samples)


def sampled(shift=0., scale=1., align=False, **kwargs):
    "A grid, shifted by so many pixels."
    def f(x):
        theta = torch.tensor([[scale, 0, 0], [0, scale, 0]], dtype=x.dtype)
        grid = F.affine_grid(theta.expand(len(x), 2, 3), x.shape, align_corners=align)
        pixel = torch.tensor([2/x.shape[3], 2/x.shape[2]], dtype=x.dtype)
        return F.grid_sample(x, grid + shift*pixel, align_corners=align, **kwargs)
    return f


def resized(**kwargs): return lambda x: F.interpolate(x, **kwargs)


def to_even(x): return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))


def checkered(x):
    row, column = (torch.arange(n) for n in x.shape[2:])
    return x*(-1.)**(row[:, None] + column)


def both_ways(x): return x.roll(1, 2) + x.roll(-1, 2) + x.roll(1, 3) + x.roll(-1, 3)


def variation(x): return x.diff(dim=3).abs().sum((2, 3)) + x.diff(dim=2).abs().sum((2, 3))


def every_second(x):
    even = torch.arange(x.shape[3]) % 2 == 0
    return x.masked_select(even).view(*x.shape[:3], -1)


def slopes(x):
    dx = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
    dy = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    return (dx**2 + dy**2).sqrt()


def steps(x):
    "One-sided differences."
    dx = x[..., :-1, 1:] - x[..., :-1, :-1]
    dy = x[..., 1:, :-1] - x[..., :-1, :-1]
    return dx**2 + dy**2


def four_sides(order):
    "A feature: the slope to the right, upwards, to the left and downwards."
    def f(x):
        dx = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
        dy = x[..., :-2, 1:-1] - x[..., 2:, 1:-1]
        return torch.stack([(dx, dy, -dx, -dy)[i] for i in order], 2)
    return f


def wrapped(before, after):
    def wrap(x, dim, _):
        last = x.narrow(dim, x.shape[dim] - before, before)
        return torch.cat([last, x, x.narrow(dim, 0, after)], dim)
    return each(None, wrap)


def turned_four_times(f):
    return lambda x: sum(f(x.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in range(4))


def low(keep):
    "Low frequencies only."
    def f(x):
        h, w = (torch.fft.fftfreq(n).abs() for n in x.shape[2:])
        return torch.fft.ifft2(torch.fft.fft2(x)*keep(h[:, None], w)).real
    return f


def radial(x):
    h, w = (torch.arange(n, dtype=x.dtype) - (n - 1)/2 for n in x.shape[2:])
    return x*torch.exp(-(h[:, None]**2 + w**2)/20)


def hann(periodic):
    def f(x):
        h, w = (torch.hann_window(n, periodic=periodic, dtype=x.dtype) for n in x.shape[2:])
        return x*h[:, None]*w
    return f


def with_rows(x):
    rows = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)[:, None]
    return torch.cat([x, rows.expand_as(x)], 1)


def written(*places):
    "Zeros written into some rows and columns."
    def f(x):
        x = x.clone()
        for place in places:
            x[place] = 0
        return x
    return f


TOP, BOTTOM = (..., 0, slice(None)), (..., -1, slice(None))
LEFT, RIGHT = (..., 0), (..., -1)


def centre_of_mass(x):
    h, w = (torch.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[2:])
    p = x.flatten(2).softmax(-1).view_as(x)[:, 0]
    return torch.stack([(p.sum(2)*h).sum(1), (p.sum(1)*w).sum(1)], 1)


class Code(nn.Module):
    "A learned number for each place."
    def __init__(self, *shape, times=False):
        super().__init__()
        self.code, self.times = nn.Parameter(torch.randn(1, 1, *shape)), times

    def forward(self, x): return x*self.code if self.times else x + self.code


class Attention(nn.Module):
    "Attention over flattened positions."
    def __init__(self, places=0):
        super().__init__()
        self.inwards = nn.Linear(1, 4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.code = nn.Parameter(torch.randn(places, 4)) if places else None

    def forward(self, x):
        t = self.inwards(x.flatten(2).mT)
        t = t if self.code is None else t + self.code
        return self.mix(t, t, t)[0].mT.unflatten(2, x.shape[2:])


def flat(n): return nn.Sequential(nn.Flatten(), nn.Linear(n*n, 3))


def mixer(n):
    return nn.Sequential(nn.Flatten(2), nn.Linear(n*n, n*n), nn.Unflatten(2, (n, n)))


SOBEL = [[1., 0, -1], [2, 0, -2], [1, 0, -1]]
SOBEL_T = [list(row) for row in zip(*SOBEL)]
CONVOLUTIONS = [
    ((1, 2), {}),
    ((1, 3), {}),
    ((2,), {}),
    ((2, 2), {}),
    ((3,), {}),
    ((3, 2), {}),
    ((3, 2, 1), {}),
    ((3, 3), {}),
    ((4, 2, 1), {}),
    ((5, 2, 2), {}),
    (((3, 5),), {}),
    ((3, (2, 1)), {}),
    ((3, 1, (1, 0)), {}),
    ((3,), dict(dilation=2)),
    ((3, 2), dict(dilation=2)),
    ((2,), dict(padding='same')),
    ((3,), dict(padding='same')),
    ((4,), dict(padding='same')),
    ((3,), dict(padding='valid')),
]
TRANSPOSED = [
    ((2, 2), {}),
    ((3, 2), {}),
    ((4, 2, 1), {}),
    ((3, 2), dict(dilation=2)),
    ((3, 2, 1), dict(output_padding=1)),
]
MODES = ('nearest', 'nearest-exact', 'bilinear', 'bicubic', 'area')
RESIZED = [
    dict(scale_factor=.5),
    dict(scale_factor=2),
    dict(scale_factor=1.5),
    dict(size=9),
    dict(size=20),
]
MODULES = {
    # windows of convolutions
    **{f'conv {a} {k}': ones(*a, **k) for a, k in CONVOLUTIONS},
    **{f'border {mode} stride {s}': ones(3, s, 1, padding_mode=mode)
       for mode in ('zeros', 'reflect', 'replicate', 'circular') for s in (1, 2)},
    'even circular': ones(2, padding='same', padding_mode='circular'),
    **{f'transposed {a} {k}': ones(*a, cls=nn.ConvTranspose2d, **k) for a, k in TRANSPOSED},
    'row, then column': nn.Sequential(ones((1, 3)), ones((3, 1))),
    'tensorflow': nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ones(3, 2)),
    'lopsided blur': Layer(lambda x: fixed([[1.]*4]*4, stride=2)(F.pad(x, (1, 2, 1, 2)))),
    'one-sided kernel': Layer(fixed([[0, 0, 0], [0, -1, 1], [0, 0, 0]], padding=1)),
    'sobel': Layer(fixed(SOBEL)),
    'sobel, squared': Layer(lambda x: fixed(SOBEL)(x)**2 + fixed(SOBEL_T)(x)**2),
    'kernel from the image': Layer(lambda x: F.conv2d(x, x[:1, :, :3, :3])),
    # pooling
    'max 2': nn.MaxPool2d(2),
    'max 3 2': nn.MaxPool2d(3, 2),
    'max 3 2 1': nn.MaxPool2d(3, 2, 1),
    'max 2 1': nn.MaxPool2d(2, 1),
    'max ceil': nn.MaxPool2d(2, ceil_mode=True),
    'max dilated': nn.MaxPool2d(2, 2, dilation=2),
    'max oblong': nn.MaxPool2d((2, 3)),
    'avg 2': nn.AvgPool2d(2),
    'avg ceil': nn.AvgPool2d(2, ceil_mode=True),
    'avg 3 2 1': nn.AvgPool2d(3, 2, 1),
    'avg without padding': nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    'lp': nn.LPPool2d(2, 2),
    'lp 3 2': nn.LPPool2d(2, 3, 2),
    'max 3d': nn.MaxPool3d((1, 2, 2)),
    'avg 3d': nn.AvgPool3d((1, 2, 2)),
    'max 3d 3': nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
    'adaptive 7': nn.AdaptiveAvgPool2d(7),
    'adaptive 4': nn.AdaptiveAvgPool2d(4),
    'adaptive max 5': nn.AdaptiveMaxPool2d(5),
    'adaptive 1': nn.AdaptiveAvgPool2d(1),
    'adaptive oblong': nn.AdaptiveAvgPool2d((4, 5)),
    'fractional': Layer(fractional),
    'max 1d': Layer(lambda x: F.max_pool1d(x.flatten(2), 2).mean(2)),
    'pool, then maximum': nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(1)),
    'unpool 2': Layer(unpooled(2)),
    'unpool 3': Layer(unpooled(3)),
    # resizing
    **{f'{mode} {to}': nn.Upsample(mode=mode, **to) for mode in MODES for to in RESIZED},
    'corners': nn.Upsample(scale_factor=.5, mode='bilinear', align_corners=True),
    'corners 20': nn.Upsample(size=20, mode='bicubic', align_corners=True),
    'antialias': Layer(resized(scale_factor=.5, mode='bilinear', antialias=True)),
    'antialias 9': Layer(resized(size=9, mode='bicubic', antialias=True)),
    'recomputed': Layer(resized(scale_factor=.5, mode='area', recompute_scale_factor=True)),
    # windows by hand
    'unfold 3': Layer(patches(3, 1, 1)),
    'unfold 2 2': Layer(patches(2, 2)),
    'unfold 3 2': Layer(patches(3, 2)),
    'unfold 3 2 1': Layer(patches(3, 2, 1)),
    'unfold, first': Layer(patches(3, 1, 1, lambda u: u[:, 0])),
    'unfold, centre': Layer(patches(3, 1, 1, lambda u: u[:, 4])),
    'unfold, all': Layer(lambda x: F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:])),
    'fold 2': Layer(refolded(2, 2)),
    'fold 3 2': Layer(refolded(3, 2)),
    'windows 2': Layer(windowed(2, 2, lambda u: u.amax((-1, -2)))),
    'windows 3': Layer(windowed(3, 2, lambda u: u.mean((-1, -2)))),
    'shuffle': Layer(lambda x: F.pixel_shuffle(torch.cat([x, 2*x, 3*x, 4*x], 1), 2)),
    'shuffle alike': Layer(lambda x: F.pixel_shuffle(x.expand(-1, 4, -1, -1), 2)),
    'unshuffle': Layer(lambda x: F.pixel_unshuffle(to_even(x), 2)),
    'unshuffle, mean': Layer(lambda x: F.pixel_unshuffle(to_even(x), 2).mean(1)[:, None]),
    # indices
    '::2': Layer(lambda x: x[..., ::2, ::2]),
    '1::2': Layer(lambda x: x[..., 1::2, 1::2]),
    '::3': Layer(lambda x: x[..., ::3, ::3]),
    'cropped': Layer(lambda x: x[..., 2:-2, 2:-2]),
    'cropped at the end': Layer(lambda x: x[..., :-1, :-1]),
    'one row less': Layer(lambda x: x[..., 1:, :]),
    'index_select 2': Layer(numbered(2)),
    'index_select 2 from 1': Layer(numbered(2, 1)),
    'index_select 3': Layer(numbered(3)),
    'subscript 2': Layer(subscripted(2)),
    'subscript 2 from 1': Layer(subscripted(2, 1)),
    'gather': Layer(gathered),
    'chunk': Layer(lambda x: x.chunk(2, 3)[0].amax((2, 3))),
    'masked_select': Layer(every_second),
    'take': Layer(lambda x: x.flatten(2)[..., [0]]*x),
    'column written': Layer(written(LEFT)),
    'frame written': Layer(written(TOP, BOTTOM, LEFT, RIGHT)),
    'cropped, maximum': Layer(lambda x: x[..., :-1, :-1].amax((2, 3))),
    'cropped, minimum': Layer(lambda x: x[..., 1:, 1:].amin((2, 3))),
    'cropped, flattened': Layer(lambda x: x[..., 1:].flatten(1).amax(1, keepdim=True)),
    # moving
    'roll': Layer(lambda x: x.roll((1, 1), (2, 3))),
    'roll both ways': Layer(both_ways),
    'roll half': Layer(lambda x: torch.fft.fftshift(x, (2, 3))),
    'flip': Layer(lambda x: x.flip(3)),
    'flip both': Layer(lambda x: x.flip(2, 3)),
    'rot90': Layer(lambda x: x.rot90(1, (2, 3))),
    'transpose': Layer(lambda x: x.mT),
    'plus transpose': Layer(lambda x: x + x.mT),
    'channels last': Layer(lambda x: x.permute(0, 2, 3, 1)),
    'there and back': Layer(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)),
    'cat': Layer(lambda x: torch.cat([x, x], 2)),
    'cat zeros': Layer(lambda x: torch.cat([x, torch.zeros_like(x[..., :1])], 3)),
    'wrap': Layer(wrapped(1, 1)),
    'wrap at the end': Layer(wrapped(0, 1)),
    'wrap, stride': nn.Sequential(Layer(wrapped(1, 1)), ones(3, 2)),
    'stack': Layer(lambda x: torch.stack([x, 2*x], 1).flatten(1, 2)),
    'pad': nn.ZeroPad2d(1),
    'pad at the end': nn.ZeroPad2d((0, 1, 0, 1)),
    'pad and pad': nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.ZeroPad2d((1, 0, 1, 0))),
    'reflect': nn.ReflectionPad2d(2),
    'reflect at the end': nn.ReflectionPad2d((0, 1, 0, 1)),
    'circular at the end': nn.CircularPad2d((0, 1, 0, 1)),
    'circular': nn.CircularPad2d(1),
    'replicate at the end': nn.ReplicationPad2d((0, 1, 0, 1)),
    'pad to even': Layer(lambda x: F.max_pool2d(to_even(x), 2)),
    # whole rows and columns
    'cumsum': Layer(lambda x: x.cumsum(3)),
    'cumsum from all sides': Layer(turned_four_times(lambda x: x.cumsum(3))),
    'cumsum of channels': Layer(lambda x: torch.cat([x, x], 1).cumsum(1)),
    'sort': Layer(lambda x: x.sort(-1)[0]),
    'sort all': Layer(lambda x: x.flatten(1).sort(1)[0]),
    'top': Layer(lambda x: x.flatten(1).topk(5)[0]),
    'softmax of rows': Layer(lambda x: x.softmax(-1)),
    'softmax': Layer(lambda x: x.flatten(2).softmax(-1).view_as(x)),
    'median of rows': Layer(lambda x: x.median(-1)[0].mean(-1)),
    'mean of rows': Layer(lambda x: x - x.mean(3, keepdim=True)),
    'mean of both': Layer(lambda x: x - x.mean(3, keepdim=True) - x.mean(2, keepdim=True)),
    'mean': Layer(lambda x: x.mean((2, 3))),
    'sums of rows': Layer(lambda x: x.sum(3)[:, 0]),
    'std': Layer(lambda x: x/x.std((2, 3), keepdim=True)),
    'normalize rows': Layer(lambda x: F.normalize(x, dim=3)),
    'product': Layer(lambda x: x@x),
    'product, transposed': Layer(lambda x: x@x.mT),
    'gram': Layer(lambda x: (x.flatten(2)@x.flatten(2).mT).flatten(1)),
    'einsum': Layer(lambda x: torch.einsum('bchw,bdhw->bcd', x, x).flatten(1)),
    'einsum of rows': Layer(lambda x: torch.einsum('bchw,bchv->bcwv', x, x)),
    'triangle': Layer(lambda x: x.tril()),
    'diagonal': Layer(lambda x: x.diagonal(dim1=2, dim2=3).sum(-1)),
    'spectrum': Layer(lambda x: torch.fft.fft2(x).abs()),
    'low': Layer(low(lambda h, w: (h**2 + w**2 < .04)*1.)),
    'low of rows': Layer(low(lambda h, w: (w + 0*h < .2)*1.)),
    # grids and places
    'grid': Layer(sampled()),
    'grid, corners': Layer(sampled(align=True)),
    'half a pixel': Layer(sampled(.5)),
    'a third': Layer(sampled(1/3)),
    'one pixel': Layer(sampled(1.)),
    'smaller': Layer(sampled(scale=.7)),
    'larger': Layer(sampled(scale=1.3, padding_mode='border')),
    'nearest grid': Layer(sampled(mode='nearest')),
    'radial': Layer(radial),
    'rows as channel': Layer(with_rows),
    'shade': Layer(lambda x: x*torch.linspace(0, 1, x.shape[3], dtype=x.dtype)),
    'centre of mass': Layer(centre_of_mass),
    'hann': Layer(hann(False)),
    'periodic hann': Layer(hann(True)),
    'checkerboard': Layer(checkered),
    # differences
    'slopes': Layer(slopes),
    'one-sided': Layer(steps),
    'dx': Layer(lambda x: x[..., 1:-1, 2:] - x[..., 1:-1, :-2]),
    'diff': Layer(lambda x: x.diff(dim=3)),
    'gradient': Layer(lambda x: sum(g**2 for g in torch.gradient(x, dim=(2, 3)))),
    'variation': Layer(variation),
    'laplacian': Layer(fixed([[0, 1, 0], [1, -4, 1], [0, 1, 0]], padding=1)),
    'four sides': Layer(four_sides((0, 1, 2, 3))),
    'four sides, swapped': Layer(four_sides((0, 1, 3, 2))),
    'turned, lopsided': Layer(turned_four_times(lambda x: x.roll(1, 3))),
    'turned, cropped': Layer(turned_four_times(lambda x: F.max_pool2d(x, 2))),
    # reshaped, attended, normalised
    'rolled as a row': Layer(lambda x: x.flatten(2).roll(1, -1).view_as(x)),
    'merged': Layer(lambda x: x.reshape(len(x), 1, -1, 1)),
    'flatten': nn.Flatten(),
    'attention': Attention(),
    'instance norm': nn.InstanceNorm2d(1),
    'response norm': nn.LocalResponseNorm(2),
    'relu': nn.ReLU(),
    'constant': Layer(lambda x: torch.ones(len(x), 2, dtype=x.dtype)),
    'dice': Layer(lambda x: F.dropout(x, .5, True)),
    'into itself': Layer(lambda x: F.avg_pool2d(x.mul_(2), 2)),
}
SQUARE = ('plus transpose', 'product')
SIZED = {   # made for n×n pixels
    'code': lambda n: Code(n, n),
    'code times': lambda n: Code(n, n, times=True),
    'code of rows': lambda n: Code(n, 1),
    'code of all': lambda n: Code(1, 1),
    'flattened': flat,
    'attention with places': lambda n: Attention(n*n),
    'linear along rows': lambda n: nn.Linear(n, n),
    'layer norm': lambda n: nn.LayerNorm([1, n, n]),
    'layer norm of rows': lambda n: nn.LayerNorm(n),
    'kernel of full size': lambda n: nn.Sequential(ones(n), nn.Flatten()),
    'mixer': mixer,
}


@torch.no_grad()
def exact(model, shape, group):
    "The truth: at every lattice element, for many random images in double precision."
    model = copy.deepcopy(model).double().eval()
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(64, *shape, generator=gen, dtype=torch.float64)
    lattice = [g for g in group.elements() if group.lattice[g]]
    if min(shape[-2:]) > 20: x = x[:4]
    f = lambda x: model(x.clone())
    return equivariance_error(f, group, x, lattice).max() < 1e-10


def agrees(model, shape, truth=C4, **given):
    assert check_sizes(model, shape, most=0, **given).ok == exact(model, shape, truth)


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', MODULES)
def test_operations(name):
    "No miss and no false alarm, at two odd sizes, an even one, and in oblong images."
    oblong = [] if name in SQUARE else [(15, 18)]
    for size in ((15, 15), (16, 16), (17, 17), *oblong):
        agrees(MODULES[name], (1, *size))


@pytest.mark.parametrize('name', SIZED)
def test_sized(name):
    for n in (15, 16, 17): agrees(SIZED[name](n), (1, n, n))


FEW = ('max 2', 'border zeros stride 2', 'softmax of rows', 'mean of rows', 'flip',
       'transpose', 'slopes', 'cumsum', 'shade', 'turned, lopsided', 'roll both ways')


@pytest.mark.parametrize('group', [C2, D4, DihedralGroup(1), DihedralGroup(2)], ids=str)
@pytest.mark.parametrize('name', FEW)
def test_groups(name, group):
    "Half turns alone, mirrors with them, or a mirror alone."
    for size in ((15, 15), (16, 16)): agrees(MODULES[name], (1, *size), group, group=group)


# ── networks

def net(pool=None, group=C8, **conv):
    return nn.Sequential(
        LiftingConv2d(1, 2, 5, group, padding=2), GroupBatchNorm(2), nn.ReLU(),
        pool or Downsample2d(), GroupConv2d(2, 2, 5, group, **conv),
        GlobalPool(), nn.Linear(2, 3))


def lifted(f, group=C4):
    f = f if isinstance(f, nn.Module) else Layer(f)
    return nn.Sequential(LiftingConv2d(1, 2, 3, group), f)


def pooled_cosets():
    pool = CosetPool(C8, [0, 2, 4, 6])
    return lifted(nn.Sequential(pool, nn.Flatten(1, 2), nn.MaxPool2d(2), Layer(mean)), C8)


def mean(x): return x.mean((2, 3))


class Poised(nn.Module):
    "Finds out which way it is, turns it upright, and goes on with a plain network."
    def __init__(self):
        super().__init__()
        self.pose = lifted(GroupConv2d(2, 1, 5, C4))
        self.plain = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), Layer(mean))

    def forward(self, x):
        best = self.pose(x).mean((1, 3, 4)).argmax(1)
        upright = [image.rot90(-int(k), (-2, -1)) for image, k in zip(x, best)]
        return self.plain(torch.stack(upright))


NETS = {
    'friday': lambda: net(stride=2, padding=2),
    'two faults': lambda: net(GroupMaxPool2d(2), stride=2, padding=2),
    'D4': lambda: net(GroupMaxPool2d(2), D4),
    'C2': lambda: net(GroupMaxPool2d(2), C2),
    'C6': lambda: net(GroupMaxPool2d(2), CyclicGroup(6)),
    'C3': lambda: net(GroupMaxPool2d(2), CyclicGroup(3)),
    'GCNN': lambda: GCNN(C8, (2, 3, 4)),
    'published': lambda: published_gcnn(4, 2, 4),
    'separable': lambda: net(SeparableGroupConv2d(2, 2, 3, C8, stride=2)),
    'blurred': lambda: net(BlurPool2d(2)),
    'blurred maximum': lambda: net(MaxBlurPool2d(3)),
    'enlarged': lambda: net(Upsample2d(2)),
    'averaged': lambda: net(GroupAvgPool2d(3, 2)),
    'max 3d': lambda: lifted(nn.MaxPool3d((1, 2, 2))),
    'max over poses, too': lambda: lifted(nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0))),
    'conv 3d': lambda: lifted(lambda x: F.avg_pool3d(x, (1, 3, 3), (1, 2, 2))),
    'slices': lambda: lifted(lambda x: x[..., ::2, ::2]),
    'one pose': lambda: lifted(lambda x: x[:, :, 0]),
    'softmax of poses': lambda: lifted(lambda x: x.softmax(2)),
    'sum of poses': lambda: lifted(lambda x: x.cumsum(2)),
    'poses backwards': lambda: lifted(lambda x: x.flip(2)),
    'poised': Poised,
    'cosets': pooled_cosets,
}


@pytest.mark.parametrize('name', NETS)
def test_networks(name):
    model = NETS[name]().eval()
    group = next(m.group for m in model.modules() if hasattr(m, 'group'))
    oblong = [] if name == 'poised' else [(28, 31)]
    for size in ((28, 28), (29, 29), (30, 30), *oblong):
        agrees(model, (1, *size), group)


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def test_plain_kernels_are_forgiven():
    "What a plain convolution has learned isn't a matter of sizes."
    assert not exact(plain(), (1, 28, 28), C4)
    assert [check_sizes(plain(), n, most=0).ok for n in (27, 28)] == [False, True]


def stranger(f):
    class Stranger(nn.Conv2d):
        def forward(self, x): return f(self, x)
    return nn.Sequential(Stranger(1, 2, 2, 2), nn.AdaptiveAvgPool2d(1))


def standardised(m, x):
    w = m.weight
    return F.conv2d(x, (w - w.mean())/w.std(), m.bias, m.stride)


class Inner(nn.Module):
    "A network that is run in a way of its own."
    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x): return self.run(self.model, x)


@torch.inference_mode()
def inferred(model, x): return model(x)


def half(model, x):
    with torch.autocast('cpu', torch.bfloat16): return model(x.float())


def recomputed(model, x): return checkpoint(model, x, use_reentrant=False)


def changed(change):
    model = plain()
    return change(model) or model


def eager(model): return torch.compile(model, backend='aot_eager')
def compiled_in_place(model): model.compile(backend='aot_eager')
def parametrized(model): model[0] = parametrizations.spectral_norm(model[0])


def pruned(model):
    prune.random_unstructured(model[0], 'weight', .3)
    model(torch.rand(2, 1, 28, 28))


def derived(model):
    model[0] = nn.utils.weight_norm(model[0])
    model(torch.rand(2, 1, 28, 28))


def lazy():
    first, second = nn.LazyConv2d(3, 3, padding=1), nn.LazyConv2d(3, 3)
    return nn.Sequential(first, nn.MaxPool2d(2), second)


def cast(x):
    one = torch.ones(1, dtype=torch.float16)
    return F.max_pool2d(x.half().float()*one, 2)


def answers(x): return {'a': F.max_pool2d(x, 2), 'b': [x.mean(), (x, None)]}


WRAPPED = {   # name → a network that fits 28×28 pixels and not 27×27
    'compiled': lambda: eager(plain()),
    'compiled in place': lambda: changed(compiled_in_place),
    'parallel': lambda: nn.DataParallel(plain()),
    'inside': lambda: nn.Sequential(eager(plain()[:4]), nn.DataParallel(plain()[4:])),
    'pruned': lambda: changed(pruned),
    'weight norm': lambda: changed(derived),
    'parametrized': lambda: changed(parametrized),
    'half': lambda: plain().half(),
    'bfloat16': lambda: plain().bfloat16(),
    'double': lambda: plain().double(),
    'by pixel': lambda: plain().to(memory_format=torch.channels_last),
    'lazy': lazy,
    'inference': lambda: Inner(plain(), inferred),
    'autocast': lambda: Inner(plain(), half),
    'recomputed': lambda: Inner(plain(), recomputed),
    'script': lambda: torch.jit.script(plain()),
    'trace': lambda: torch.jit.trace(plain().eval(), torch.rand(1, 1, 28, 28)),
    'fx': lambda: torch.fx.symbolic_trace(plain()),
    'standardised': lambda: stranger(standardised),
    'behind data': lambda: stranger(lambda m, x: F.conv2d(x, m.weight.data, None, 2)),
    'own dtype': lambda: Layer(lambda x: F.conv2d(x, torch.ones(1, 1, 2, 2), stride=2)),
    'cast': lambda: Layer(cast),
    'several answers': lambda: Layer(answers),
    'vmap': lambda: Layer(lambda x: torch.vmap(lambda i: F.max_pool2d(i, 2))(x)),
    'logarithm': lambda: Layer(lambda x: F.max_pool2d(x, 2).log()),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', WRAPPED)
def test_wrapped(name):
    model = WRAPPED[name]()
    assert [check_sizes(model, n, most=0).ok for n in (27, 28)] == [False, True]


WORLDS = {
    'inference': torch.inference_mode,
    'no_grad': torch.no_grad,
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'device': lambda: torch.device('meta'),
}


@pytest.mark.parametrize('world', WORLDS)
def test_worlds(world):
    model, turning = plain(), net(stride=2, padding=2)
    with WORLDS[world]():
        assert [check_sizes(model, n, most=0).ok for n in (27, 28)] == [False, True]
        assert [check_sizes(turning, n, most=0).ok for n in (27, 28)] == [True, False]


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try: assert [check_sizes(plain(), n, most=0).ok for n in (27, 28)] == [False, True]
    finally: torch.set_default_dtype(torch.float32)


def test_folded():
    model = fold(net(stride=2, padding=2).eval())
    report = check_sizes(model, 28)
    assert not report.ok and (report.smaller, report.larger) == ((27, 27), (30, 30))


def test_untouched():
    "Weights, buffers, mode, gradients, dice, warnings and logs are as before."
    model = net(stride=2, padding=2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dice, level = torch.get_rng_state(), logging.root.manager.disable
    filters = warnings.filters[:]
    check_sizes(model, 28), check_sizes(model, 27)
    after = model.state_dict()
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled() and torch.equal(dice, torch.get_rng_state())
    assert level == logging.root.manager.disable and filters == warnings.filters


class Loud(nn.Module):
    "Warns, logs, and can't be used at most sizes, each time for another reason."
    def forward(self, x):
        warnings.warn('a warning')
        logging.getLogger('loud').error('a log')
        n = x.shape[-1]
        if n % 4: raise (TypeError, KeyError, RuntimeError)[n % 3]('never at this size')
        return F.conv2d(x, torch.ones(1, 1, 3, 3), stride=2)


def test_silent(capfd, caplog, recwarn):
    "The search tries sizes at which a network can't be run; nobody needs to hear of it."
    assert not check_sizes(Loud(), 28, most=8).ok
    with pytest.raises(ValueError, match="can't take images"):
        check_sizes(nn.Conv2d(1, 1, 40), 28)
    assert not check_sizes(nn.Sequential(nn.MaxPool2d(2), *flat(14)), 28).ok
    assert capfd.readouterr() == ('', '') and not caplog.records and not recwarn.list


# ── what it says

def behind(*layers): return nn.Sequential(nn.ReLU(), *layers)
def both(*layers): return {(name, axis) for name in layers for axis in ('height', 'width')}


BLAMED = {   # model, size → who did it, and along which axis
    'friday': (lambda: net(stride=2, padding=2), 28, both('4')),
    'two faults': (lambda: net(GroupMaxPool2d(2), stride=2, padding=2), 29, both('3', '4')),
    'one axis': (lambda: net(GroupMaxPool2d(2)), (29, 28), {('3', 'height')}),
    'not square': (lambda: behind(nn.Conv2d(1, 1, (3, 5))), 15, {('1', 'both')}),
    'recovered': (lambda: nn.Sequential(Layer(slopes), nn.MaxPool2d(2)), 17, both('1')),
    'code': (lambda: nn.Sequential(nn.MaxPool2d(2), Code(8, 8)), 16, both('1')),
    'rows': (lambda: behind(Code(16, 1)), 16, {('1', 'height')}),
    'linear': (lambda: nn.Sequential(nn.MaxPool2d(2), *flat(8)), 16, both('2')),
    'tokens': (lambda: Attention(256), 16, both('(model)')),
    'transposed': (lambda: behind(Layer(lambda x: x.mT)), 16, {('1', 'both')}),
    'written': (lambda: behind(nn.CircularPad2d((0, 1, 0, 1))), 16, {('1', 'both')}),
    'poses': (lambda: lifted(lambda x: x[:, :, 0]), 16, {('(model)', 'both')}),
}


@pytest.mark.parametrize('name', BLAMED)
def test_blame(name):
    make, size, guilty = BLAMED[name]
    assert {(m.layer, m.axis) for m in check_sizes(make(), size, most=0).misfits} == guilty


EVIDENCE = {
    nn.MaxPool2d(2): 'row 0 goes to 0, row 16 nowhere instead of to 7',
    nn.Conv2d(1, 1, 2, padding='same'): 'row 0 goes to 0, row 16 to 16 instead of to 17',
    Layer(lambda x: x.roll(1, 2)): 'row 0 goes to 1, row 16 to 0 instead of to 15',
    Layer(lambda x: x.cumsum(2)): 'row 0 goes to 0…16, row 16 to 16 instead of to 0…16',
    nn.Upsample(size=12): 'row 0 goes to 0, row 16 nowhere instead of to 11',
    Code(17, 17): 'not all places are treated alike',
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('model', EVIDENCE, ids=lambda m: type(m).__name__)
def test_evidence(model):
    assert check_sizes(model, (1, 17, 17), most=0).misfits[0].evidence == EVIDENCE[model]


NEAREST = [   # model, size → the nearest sizes that fit
    (nn.MaxPool3d((1, 2, 2)), 17, (16, 16), (18, 18)),
    (nn.MaxPool2d(2), 3, (2, 2), (4, 4)),
    (nn.MaxPool2d(4), (17, 22), (16, 20), (20, 24)),
    (nn.MaxPool2d(2), (16, 17), (16, 16), (16, 18)),
    (nn.AvgPool3d((1, 2, 2)), (3, 5, 15, 15), (14, 14), (16, 16)),
    (nn.Upsample(size=8), 17, (8, 8), None),
    (nn.Conv2d(1, 1, (3, 5)), (16, 17), None, None),
    (Code(9, 9), 9, None, None),
]


@pytest.mark.parametrize('k', range(len(NEAREST)))
def test_nearest(k):
    "Height and width together in a square, and each by itself in an oblong image."
    model, size, smaller, larger = NEAREST[k]
    report = check_sizes(model, size)
    assert (report.smaller, report.larger) == (smaller, larger)
    none = check_sizes(model, size, most=0)
    assert none.misfits == report.misfits and none.smaller is none.larger is None


def zeros(n):
    code = Code(n, n)
    nn.init.zeros_(code.code)
    return code


NOTED = {   # right today, but not for a good reason
    'in 1.': (lambda: behind(zeros(9)), 9),
    'symmetric': (lambda: nn.LayerNorm([1, 9, 9]), 9),
    "doesn't depend": (lambda: Layer(lambda x: 0*x), 9),
    'none': (lambda: net(group=CyclicGroup(3)), 28),
}


@pytest.mark.parametrize('words', NOTED)
def test_notes(words):
    make, size = NOTED[words]
    report = check_sizes(make(), size)
    assert report.ok and words in report.notes[0]
    assert report.notes[0] in repr(report) and report.notes[0] in report._repr_markdown_()


def test_nothing_to_note():
    assert check_sizes(net(), 28).notes == []
    assert check_sizes(nn.LayerNorm([1, 9, 9], elementwise_affine=False), 9).notes == []


# ── absurd arguments

UNRULED = [   # arguments of size_rule, what the message must name
    ((3, 7), 'a window of 7 .*must fit.*got 3'),
    ((5, 3, 1, 0, 3), 'a window of 3 .*dilated by 3.*got 5'),
    ((28, 3, 0), 'stride.*0'),
    ((28, 3, 2.), 'stride.*2.0'),
    ((28, 3, 1, -1), 'padding.*-1'),
    ((28, 3, 1, 0, 0), 'dilation.*0'),
    ((28, 0), 'kernel_size.*0'),
    ((28, True), 'kernel_size.*True'),
    ((28, None), 'kernel_size.*None'),
    ((28, (3, 3)), r'kernel_size.*\(3, 3\)'),
    ((0, 1), 'size.*0'),
    ((28.5, 3), 'size.*28.5'),
    ((math.nan, 3), 'size.*nan'),
    (('28', 3), "size.*'28'"),
]


@pytest.mark.parametrize('given, says', UNRULED)
def test_size_rule(given, says):
    with pytest.raises(ValueError, match=says): size_rule(*given)


REFUSED = [   # model, arguments of check_sizes, what the message must name
    (nn.ReLU(), dict(input_size=0), 'input_size.*0'),
    (nn.ReLU(), dict(input_size=-3), 'input_size.*-3'),
    (nn.ReLU(), dict(input_size=2.5), 'input_size.*2.5'),
    (nn.ReLU(), dict(input_size=True), 'input_size.*True'),
    (nn.ReLU(), dict(input_size=None), 'input_size.*None'),
    (nn.ReLU(), dict(input_size='28'), "input_size.*'28'"),
    (nn.ReLU(), dict(input_size=()), r'input_size.*\(\)'),
    (nn.ReLU(), dict(input_size=(28,)), 'input_size'),
    (nn.ReLU(), dict(input_size=(1, 28, 0)), 'input_size'),
    (nn.ReLU(), dict(input_size=(1, 2, 3, 4, 5)), 'input_size'),
    (nn.ReLU(), dict(input_size=28, most=-1), 'most.*-1'),
    (nn.ReLU(), dict(input_size=28, most=2.5), 'most.*2.5'),
    (nn.ReLU(), dict(input_size=28, most=True), 'most.*True'),
    (nn.ReLU(), dict(input_size=28, group=4), 'group.*4'),
    (nn.ReLU, dict(input_size=28), 'nn.Module.*type'),
    (torch.relu, dict(input_size=28), 'nn.Module.*builtin'),
    (nn.Conv2d(3, 1, 3), dict(input_size=(1, 28, 28)), r'\(1, 28, 28\).*3 channels'),
    (nn.Conv2d(1, 1, 40), dict(input_size=28), r"can't take images of \(1, 28, 28\)"),
    (nn.Conv2d(1, 1, 3, device='meta'), dict(input_size=9), 'meta'),
    (GCNN(C8), dict(input_size=9), 'at least 28×28'),
    (GroupMaxPool2d(2), dict(input_size=9), 'group feature'),
    (Layer(lambda x: None), dict(input_size=9), 'tensor'),
    (Layer(lambda x: x/0*0), dict(input_size=9), 'finite'),
]


@pytest.mark.parametrize('k', range(len(REFUSED)))
def test_refused(k):
    model, given, says = REFUSED[k]
    with pytest.raises(ValueError, match=f'(?s){says}'): check_sizes(model, **given)
