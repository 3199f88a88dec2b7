"""Every dtype through everything that moves, measures or reads images.

The next dtype, function, picture or data set is a line."""
import copy
import io
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from gcnn_stn.data import (content_hash, mnist, normalize, prepare, random_angles, rotate,
                           rotate_once, rotation_grid, sample, split, unit_range)
from gcnn_stn.study.data import (_arrays, digits, from_torchvision, load_dataset,
                                 _visit)
from gcnn_stn.study.images import image_data, pixel_statistics, resize
from gcnn_stn.study.picture import _bytes
from gcnn_stn.study.rot import chirality, draw_rot
from gcnn_stn.equivariance import disc, equivariance_error, smooth_images
from gcnn_stn.group import CyclicGroup, DihedralGroup, FiniteGroup, act, transform_image
from gcnn_stn.kernel import basis_operator
from gcnn_stn.stn import (AreaPool2d, LocalizationNet, PublishedLocalizationNet,
                          SpatialTransformer, published_transformer, rotation_angle,
                          rotation_theta, sampling_grid, unit, warp)
from gcnn_stn.subgroup import act_on_cosets

C3, C4, C8 = CyclicGroup(3), CyclicGroup(4), CyclicGroup(8)
D4, D8 = DihedralGroup(4), DihedralGroup(8)
HALVES = torch.float16, torch.bfloat16
FLOATS = *HALVES, torch.float32, torch.float64
COMPLEX = torch.complex32, torch.complex64, torch.complex128
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
          torch.uint16, torch.uint32, torch.uint64)


def rand(*shape, dtype=torch.float64):
    "Noise that is the same at each call."
    g = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=g, dtype=torch.float64, device='cpu').to(dtype)


def angles(x): return 360*rand(len(x))
def grid(x): return rotation_grid(angles(x), *x.shape[-2:], torch.float64)


def theta(x):
    a = torch.deg2rad(angles(x))
    return rotation_theta(a.cos(), a.sin(), *x.shape[-2:])


def repeated(x, poses): return x[:, :, None].expand(-1, -1, poses, -1, -1)


def autocast(): return torch.autocast('cpu', torch.bfloat16)


@contextmanager
def defaults(dtype=torch.float32, device='cpu'):
    "Torch's defaults, as a script may have set them."
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try: yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


# moving images

MOVES = {
    'rotate': lambda x: rotate(x, angles(x)),
    'sample': lambda x: sample(x, grid(x)),
    'sample bicubic': lambda x: sample(x, grid(x), 'bicubic', 'border'),
    'image': lambda x: act(C8, 1, x),
    'image bicubic': lambda x: act(C8, 3, x, 'bicubic'),
    'image nearest': lambda x: act(C8, 3, x, 'nearest'),
    'image on the lattice': lambda x: act(C8, 2, x),
    'mirror': lambda x: act(D8, 9, x),
    'feature': lambda x: act(C8, 1, repeated(x, 8)),
    'cosets': lambda x: act_on_cosets(C8, [0, 4], 1, repeated(x, 4)),
    'without channels': lambda x: transform_image(x.sum(1)/3, C8.matrix(1)),
    'alone': lambda x: transform_image(x.sum((0, 1))/6, C8.matrix(1)),
    'matrix in float32': lambda x: transform_image(x, C8.matrix(1).float()),
    'warp': lambda x: warp(x, theta(x)),
    'warp by float32': lambda x: warp(x, theta(x).float(), 'zeros'),
}
SIZES = {
    'small': (2, 3, 9, 7),
    'large': (2, 1, 300, 301),
    'wide': (1, 1, 2, 700),
    'empty': (0, 3, 9, 7),
    'no channels': (2, 0, 9, 7),
}


def allowed(x, y):
    "What one rounding of `x` costs, and what float32 costs in the places read."
    step = x.abs().max().item()*torch.finfo(x.dtype).eps if x.numel() else 0
    return step + (0 if x.dtype == torch.float64 else 4e-6*max(x.shape[-2:]))


