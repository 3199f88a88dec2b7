"Every dtype through everything that moves, measures or reads images. The next dtype, function or picture is a line."
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

from gcnn_stn.data import (content_hash, mnist, normalize, prepare, random_angles, rotate, rotate_once, rotation_grid,
                           sample, split, unit_range)
from gcnn_stn.dataset import (_arrays, _bytes, _visit, chirality, digits, draw_rot, from_torchvision, image_data,
                              load_dataset, pixel_statistics, resize)
from gcnn_stn.equivariance import disc, equivariance_error, smooth_images
from gcnn_stn.group import CyclicGroup, DihedralGroup, FiniteGroup, act, transform_image
from gcnn_stn.kernel import basis_operator
from gcnn_stn.stn import (AreaPool2d, LocalizationNet, PublishedLocalizationNet, SpatialTransformer, published_transformer,
                          rotation_angle, rotation_theta, sampling_grid, unit, warp)
from gcnn_stn.subgroup import act_on_cosets

C4, C8, D4 = CyclicGroup(4), CyclicGroup(8), DihedralGroup(4)
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
          torch.uint16, torch.uint32, torch.uint64)


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def angles(x): return 360*torch.rand(len(x), generator=seeded(1), dtype=torch.float64)
def theta(x): return rotation_theta(*(f(torch.deg2rad(angles(x))) for f in (torch.cos, torch.sin)), *x.shape[-2:])


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
    'sample': lambda x: sample(x, rotation_grid(angles(x), *x.shape[-2:], torch.float64)),
    'sample bicubic': lambda x: sample(x, rotation_grid(angles(x), *x.shape[-2:], torch.float64), 'bicubic', 'border'),
    'image': lambda x: act(C8, 1, x),
    'image bicubic': lambda x: act(C8, 3, x, 'bicubic'),
    'image nearest': lambda x: act(C8, 3, x, 'nearest'),
    'image on the lattice': lambda x: act(C8, 2, x),
    'mirror': lambda x: act(DihedralGroup(8), 9, x),
    'feature': lambda x: act(C8, 1, x[:, :, None].expand(-1, -1, 8, -1, -1)),
    'cosets': lambda x: act_on_cosets(C8, [0, 4], 1, x[:, :, None].expand(-1, -1, 4, -1, -1)),
    'without channels': lambda x: transform_image(x.sum(1)/3, C8.matrix(1)),
    'alone': lambda x: transform_image(x.sum((0, 1))/6, C8.matrix(1)),
    'matrix in float32': lambda x: transform_image(x, C8.matrix(1).float()),
    'warp': lambda x: warp(x, theta(x)),
    'warp by float32': lambda x: warp(x, theta(x).float(), 'zeros'),
}
SIZES = {'small': (2, 3, 9, 7), 'large': (2, 1, 300, 301), 'empty': (0, 3, 9, 7), 'no channels': (2, 0, 9, 7), 'wide': (1, 1, 2, 700)}


def precision(x, y):
    "What one rounding of `x` costs, and what float32 costs in the places read."
    step = x.abs().max().item()*torch.finfo(x.dtype).eps if x.numel() else 0
    return step + (0 if x.dtype == torch.float64 else 4e-6*max(x.shape[-2:], default=0))


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('move', MOVES)
def test_images_keep_dtype_and_precision(move, dtype):
    for name, shape in SIZES.items():
        if 'nearest' in move and name == 'large': continue    # a tie may go either way
        f, x = MOVES[move], torch.rand(shape, generator=seeded(), dtype=torch.float64).to(dtype).requires_grad_()
        y = f(x)
        assert (y.dtype, y.requires_grad) == (dtype, True), name
        exact = f(x.detach().double())
        assert torch.isfinite(y).all(), name
        assert not y.numel() or (y.double() - exact).abs().max() <= precision(x, y), name
        if y.numel(): assert torch.autograd.grad(y.sum(), x)[0].isfinite().all(), name
        with torch.autocast('cpu', torch.bfloat16): assert torch.equal(f(x), y), f'{name}, autocast'


