"""Wrong arguments: every argument of every function gets every odd value.

Either the function works, or a ValueError says why not. The next function is a line."""
import math
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import gcnn_stn.study.data as loading
from gcnn_stn import data, equivariance, group, stn
from gcnn_stn.study import images, rot

C4, C8 = group.CyclicGroup(4), group.CyclicGroup(8)
GREY = torch.rand(4, 1, 9, 9)
BYTES = (255*GREY).byte()
LABELS = torch.arange(4)
PAIR = BYTES, LABELS
ZEROS = torch.zeros(4)
TURN = torch.eye(2, 3).expand(4, 2, 3)

ODD = {
    'None': None,
    'True': True,
    'zero': 0,
    'negative': -1,
    'fraction': 2.7,
    'whole float': 1.,
    'nan': math.nan,
    'infinity': math.inf,
    'huge': 10**20,
    'complex': 1j,
    'empty text': '',
    'text': 'x',
    'bytes': b'x',
    'empty list': [],
    'list': [1, 2, 3],
    'ragged': [[1], [1, 2]],
    'dict': {},
    'object': object(),
    'a type': int,
    'numpy': np.arange(3),
    'scalar': torch.tensor(1),
    'vector': torch.arange(3),
    'empty': torch.zeros(0),
    'nan tensor': torch.full((4, 1, 9, 9), math.nan),
    'int images': BYTES.long(),
    'bool images': BYTES > 99,
    'complex images': torch.complex(GREY, GREY),
    'half images': GREY.half(),
    'no pixels': torch.zeros(4, 1, 0, 9),
    'no images': GREY[:0],
    'one image': GREY[0],
    'more than unit': 255*GREY,
    'channels last': torch.zeros(4, 9, 9, 3),
}

# a right call of each function
RIGHT = {
    data.user_path: dict(path='x'),
    data.mnist: dict(train=False, root=None, download=False),
    data.show_images: dict(x=GREY, ncols=2, titles=None, axs=None, size=.5),
    data.sample: dict(x=GREY, grid=torch.zeros(4, 9, 9, 2), mode='bilinear',
                      padding_mode='zeros'),
    data.rotation_grid: dict(degrees=ZEROS, height=9, width=9, dtype=torch.float32),
    data.rotate: dict(x=GREY, degrees=ZEROS, fill='border'),
    data.random_angles: dict(n=4, generator=None),
    data.rotate_once: dict(x=GREY, seed=0, fill=.5),
    data.unit_range: dict(x=GREY),
    data.normalize: dict(x=GREY, mean=.1, std=.2),
    data.prepare: dict(x=GREY, degrees=ZEROS, mean=.1, std=.2, fill=0),
    data.split: dict(n=9, sizes=[3, 2], seed=0),
    images.pixel_statistics: dict(x=BYTES),
    images.image_data: dict(name='x', train=PAIR, test=PAIR, classes=4, fill=0),
    images.resize: dict(x=BYTES, size=5),
    rot.draw_rot: dict(seed=0),
    rot.read_amat: dict(path='x', lines=None),
    rot.chirality: dict(x=GREY),
    rot.is_mirrored: dict(x=GREY, y=LABELS),
    rot.mnist_rot_original: dict(folder='x'),
    partial(loading.from_torchvision, download=False):
        dict(name='KMNIST', root='x', size=None),
    loading.load_dataset: dict(name='digits', root=None, download=False, size=None),
    group.check_table: dict(table=C4.table),
    group.check_matrices: dict(table=C4.table, matrices=C4.matrices),
    group.FiniteGroup: dict(table=C4.table, matrices=C4.matrices),
    group.CyclicGroup: dict(order=4),
    group.DihedralGroup: dict(n=4),
    C8.element: dict(g=1),
    C8.product: dict(g=1, h=2),
    C8.inverse: dict(g=1),
    C8.matrix: dict(g=1),
    C8.subgroup: dict(elements=[0, 4]),
    group.transform_image: dict(x=GREY, matrix=C8.matrix(1), mode='bilinear'),
    group.act: dict(group=C8, g=1, x=GREY, mode='bilinear'),
    equivariance.disc: dict(height=9, width=9),
    equivariance.equivariance_error: dict(f=lambda x: x, group=C8, x=GREY, elements=None),
    equivariance.smooth_images: dict(n=1, size=9, channels=1, detail=.05, seed=0,
                                     dtype=torch.float32),
    equivariance.size_rule: dict(size=9, kernel_size=3, stride=1, padding=0, dilation=1),
    stn.rotation_theta: dict(cos=ZEROS, sin=ZEROS, height=9, width=9),
    stn.rotation_angle: dict(theta=TURN, height=9, width=9),
    stn.sampling_grid: dict(theta=TURN, size=(9, 9)),
    stn.unit: dict(v=torch.ones(4, 2), eps=1e-6),
    stn.SpatialLayerNorm: dict(eps=1e-5),
    stn.warp: dict(x=GREY, theta=TURN, padding_mode='border', size=(9, 9)),
    stn.AreaPool2d: dict(size=2),
    stn.LocalizationNet: dict(in_channels=1, channels=2, transformation='rotation',
                              kernel_size=3, position=2, gain=.01),
    stn.LocalizationNet(1, 2, position=2).forward: dict(x=GREY),
    stn.SpatialTransformer: dict(localization=stn.LocalizationNet(1, 2),
                                 padding_mode='border', size=9, zoom=1.5),
    stn.SpatialTransformer(stn.LocalizationNet(1, 2, position=2)).forward: dict(x=GREY),
    stn.PublishedLocalizationNet: dict(in_channels=1, channels=2, transformation='rotation',
                                       init='identity', kernel_size=3),
    stn.published_transformer: dict(in_channels=1, channels=2, transformation='rotation',
                                    init='identity'),
}


def complaint(f, right, name, value):
    "What is wrong about how `f` takes an odd value for one argument, or None."
    try: f(**right | {name: value})
    except ValueError: return None
    except Exception as e: return f'{type(e).__name__}: {e}'[:120]


@pytest.mark.parametrize('f', RIGHT, ids=lambda f: getattr(f, 'func', f).__qualname__)
@pytest.mark.filterwarnings('ignore')
def test_odd_arguments(f, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    complaints = []
    for name in RIGHT[f]:
        for odd, value in ODD.items():
            found = complaint(f, RIGHT[f], name, value)
            if found: complaints.append(f'{name}={odd}: {found}')
    plt.close('all')
    assert not complaints, '\n'.join(['', *complaints])


@pytest.mark.parametrize('f', RIGHT, ids=lambda f: getattr(f, 'func', f).__qualname__)
def test_the_right_call_is_right(f, tmp_path, monkeypatch):
    "Or the table would prove nothing. What reads files has none here."
    monkeypatch.chdir(tmp_path)
    reads = rot.read_amat, rot.mnist_rot_original
    if f in reads or getattr(f, 'func', None) is loading.from_torchvision: return
    f(**RIGHT[f])
    plt.close('all')