def furthest(a, b): return (a.double() - b.double()).abs().max() if a.numel() else 0


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('move', MOVES)
def test_images_keep_dtype_and_precision(move, dtype):
    f = MOVES[move]
    for name, shape in SIZES.items():
        if 'nearest' in move and name == 'large': continue    # a tie may go either way
        x = rand(shape, dtype=dtype).requires_grad_()
        y = f(x)
        assert y.dtype == dtype and y.requires_grad and y.isfinite().all(), name
        assert furthest(y, f(x.detach().double())) <= allowed(x, y), name
        with autocast(): assert torch.equal(f(x), y), name
        if y.numel(): assert torch.autograd.grad(y.sum(), x)[0].isfinite().all(), name


def labels(dtype):
    "A rectangle of the largest label there is."
    y = torch.zeros(2, 1, 40, 31, dtype=torch.int64).to(dtype)
    y[..., 5:30, 4:20] = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    return y


def moved(group, g, x, mode):
    is_map = x.ndim == 3
    return transform_image(x, group.matrix(g), mode) if is_map else act(group, g, x, mode)


@pytest.mark.parametrize('dtype', LABELS, ids=str)
@pytest.mark.parametrize('group', [C8, C3, D8], ids=str)
def test_labels_move_whole_or_not_at_all(group, dtype):
    y = labels(dtype)
    top = y.max() if dtype not in LABELS[6:] else y[0, 0, 6, 6]
    for y in y, y[:0], y[:, 0], repeated(y, group.order):
        for g in group.elements():
            found = moved(group, g, y, 'nearest')
            where = moved(group, g, (y != 0).double(), 'nearest') == 1
            assert found.dtype == dtype
            assert torch.equal(found, torch.where(where, top, torch.zeros_like(top)))
            for mode in 'bilinear', 'bicubic':
                if group.lattice[g]:
                    assert torch.equal(moved(group, g, y, mode), found)   # an exact shuffle
                else:
                    with pytest.raises(ValueError, match="mode must be 'nearest'"):
                        moved(group, g, y, mode)


@pytest.mark.parametrize('mode', ['bilinear', 'bicubic', 'nearest'])
@pytest.mark.parametrize('dtype', COMPLEX, ids=str)
@pytest.mark.filterwarnings('ignore:ComplexHalf')
def test_complex_images(dtype, mode):
    x = torch.complex(*rand(2, 2, 3, 9, 8))
    tolerance = 2e-3 if dtype == torch.complex32 else 1e-5
    for group in C8, D4:
        for g in group.elements():
            y = act(group, g, x.to(dtype), mode)
            exact = torch.complex(act(group, g, x.real, mode), act(group, g, x.imag, mode))
            assert y.dtype == dtype and (y.to(exact.dtype) - exact).abs().max() < tolerance


ONES = torch.ones(2, 1, 5, 5)
NO_NUMBERS = {
    'rotate': lambda v: rotate(ONES, torch.tensor([0., v])),
    'rotate bytes': lambda v: rotate(ONES.byte(), [0., v]),
    'rotate, half': lambda v: rotate(ONES, torch.tensor([v, 0.]).half()),
    'prepare': lambda v: prepare(ONES, torch.tensor([v, v])),
    'rotation_grid': lambda v: rotation_grid(torch.tensor([v]), 5, 5, torch.float32),
    'transform_image': lambda v: transform_image(ONES, torch.tensor([[1., 0], [v, 1]])),
    'all of a matrix': lambda v: transform_image(ONES, torch.full((2, 2), v)),
    'warp': lambda v: warp(ONES, torch.full((2, 2, 3), v)),
    'a group': lambda v: FiniteGroup([[0]], [[[v, 0], [0, 1]]]),
    'a table': lambda v: FiniteGroup([[v]], [[[1, 0], [0, 1]]]),
    'mean': lambda v: normalize(ONES, mean=v),
    'std': lambda v: normalize(ONES, std=(v,)),
    'smooth_images': lambda v: smooth_images(detail=v),
}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('name', NO_NUMBERS)
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError): NO_NUMBERS[name](value)


# measuring