@pytest.mark.parametrize('dtype', LABELS, ids=str)
@pytest.mark.parametrize('group', [C8, CyclicGroup(3), DihedralGroup(8)], ids=str)
def test_labels_move_whole_or_not_at_all(group, dtype):
    top = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    labels = torch.zeros(2, 1, 40, 31, dtype=torch.int64).to(dtype)
    labels[..., 5:30, 4:20] = top
    for x in labels, labels[:0], labels[:, 0], labels[:, :, None].expand(-1, -1, group.order, -1, -1):
        for g in group.elements():
            def move(mode): return transform_image(x, group.matrix(g), mode) if x.ndim == 3 else act(group, g, x, mode)
            moved = move('nearest')
            where = move_floats(group, g, x, top)
            assert moved.dtype == dtype and torch.equal(moved.double() == top, where)
            assert set(moved.double().unique().tolist()) <= {0., float(top)}
            for mode in 'bilinear', 'bicubic':
                if group.lattice[g]: assert torch.equal(move(mode).double(), moved.double())    # nothing is averaged
                else:
                    with pytest.raises(ValueError, match="mode must be 'nearest'"): move(mode)


def move_floats(group, g, x, top):
    "Where the label goes, according to floats."
    ones = (x.double() == top).double()
    moved = transform_image(ones, group.matrix(g), 'nearest') if x.ndim == 3 else act(group, g, ones, 'nearest')
    return moved == 1


@pytest.mark.parametrize('dtype', [torch.complex32, torch.complex64, torch.complex128], ids=str)
@pytest.mark.filterwarnings('ignore:ComplexHalf')
def test_complex_images(dtype):
    x = torch.complex(*torch.rand(2, 2, 3, 9, 8, generator=seeded(), dtype=torch.float64))
    for group, mode in (C8, 'bilinear'), (D4, 'bilinear'), (C8, 'nearest'), (C8, 'bicubic'):
        for g in group.elements():
            y = act(group, g, x.to(dtype), mode)
            exact = torch.complex(act(group, g, x.real, mode), act(group, g, x.imag, mode))
            assert y.dtype == dtype and (y.to(exact.dtype) - exact).abs().max() < (2e-3 if dtype == torch.complex32 else 1e-5)


BAD_PLACES = {
    'rotate': lambda v: rotate(torch.ones(2, 1, 5, 5), torch.tensor([0., v])),
    'rotate bytes': lambda v: rotate(torch.ones(2, 1, 5, 5).byte(), [0., v]),
    'rotate half': lambda v: rotate(torch.ones(1, 1, 5, 5), torch.tensor([v]).half()),
    'prepare': lambda v: prepare(torch.ones(1, 1, 5, 5), torch.tensor([v])),
    'rotation_grid': lambda v: rotation_grid(torch.tensor([v]), 5, 5, torch.float32),
    'transform_image': lambda v: transform_image(torch.ones(1, 1, 5, 5), torch.tensor([[1., 0], [v, 1]])),
    'all of a matrix': lambda v: transform_image(torch.ones(1, 1, 5, 5), torch.full((2, 2), v)),
    'warp': lambda v: warp(torch.ones(1, 1, 5, 5), torch.full((1, 2, 3), v)),
    'a group': lambda v: FiniteGroup([[0]], [[[v, 0], [0, 1]]]),
    'a table': lambda v: FiniteGroup([[v]], [[[1, 0], [0, 1]]]),
    'mean': lambda v: normalize(torch.ones(1, 1, 5, 5), mean=v),
    'std': lambda v: normalize(torch.ones(1, 1, 5, 5), std=(v,)),
    'smooth_images': lambda v: smooth_images(detail=v),
}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('name', BAD_PLACES)
def test_no_number_is_refused(name, value):
    with pytest.raises(ValueError): BAD_PLACES[name](value)


# measuring

@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('size', [65, 301])
def test_error_is_the_maps_own(dtype, size):
    "An exact map errs by what its storing costs; a map with a direction, by as much as in float64."
    x = smooth_images(2, size, dtype=dtype)
    assert equivariance_error(lambda x: x, C8, x).max() < torch.finfo(dtype).eps
    conv = nn.Conv2d(1, 2, 5, bias=False).double()
    with torch.no_grad(): conv.weight.copy_(torch.randn(2, 1, 5, 5, generator=seeded(), dtype=torch.float64))
    exact, own = (equivariance_error(conv.to(d), C8, x.to(d)).double() for d in (torch.float64, dtype))
    assert (own[1:]/exact[1:] - 1).abs().max() < 50*torch.finfo(dtype).eps + 1e-4
    with torch.autocast('cpu', torch.bfloat16): assert equivariance_error(lambda x: x, C8, x).max() < torch.finfo(dtype).eps


@pytest.mark.parametrize('scale', [1e-6, 1e4])
def test_measuring_neither_overflows_nor_vanishes(scale):
    x = (smooth_images(4, 65, dtype=torch.float32)*scale).half()
    assert 0 <= equivariance_error(lambda x: x.clamp(-6e4, 6e4), C4, x).max() < 1e-6


