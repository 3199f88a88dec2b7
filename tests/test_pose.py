"Wrong arguments of what says how an image lies: either it works, or a ValueError says why not."
import pytest
import torch

from gcnn_stn import coach, health, mixture
from gcnn_stn.model import CNN
from gcnn_stn.stn import LocalizationNet, SpatialTransformer
from test_arguments import BYTES, GREY, LABELS, ODD, TURN, ZEROS, complaint

STN = SpatialTransformer(LocalizationNet(1, 2, position=2))
READER = CNN((2,), (3,))
DEEP = dict(in_channels=1, channels=(2, 2, 2), hidden=4, position=2, slope=.1, gain=1.,
            lr_factor=.1)
SMALL = coach.DeepLocalizationNet(**DEEP).eval()

# a right call of each function
RIGHT = {
    health.agreement: dict(poses=ZEROS, symmetry=1),
    health.circular_slope: dict(a=ZEROS, t=ZEROS),
    health.left_over: dict(poses=ZEROS, symmetry=1),
    health.circular_std: dict(R=.5),
    health.spread: dict(y=LABELS, seed=0),
    health.circular_error: dict(a=ZEROS, t=ZEROS, y=LABELS),
    health.says_angles: dict(model=STN),
    health.gradients: dict(model=STN, x=GREY),
    health.watch: dict(transformer=STN, images=GREY, labels=LABELS, n=4, angles=3, seed=0),
    health.pose_metrics: dict(model=STN, images=BYTES, labels=LABELS, seed=0, mean=.1, std=.3),
    coach.DeepLocalizationNet: DEEP,
    SMALL.forward: dict(x=GREY),
    coach.SharedLocalizationNet: dict(reader=READER, depth=1, hidden=4, position=2, slope=.1, gain=1., lr_factor=.1),
    coach.compose: dict(first=TURN, then=TURN),
    coach.RefiningTransformer: dict(localization=SMALL, steps=2, padding_mode='border'),
    coach.RefiningTransformer(SMALL, 2).forward: dict(x=GREY),
    coach.WeakReader: dict(classes=10, in_channels=1, size=4),
    coach.WeakReader(10, 1, size=4).forward: dict(x=GREY),
    coach.direction: dict(theta=TURN, height=9, width=9),
    coach.inconsistency: dict(transformer=STN, x=GREY, theta=TURN, degrees=ZEROS),
    coach.CoachedSTCNN: dict(reader=READER, weak=1., follow=1., length=.01, steps=1,
                             localization=SMALL, padding_mode='border', in_channels=1,
                             classes=10),
    mixture.MixtureLocalizationNet: dict(k=2, how='free') | DEEP,
    mixture.PoseMixture: dict(k=2, reader=READER, how='free', length=.01,
                            padding_mode='border', in_channels=1, classes=10),
}


def name_of(f): return f.__qualname__


@pytest.mark.parametrize('f', RIGHT, ids=name_of)
@pytest.mark.filterwarnings('ignore')
def test_odd_arguments(f):
    complaints = []
    for name in RIGHT[f]:
        for odd, value in ODD.items():
            found = complaint(f, RIGHT[f], name, value)
            if found: complaints.append(f'{name}={odd}: {found}')
    assert not complaints, '\n'.join(['', *complaints])


@pytest.mark.parametrize('f', RIGHT, ids=name_of)
def test_the_right_call_is_right(f): f(**RIGHT[f])