@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('size', [65, 301])
def test_the_error_is_the_maps_own(dtype, size):
    "An exact map errs by what storing costs; one with a direction, by as much as ever."
    x, eps = smooth_images(2, size, dtype=dtype), torch.finfo(dtype).eps
    assert equivariance_error(lambda x: x, C8, x).max() < eps
    with autocast(): assert equivariance_error(lambda x: x, C8, x).max() < eps
    conv = nn.Conv2d(1, 2, 5, bias=False).double()
    with torch.no_grad(): conv.weight.copy_(rand(2, 1, 5, 5) - .5)
    exact = equivariance_error(conv, C8, x.double())[1:]
    own = equivariance_error(conv.to(dtype), C8, x)[1:].double()
    assert (own/exact - 1).abs().max() < 50*eps + 1e-4


@pytest.mark.parametrize('scale', [1e-6, 1e4])
def test_measuring_neither_overflows_nor_vanishes(scale):
    x = (smooth_images(4, 65)*scale).clamp(-6e4, 6e4).half()
    assert 0 <= equivariance_error(lambda x: x, C4, x).max() < 1e-6
    assert equivariance_error(lambda x: x.mT, C4, x)[1] > .1


# spatial transformers

NETS = {
    'own': LocalizationNet,
    'affine': lambda: LocalizationNet(transformation='affine'),
    'similarity': lambda: LocalizationNet(transformation='similarity'),
    'published': PublishedLocalizationNet,
    'published, random': lambda: PublishedLocalizationNet(init='random'),
}


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('name', NETS)
def test_transformers(name, dtype):
    torch.manual_seed(0)
    exact = NETS[name]().double()
    for size in (28, 28), (150, 152):
        x = rand(2, 1, *size, dtype=dtype)
        for precision in dtype, torch.float32:       # weights as the images, and others
            net = copy.deepcopy(exact).to(precision)
            transformer = SpatialTransformer(net)
            y, said = transformer(x), net(x)
            wide = torch.promote_types(precision, torch.float32)
            assert y.dtype == dtype and y.isfinite().all() and said.dtype == wide
            assert transformer.angle(x).dtype == transformer.grid(x).dtype == wide
            assert furthest(said, exact(x.double())) < 20*torch.finfo(precision).eps
            assert furthest(y, warp(x.double(), said.double())) <= allowed(x, y)
    assert transformer(x[:0]).shape == x[:0].shape


@pytest.mark.parametrize('dtype', HALVES, ids=str)
def test_parts_of_a_transformer(dtype):
    "Places, angles and lengths in half precision are those of the same numbers in float32."
    t = theta(torch.zeros(5, 1, 20, 600)).to(dtype)
    c, s = (f(torch.arange(5.)).to(dtype) for f in (torch.cos, torch.sin))
    v = (600*rand(9, 2) - 300).to(dtype)
    parts = {
        'places': (lambda t: sampling_grid(t, (20, 600)), t),
        'angles': (lambda t: rotation_angle(t, 20, 600), t),
        'theta': (lambda c: rotation_theta(c, s.to(c.dtype), 20, 600), c),
    }
    for f, x in parts.values():
        assert f(x).dtype == torch.float32 and torch.equal(f(x), f(x.float()))
    assert torch.equal(unit(v), unit(v.float()).to(dtype))
    pooled = AreaPool2d(4)(torch.ones(1, 1, 300, 301, dtype=dtype))
    assert furthest(pooled, torch.ones_like(pooled)) < 4*torch.finfo(dtype).eps


# scaling and normalising

WHITE = {torch.uint8: 255, **dict.fromkeys(FLOATS, 1)}
SCALINGS = {
    'unit_range': unit_range,
    'normalize': lambda x: normalize(x, 0, 1),
    'prepare': lambda x: prepare(x, None, 0, 1),
    'prepare, turned': lambda x: prepare(x, torch.zeros(len(x)), (0,), [1]),
}