# spatial transformers

def seen(net, x):
    net = SpatialTransformer(net)
    return net(x), net.theta(x), net.angle(x), net.grid(x)


@pytest.mark.parametrize('dtype', FLOATS, ids=str)
@pytest.mark.parametrize('make', [LocalizationNet, PublishedLocalizationNet, lambda **k: PublishedLocalizationNet(init='random'),
                                  lambda: LocalizationNet(transformation='affine')], ids=['own', 'identity', 'random', 'affine'])
def test_transformers(make, dtype):
    torch.manual_seed(0)
    exact = make().double()
    for size in (28, 28), (300, 302):
        x = torch.rand(2, 1, *size, generator=seeded()).to(dtype)
        for precise in dtype, torch.float32:             # weights as the images, and weights in float32
            net = copy.deepcopy(exact).to(precise)
            y, said, angle, grid = seen(net, x)
            assert (y.dtype, said.dtype, angle.dtype, grid.dtype) == (dtype, *[torch.promote_types(precise, torch.float32)]*3)
            assert (said.double() - exact(x.double())).abs().max() < 20*torch.finfo(precise).eps
            assert (y.double() - warp(x.double(), said.double(), 'border')).abs().max() <= precision(x, y)
    assert seen(net, x[:0])[0].shape == x[:0].shape


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_parts_of_a_transformer(dtype):
    "Places, angles and lengths come out of half precision as of the same numbers in float32."
    t = theta(torch.zeros(5, 1, 20, 600)).to(dtype)
    c, s = (f(torch.arange(5.)).to(dtype) for f in (torch.cos, torch.sin))
    v = (300*torch.randn(9, 2, generator=seeded())).to(dtype)
    for f, args in (sampling_grid, (t, (20, 600))), (rotation_angle, (t, 20, 600)), (rotation_theta, (c, s, 20, 600)):
        wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
        assert torch.equal(f(*args), f(*wide)) and f(*args).dtype == torch.float32
    assert torch.equal(unit(v), unit(v.float()).to(dtype))
    assert (AreaPool2d(4)(torch.ones(1, 1, 300, 301, dtype=dtype)).float() - 1).abs().max() < 4*torch.finfo(dtype).eps


# scaling and normalising

WHITE = {torch.uint8: 255, **dict.fromkeys(FLOATS, 1)}


@pytest.mark.parametrize('dtype', [*LABELS, *FLOATS, torch.complex64], ids=str)
def test_unit_range(dtype):
    x = torch.tensor([0, 1]).to(dtype).reshape(1, 1, 1, 2)
    fs = unit_range, lambda x: normalize(x, 0, 1), lambda x: prepare(x, None, 0, 1), lambda x: prepare(x, torch.zeros(len(x)), (0,), [1])
    for f in fs:
        if dtype not in WHITE:
            with pytest.raises(ValueError, match='uint8 in'): f(x)
            continue
        for value in (torch.float32, torch.float64, torch.float16):
            with defaults(value): y = f(x*WHITE[dtype])
            assert y.dtype == (torch.float32 if dtype == torch.uint8 else dtype) and y.flatten().tolist() == [0, 1]
        if dtype == torch.uint8: continue
        for beyond in 255*x, 2*x - 1, x + 1, 1.02*x.double().to(dtype)*(1 + .01), x/0:
            with pytest.raises(ValueError, match='must lie in'): f(beyond.to(dtype))
        assert f(x[:0]).dtype == dtype and f(x*1.005).dtype == dtype     # interpolation may add a little


@pytest.mark.parametrize('kind', [float, tuple, list, np.array, torch.tensor, np.float32, lambda v: torch.tensor(v).view(-1, 1, 1)])
def test_statistics_of_any_kind(kind):
    x = torch.rand(2, 1 if kind in (float, np.float32) else 3, 4, 4, generator=seeded())
    mean, std = (v if x.shape[1] == 3 else v[0] for v in ([.5, .25, .125], [.25, .5, 1.]))
    like = torch.tensor([mean, std]).reshape(2, 1, -1, 1, 1)
    assert torch.equal(normalize(x, kind(mean), kind(std)), (x - like[0])/like[1])


# reading pictures

def noise(*shape, high=256, dtype=np.uint8): return np.random.default_rng(0).integers(0, high, shape, dtype=dtype)
def stored(image, kind='PNG', **options):
    "A picture, written and opened again."
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