@pytest.mark.parametrize('dtype', [*LABELS, *FLOATS, *COMPLEX[1:]], ids=str)
@pytest.mark.parametrize('scaling', SCALINGS)
def test_pixels_of_any_dtype(scaling, dtype):
    f, x = SCALINGS[scaling], torch.tensor([0, 1]).to(dtype).reshape(1, 1, 1, 2)
    if dtype not in WHITE:
        with pytest.raises(ValueError, match='uint8 in'): f(x)
        return
    for default in FLOATS:
        with defaults(default): y = f(x*WHITE[dtype])
        assert y.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
        assert y.flatten().tolist() == [0, 1]


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('scaling', SCALINGS)
def test_floats_beyond_the_unit_range(scaling, dtype):
    f, x = SCALINGS[scaling], torch.tensor([0, 1]).to(dtype).reshape(1, 1, 1, 2)
    for beyond in 255*x, 2*x - 1, x + 1, 1.02*x, torch.full_like(x, math.inf):
        with pytest.raises(ValueError, match='must lie in'): f(beyond)
    assert f(1.005*x).dtype == f(x[:0]).dtype == dtype      # rounding may add a little


KINDS = {'float': lambda v: v[0], 'numpy float': lambda v: np.float32(v[0]),
         'tuple': tuple, 'list': list, 'array': np.array, 'tensor': torch.tensor,
         'tensors': lambda v: tuple(torch.tensor(v)),
         'shaped': lambda v: torch.tensor(v).view(-1, 1, 1)}


@pytest.mark.parametrize('kind', KINDS)
def test_statistics_of_any_kind(kind):
    x = rand(2, 1 if 'float' in kind else 3, 4, 4, dtype=torch.float32)
    mean, std = [.5, .25, .125], [.25, .5, 1.]
    m, s = (torch.tensor(v[:x.shape[1]]).view(-1, 1, 1) for v in (mean, std))
    assert torch.equal(normalize(x, KINDS[kind](mean), KINDS[kind](std)), (x - m)/s)


# reading pictures

def noise(*shape, high=256, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)


def stored(image, kind='PNG', **options):
    "A picture, written and opened again."
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


def with_alpha(image):
    "A picture with an alpha channel of noise."
    image = image.copy()
    image.putalpha(Image.fromarray(ALPHA))
    return image


def veiled(values): return np.round(values*(ALPHA.reshape(6, 8, 1)/255))
def painted(palette): return np.array(palette.convert('RGB'))


VALUES, COLOURS, ALPHA = noise(6, 8), noise(6, 8, 3), noise(6, 8)[::-1].copy()
WIDE = noise(6, 8, high=65536, dtype=np.uint16)
AS_BYTES = np.round(WIDE/257)
GREY, RGB, DEEP = map(Image.fromarray, (VALUES, COLOURS, WIDE))
INTS, REALS = WIDE.astype(np.int32), (WIDE/65535).astype(np.float32)
P, BITS = RGB.quantize(16), GREY.convert('1')
SHADE, COLOUR, DEPTH = int(VALUES[0, 0]), tuple(map(int, COLOURS[0, 0])), int(WIDE[0, 0])
HOLE = P.copy()
HOLE.info['transparency'] = 3
SOLID = (np.array(P) != 3)[..., None]
SWAPPED, FILLED = Image.fromarray(WIDE.astype('>u2')), WIDE != DEPTH
OTHER = (COLOURS != COLOURS[0, 0]).any(-1, keepdims=True)
UNSEEN = RGB.copy()
UNSEEN.putalpha(0)

# a picture, and the bytes (H, W) or (H, W, C) that it holds
PICTURES = {
    'grey': (GREY, VALUES),
    'grey, tiff': (stored(GREY, 'TIFF'), VALUES),
    'colour': (RGB, COLOURS),
    'colour, webp': (stored(RGB, 'WEBP', lossless=True), COLOURS),
    '1 bit': (stored(BITS), 255*np.array(BITS)),
    'palette': (stored(P), painted(P)),
    'palette, gif': (stored(P, 'GIF'), painted(P)),
    'palette with a hole': (stored(P, transparency=3), painted(P)*SOLID),
    'palette with a hole, in memory': (HOLE, painted(P)*SOLID),
    'palette and alpha': (P.convert('PA'), painted(P)),
    'one shade transparent': (stored(GREY, transparency=SHADE), VALUES*(VALUES != SHADE)),
    'one colour transparent': (stored(RGB, transparency=COLOUR), COLOURS*OTHER),
    'grey and alpha': (stored(with_alpha(GREY)), veiled(VALUES[..., None])),
    'colour and alpha': (stored(with_alpha(RGB)), veiled(COLOURS)),
    'quite transparent': (stored(UNSEEN), 0*COLOURS),
    'quite opaque': (stored(RGB.convert('RGBA')), COLOURS),
    '16 bits': (stored(DEEP), AS_BYTES),
    '16 bits, tiff': (stored(DEEP, 'TIFF'), AS_BYTES),
    '16 bits, other end first': (stored(SWAPPED, 'TIFF'), AS_BYTES),
    '16 bits in 32': (stored(Image.fromarray(INTS), 'TIFF'), AS_BYTES),
    '16 bits, one shade transparent': (stored(DEEP, transparency=DEPTH), AS_BYTES*FILLED),
    'floats': (stored(Image.fromarray(REALS), 'TIFF'), AS_BYTES),
    'cmyk': (stored(RGB.convert('CMYK'), 'TIFF'), COLOURS),
    'hsv': (RGB.convert('HSV'), np.array(RGB.convert('HSV').convert('RGB'))),
    'ycbcr': (RGB.convert('YCbCr'), np.array(RGB.convert('YCbCr').convert('RGB'))),
    'padded': (RGB.convert('RGBX'), COLOURS),
}


@pytest.mark.parametrize('name', PICTURES)
def test_pictures(name):
    image, array = PICTURES[name]
    found = _bytes(image)
    wanted = torch.from_numpy(array.reshape(6, 8, -1).astype(np.uint8)).movedim(-1, 0)
    assert found.dtype == torch.uint8 and torch.equal(found[0], wanted)
    x, y = _visit([(image, 1), (image, 0)], name, None)
    assert torch.equal(x, found.repeat(2, 1, 1, 1)) and y.tolist() == [1, 0]


PLANE = -2, -1
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x.flip(-1),
    3: lambda x: x.rot90(2, PLANE),
    4: lambda x: x.flip(-2),
    5: lambda x: x.mT,
    6: lambda x: x.rot90(-1, PLANE),
    7: lambda x: x.mT.rot90(2, PLANE),
    8: lambda x: x.rot90(1, PLANE),
}
KEEP_NOTES = {
    'png': (RGB, 'PNG'), 'grey png': (GREY, 'PNG'), 'deep png': (DEEP, 'PNG'),
    'png with alpha': (with_alpha(RGB), 'PNG'), 'palette': (P, 'PNG'),
    'webp': (RGB, 'WEBP'),
    'jpeg': (RGB, 'JPEG'), 'grey jpeg': (GREY, 'JPEG'), 'tiff': (RGB, 'TIFF'),
    'deep tiff': (DEEP, 'TIFF'),
}


@pytest.mark.parametrize('note', UPRIGHT)
@pytest.mark.parametrize('name', KEEP_NOTES)
def test_orientation(name, note):
    exif = Image.Exif()
    exif[0x0112] = note
    noted = _bytes(stored(*KEEP_NOTES[name], exif=exif))
    assert torch.equal(noted, UPRIGHT[note](_bytes(stored(*KEEP_NOTES[name]))))