GREY, RGB, DEEP, ALPHA = noise(6, 8), noise(6, 8, 3), noise(6, 8, high=65536, dtype=np.uint16), noise(6, 8)
def on_black(values, alpha): return np.round(values*(alpha/255)).astype(np.uint8)
def with_alpha(mode, values): return Image.merge(mode, [*map(Image.fromarray, (*np.moveaxis(values, -1, 0), ALPHA))])
def palette(values): return Image.fromarray(values).quantize(16, dither=Image.Dither.NONE)
def paletted(image): return np.array(image.convert('RGB'))
LA, RGBA = with_alpha('LA', GREY[..., None]), with_alpha('RGBA', RGB)
P, MASK = palette(RGB), Image.fromarray(GREY).convert('1')
PAIR = P.copy()
PAIR.info['transparency'] = 3
SOLID = np.array(P) != 3

# a picture, and the bytes (H, W) or (H, W, 3) that it holds
PICTURES = {
    'grey': (Image.fromarray(GREY), GREY),
    'grey tiff': (stored(Image.fromarray(GREY), 'TIFF'), GREY),
    'colour': (Image.fromarray(RGB), RGB),
    'colour webp': (stored(Image.fromarray(RGB), 'WEBP', lossless=True), RGB),
    '1 bit': (stored(MASK), 255*np.array(MASK).astype(np.uint8)),
    'palette': (stored(P), paletted(P)),
    'palette gif': (stored(P, 'GIF'), paletted(P)),
    'palette, one colour transparent': (stored(P, transparency=3), paletted(P)*SOLID[..., None]),
    'palette in memory, one transparent': (PAIR, paletted(P)*SOLID[..., None]),
    'palette and alpha': (P.convert('PA'), paletted(P)),
    'grey, one shade transparent': (stored(Image.fromarray(GREY), transparency=int(GREY[0, 0])), GREY*(GREY != GREY[0, 0])),
    'colour, one transparent': (stored(Image.fromarray(RGB), transparency=tuple(map(int, RGB[0, 0]))),
                                RGB*(RGB != RGB[0, 0]).any(-1, keepdims=True)),
    'grey and alpha': (stored(LA), on_black(GREY, ALPHA)),
    'grey and alpha, premultiplied': (LA.convert('La'), None),
    'colour and alpha': (stored(RGBA), on_black(RGB, ALPHA[..., None])),
    'alpha of nought': (stored(Image.merge('RGBA', (*Image.fromarray(RGB).split(), Image.new('L', (8, 6))))), 0*RGB),
    'alpha of one': (stored(Image.fromarray(RGB).convert('RGBA')), RGB),
    '16 bits': (stored(Image.fromarray(DEEP)), np.round(DEEP/257)),
    '16 bits tiff': (stored(Image.fromarray(DEEP), 'TIFF'), np.round(DEEP/257)),
    '16 bits, other end first': (stored(Image.fromarray(DEEP.astype('>u2')), 'TIFF'), np.round(DEEP/257)),
    '16 bits in 32': (stored(Image.fromarray(DEEP.astype(np.int32)), 'TIFF'), np.round(DEEP/257)),
    '16 bits, one shade transparent': (stored(Image.fromarray(DEEP), transparency=int(DEEP[0, 0])),
                                       np.round(DEEP/257)*(DEEP != DEEP[0, 0])),
    'floats': (stored(Image.fromarray((DEEP/65535).astype(np.float32)), 'TIFF'), np.round(DEEP/257)),
    'cmyk': (stored(Image.fromarray(RGB).convert('CMYK'), 'TIFF'), RGB),
    'hsv': (Image.fromarray(RGB).convert('HSV'), None),
    'ycbcr': (Image.fromarray(RGB).convert('YCbCr'), None),
    'padded': (Image.fromarray(RGB).convert('RGBX'), RGB),
}


@pytest.mark.parametrize('name', PICTURES)
def test_pictures(name):
    image, array = PICTURES[name]
    if array is None: array = np.array(image.convert('LA').convert('L') if image.mode == 'La' else image.convert('RGB'))
    if image.mode == 'La': array = on_black(np.array(image.convert('LA'))[..., 0], ALPHA)
    found = _bytes(image)
    wanted = torch.from_numpy(array.reshape(6, 8, -1).astype(np.uint8)).movedim(-1, 0)
    assert found.dtype == torch.uint8 and torch.equal(found[0], wanted)
    x, y = _visit([(image, 1), (image, 0)], name, None)
    assert torch.equal(x, found.repeat(2, 1, 1, 1)) and y.tolist() == [1, 0]