UNREADABLE = {
    'beyond 16 bits': Image.fromarray(INTS + 65536),
    'negative': Image.fromarray(INTS - 70000),
    'floats beyond 1': Image.fromarray(2*REALS),
    'no numbers': Image.fromarray(REALS*np.float32(np.nan)),
    'a tensor': torch.zeros(3, 6, 8),
    'an array': VALUES,
    'nothing': None,
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_unreadable_pictures(name):
    with pytest.raises(ValueError): _bytes(UNREADABLE[name])
    with pytest.raises(ValueError, match='image 1 of some must be a whole picture'):
        _visit([(GREY, 0), (UNREADABLE[name], 0)], 'some', None)


@pytest.mark.parametrize('label', [None, 'cat', 1.5, (1, 2), -1, Image], ids=str)
def test_unreadable_labels(label):
    with pytest.raises(ValueError, match='image 0 of some'):
        _visit([(GREY, label)], 'some', None)


def eurosat(root, image, kind='png'):
    "EuroSAT's folders, with ten copies of a picture, as torchvision reads them."
    for i in range(10):
        path = root/'eurosat'/'2750'/f'class {i % 2}'/f'{i}.{kind}'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return lambda: from_torchvision('EuroSAT', root, download=False)


@pytest.mark.parametrize('image', [DEEP, with_alpha(GREY), with_alpha(RGB), P, BITS, GREY],
                         ids=lambda image: image.mode)
def test_torchvision_hands_on_what_is_stored(tmp_path, image):
    "Its own reader cuts 16 bits off at 255 and drops transparency."
    data = eurosat(tmp_path, image)()
    assert (torch.cat([data.train[0], data.test[0]]) == _bytes(image)).all()


DAMAGES = {
    'cut off': lambda b: b[:len(b)//2],
    'empty': lambda b: b'',
    'something else': lambda b: b'no picture',
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('kind', ['png', 'jpg', 'tif'])
def test_a_broken_picture_is_named(tmp_path, kind, damage):
    read = eurosat(tmp_path, Image.fromarray(noise(60, 80, 3)), kind)
    broken = tmp_path/'eurosat'/'2750'/'class 1'/f'3.{kind}'
    broken.write_bytes(DAMAGES[damage](broken.read_bytes()))
    with pytest.raises(ValueError) as error: read()
    assert str(broken) in str(error.value)


def test_arrays_of_other_dtypes_are_visited():
    class Floats:
        data, targets = torch.zeros(4, 6, 8), [0, 1, 0, 1]
        def __len__(self): return 4
        def __getitem__(self, i): return Image.fromarray(0*VALUES), self.targets[i]
    assert _arrays(Floats()) is None
    assert _visit(Floats(), 'floats', None)[0].dtype == torch.uint8


# labels

X, Y = torch.from_numpy(noise(8, 3, 6, 5)), torch.arange(8) % 4

# what no network can be trained on, and a word of the way out
SETS = {
    'one-hot': ((X, nn.functional.one_hot(Y)), 'argmax'),
    'a column': ((X, Y[:, None]), r'y\[:, 0\]'),
    'floats': ((X, Y.float()), r'y.long\(\)'),
    'fractions': ((X, Y/2), 'whole numbers'),
    'too few': ((X, Y[:7]), 'each image its label'),
    'a list': ((X, Y.tolist()), 'as_tensor'),
    'negative': ((X, Y - 1), 'at least 0, got -1'),
    'beyond the classes': ((X, Y + 1), 'below classes = 4, got 4'),
    'channels last': ((X.movedim(1, -1), Y), 'movedim'),
    'no channel': ((X[:, 0], Y), r'x\[:, None\]'),
    'one image': ((X[0], Y[:1]), 'must be uint8'),
    'floating images': ((X/255, Y), 'round'),
    '16 bits': ((X.to(torch.uint16), Y), 'must be uint8'),
    'signed': ((X.long(), Y), 'must be uint8'),
    'none': ((X[:0], Y[:0]), 'at least one'),
    'images alone': (X, 'write'),
    'another size': ((X[..., 1:], Y), 'of one shape'),
}


@pytest.mark.parametrize('name', SETS)
def test_sets_that_cannot_work(name):
    bad, said = SETS[name]
    for parts in (bad, (X, Y)), ((X, Y), bad):
        with pytest.raises(ValueError, match=said): image_data('some', *parts, classes=4)


def test_a_channel_that_never_changes():
    with pytest.raises(ValueError, match='must vary'): image_data('some', (0*X, Y), (X, Y))
    assert image_data('some', (X, Y), (0*X, Y))      # nobody divides by that of the test


@pytest.mark.parametrize('dtype', LABELS, ids=str)
def test_labels_of_any_whole_dtype(dtype):
    y = (Y % 2).to(dtype)
    data = image_data('some', (X, y), (X.numpy(), y.numpy()))
    assert data.classes == 2
    for _, found in data.train, data.test:
        assert found.dtype == torch.int64 and found.tolist() == (Y % 2).tolist()


# torch's defaults

def facts(data): return [*data.train, *data.test, data.mean, data.std, data.hash]


MIRROR = [[0, 1], [1, 0]], [[[1, 0], [0, 1]], [[-1, 0], [0, 1]]]

# what must not depend on the defaults
STABLE = {
    'mnist': lambda: mnist(False),
    'split': lambda: split(100, [50, 20]),
    'random_angles': lambda: [random_angles(9, torch.Generator().manual_seed(0))],
    'rotate': lambda: [rotate(X, angles(X))],
    'rotate by a list': lambda: [rotate(X, [0, 30, 45, 60, 90, 120, 150, 180])],
    'rotate_once': lambda: rotate_once(X),
    'content_hash': lambda: [content_hash(X, Y)],
    'normalize': lambda: [normalize(X, [.1, .2, .3], .5)],
    'pixel_statistics': lambda: pixel_statistics(X),
    'image_data': lambda: facts(image_data('some', (X, Y), (X, Y))),
    'resize': lambda: [resize(X, 9)],
    'digits': lambda: facts(digits()),
    'digits, resized': lambda: facts(load_dataset('digits', size=9)),
    'draw_rot': draw_rot,
    'chirality': lambda: [chirality(X[:, :1])],
    'pictures': lambda: _visit([(GREY, 0)]*2, 'some', None),
    'C12': lambda: [CyclicGroup(12).table, CyclicGroup(12).matrices],
    'D6': lambda: [DihedralGroup(6).table, DihedralGroup(6).matrices],
    'a subgroup': lambda: [D4.subgroup([0, 2]).table],
    'a group of your own': lambda: [FiniteGroup(*MIRROR).matrices],
    'basis': lambda: [basis_operator(C8, 5), basis_operator(C8, 5, 'bilinear')],
    'act': lambda: [act(C8, 1, X.float()), act(C8, 1, X.half()), act(C8, 2, X)],
    'act on labels': lambda: [act(C8, 1, X, 'nearest')],
    'disc': lambda: [disc(300, 301)],
    'smooth_images': lambda: [smooth_images(2, 33)],
    'equivariance_error': lambda: [equivariance_error(lambda x: x, C8, X.float())],
    'other shapes': lambda: [equivariance_error(lambda x: x[..., 1:], C4, X.float())],
}
DEFAULTS = [(torch.float64, 'cpu'), (torch.bfloat16, 'cpu'), (torch.float32, 'meta'),
            (torch.float64, 'meta')]


def same(a, b):
    if not isinstance(a, torch.Tensor): return a == b
    return torch.equal(a, b) and (a.dtype, a.device) == (b.dtype, b.device)


@pytest.mark.parametrize('dtype, device', DEFAULTS, ids=str)
@pytest.mark.parametrize('name', STABLE)
def test_defaults_change_nothing(name, dtype, device):
    wanted = STABLE[name]()
    with defaults(dtype, device): found = STABLE[name]()
    assert all(same(*pair) for pair in zip(wanted, found, strict=True))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_torchvisions_noise_is_the_same(dtype, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.FakeData, '__len__', lambda self: 10)
    def fake(): return from_torchvision('FakeData', image_size=(1, 8, 8), num_classes=3)
    wanted = fake()
    with defaults(dtype, 'meta'): assert fake().hash == wanted.hash


@pytest.mark.parametrize('make', [*NETS.values(), published_transformer])
def test_transformers_follow_the_defaults(make):
    "As torch's own layers do."
    with defaults(torch.float64): made = make()
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    with defaults(device='meta'): made = make()
    assert {p.device.type for p in made.parameters()} == {'meta'}
    with defaults(device='meta'): made = LocalizationNet(device='cpu')
    assert made.regressor.bias.tolist() == [1, 0]