UPRIGHT = {1: lambda x: x, 2: lambda x: x.flip(-1), 3: lambda x: x.rot90(2, (-2, -1)), 4: lambda x: x.flip(-2), 5: lambda x: x.mT,
           6: lambda x: x.rot90(-1, (-2, -1)), 7: lambda x: x.mT.rot90(2, (-2, -1)), 8: lambda x: x.rot90(1, (-2, -1))}


@pytest.mark.parametrize('note', UPRIGHT)
@pytest.mark.parametrize('kind, mode', [('PNG', 'RGB'), ('PNG', 'L'), ('PNG', 'I;16'), ('PNG', 'RGBA'), ('PNG', 'P'), ('JPEG', 'RGB'),
                                        ('JPEG', 'L'), ('TIFF', 'RGB'), ('TIFF', 'I;16'), ('WEBP', 'RGB')])
def test_orientation(kind, mode, note):
    image = {'RGB': Image.fromarray(RGB), 'L': Image.fromarray(GREY), 'I;16': Image.fromarray(DEEP), 'RGBA': RGBA, 'P': P}[mode]
    exif = Image.Exif()
    exif[0x0112] = note
    assert torch.equal(_bytes(stored(image, kind, exif=exif)), UPRIGHT[note](_bytes(stored(image, kind))))


UNREADABLE = {
    'whole numbers beyond 16 bits': Image.fromarray(DEEP.astype(np.int32) + 65536),
    'negative': Image.fromarray(DEEP.astype(np.int32) - 70000),
    'floats beyond 1': Image.fromarray(DEEP.astype(np.float32)),
    'no numbers': Image.fromarray(np.full((6, 8), np.nan, np.float32)),
    'a tensor': torch.zeros(3, 6, 8),
    'an array': GREY,
    'nothing': None,
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_unreadable_pictures(name):
    with pytest.raises(ValueError): _bytes(UNREADABLE[name])
    with pytest.raises(ValueError, match='image 1 of some must be a whole picture'):
        _visit([(Image.fromarray(GREY), 0), (UNREADABLE[name], 0)], 'some', None)


def folder(root, save, kind='png', n=10):
    "EuroSAT's folders, with pictures of our own."
    for i in range(n):
        path = root/'eurosat'/'2750'/f'class {i % 2}'/f'{i}.{kind}'
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, i)
    return lambda **options: from_torchvision('EuroSAT', root, download=False, **options)


def all_of(data): return torch.cat([data.train[0], data.test[0]])


def test_torchvision_hands_on_what_is_stored(tmp_path):
    "Torchvision's own reader cuts 16 bits off at 255 and drops transparency."
    deep, clear = (folder(tmp_path/name, lambda path, i: image.save(path))() for name, image in
                   (('deep', Image.fromarray(DEEP)), ('clear', LA)))
    assert deep.shape == clear.shape == (1, 6, 8)
    assert (all_of(deep) == torch.from_numpy(np.round(DEEP/257)).byte()).all()
    assert (all_of(clear) == torch.from_numpy(on_black(GREY, ALPHA))).all()


@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'no picture', lambda b: b[:20] + b'\xff'*20 + b[40:]])
@pytest.mark.parametrize('kind', ['png', 'jpg', 'tif'])
def test_a_broken_picture_is_named(tmp_path, kind, damage):
    read = folder(tmp_path, lambda path, i: Image.fromarray(noise(60, 80, 3)).save(path), kind)
    broken = tmp_path/'eurosat'/'2750'/'class 1'/f'3.{kind}'
    broken.write_bytes(damage(broken.read_bytes()))
    try: read(size=9)
    except ValueError as e: assert str(broken) in str(e)
    else: assert kind == 'jpg' and damage(b'x'*60)[20:40] == b'\xff'*20      # a header that nobody needs


def test_arrays_of_other_dtypes_are_visited():
    class Floats:
        data, targets = torch.rand(4, 6, 8), [0, 1, 0, 1]
        def __len__(self): return 4
        def __getitem__(self, i): return Image.fromarray(GREY), self.targets[i]
    assert _arrays(Floats()) is None and _visit(Floats(), 'floats', None)[0].dtype == torch.uint8


# labels

X, Y = torch.from_numpy(noise(8, 3, 6, 5)), torch.arange(8) % 4
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
    'flat': ((0*X, Y), 'must vary'),
}


@pytest.mark.parametrize('part', ['training', 'test'])
@pytest.mark.parametrize('name', SETS)
def test_sets_that_cannot_work(name, part):
    bad, said = SETS[name]
    if (name, part) == ('flat', 'test'): return      # nobody divides by the spread of test images
    good = (X, Y)
    with pytest.raises(ValueError, match=said): image_data('some', *((bad, good) if part == 'training' else (good, bad)), classes=4)


@pytest.mark.parametrize('dtype', [*LABELS], ids=str)
def test_labels_of_any_whole_dtype(dtype):
    y = (Y % 2).to(dtype)
    data = image_data('some', (X, y), (X.numpy(), y.numpy()))
    assert data.train[1].dtype == torch.int64 and data.classes == 2 and data.test[1].tolist() == y.tolist()


# torch's defaults

def trained(data): return [*data.train, *data.test, data.mean, data.std, data.hash]


# what must not depend on the defaults; the next function is a line
STABLE = {
    'mnist': lambda: mnist(False),
    'split': lambda: split(100, [50, 20]),
    'random_angles': lambda: [random_angles(9, seeded())],
    'rotate': lambda: [rotate(X, torch.arange(8., dtype=torch.float32, device='cpu'))],
    'rotate by a list': lambda: [rotate(X, [0, 30, 45, 60, 90, 120, 150, 180])],
    'rotate_once': lambda: rotate_once(X),
    'content_hash': lambda: [content_hash(X, Y)],
    'normalize': lambda: [normalize(X, [.1, .2, .3], .5)],
    'pixel_statistics': lambda: pixel_statistics(X),
    'image_data': lambda: trained(image_data('some', (X, Y), (X, Y))),
    'resize': lambda: [resize(X, 9)],
    'digits': lambda: trained(digits()),
    'digits, resized': lambda: trained(load_dataset('digits', size=9)),
    'draw_rot': draw_rot,
    'chirality': lambda: [chirality(X[:, :1])],
    '_visit': lambda: _visit([(Image.fromarray(GREY), 0)]*2, 'some', None),
    'C12': lambda: [CyclicGroup(12).table, CyclicGroup(12).matrices],
    'D6': lambda: [DihedralGroup(6).table, DihedralGroup(6).matrices],
    'subgroup': lambda: [D4.subgroup([0, 2]).table],
    'own group': lambda: [FiniteGroup([[0, 1], [1, 0]], [[[1, 0], [0, 1]], [[-1, 0], [0, 1]]]).matrices],
    'basis': lambda: [basis_operator(C8, 5), basis_operator(C8, 5, 'bilinear')],
    'act': lambda: [act(C8, 1, X.float()), act(C8, 1, X.half()), act(C8, 2, X), act(C8, 1, X, 'nearest')],
    'disc': lambda: [disc(300, 301)],
    'smooth_images': lambda: [smooth_images(2, 33)],
    'equivariance_error': lambda: [equivariance_error(lambda x: x, C8, X.float())],
    'shapes that differ': lambda: [equivariance_error(lambda x: x[..., 1:], C4, X.float())],
}


@pytest.mark.parametrize('dtype, device', [(torch.float64, 'cpu'), (torch.bfloat16, 'cpu'), (torch.float32, 'meta'), (torch.float64, 'meta')], ids=str)
@pytest.mark.parametrize('name', STABLE)
def test_defaults_change_nothing(name, dtype, device):
    with defaults(): wanted = STABLE[name]()
    with defaults(dtype, device): found = STABLE[name]()
    for a, b in zip(wanted, found):
        same = torch.equal(a, b) and (a.dtype, a.device) == (b.dtype, b.device) if isinstance(a, torch.Tensor) else a == b
        assert same


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_noise_of_torchvision_under_other_defaults(dtype, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.FakeData, '__len__', lambda self: 10)
    def fake(): return from_torchvision('FakeData', image_size=(1, 8, 8), num_classes=3)
    wanted = fake()
    with defaults(dtype, 'meta'): assert fake().hash == wanted.hash


@pytest.mark.parametrize('make', [LocalizationNet, PublishedLocalizationNet, published_transformer], ids=lambda f: f.__name__)
def test_transformers_follow_the_defaults(make):
    "As torch's own layers do."
    with defaults(torch.float64): assert {p.dtype for p in make().parameters()} == {torch.float64}
    with defaults(device='meta'): assert {p.device.type for p in make().parameters()} == {'meta'}
    with defaults(device='meta'):
        if make is LocalizationNet: assert make(device='cpu').regressor.bias.tolist() == [1, 0]
