"""escnn (Weiler and Cesa 2019) as an outside judge: our (C, G) axes are its regular fields, and each library's layers pass the other's checks.

The correspondence. A field of regular representations has the channels (C·G), those of one field together, in the order of `fibergroup.elements`.
Cyclic groups: element g of both turns counter-clockwise by 2πg/n. Dihedral groups: escnn's (m, r) is a mirror, if m, followed by the r-th turn, as ours,
but its mirror exchanges left and right (axis π/2) where ours turns y around; that is ours followed by half a turn. So (m, r) is our (r + m·n/2) mod n + n·m."""
import csv

import pytest, torch
from torch import nn

escnn = pytest.importorskip('escnn', reason="escnn isn't installed; pip install 'gcnn_stn[escnn]' builds it where there is a Fortran compiler")
import escnn.nn as enn
from escnn import gspaces

from escnn_numbers import KERNEL_SIZES, ORDERS, PUBLISHED, escnn_operator, measure, our_operator, random_kernels_error, write
from gcnn_stn.equivariance import disc, equivariance_error, smooth_images
from gcnn_stn.group import CyclicGroup, DihedralGroup, act, transform_image
from gcnn_stn.layer import (Downsample2d, GroupAvgPool2d, GroupBatchNorm, GroupConv2d, GroupInstanceNorm, GroupLayerNorm, GroupMaxPool2d, GroupPool,
                            LiftingConv2d)
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import GroupPointwise, SeparableGroupConv2d

PAIRS = {'C4': (CyclicGroup(4), gspaces.rot2dOnR2(4)), 'C8': (CyclicGroup(8), gspaces.rot2dOnR2(8)), 'D4': (DihedralGroup(4), gspaces.flipRot2dOnR2(4))}
each_group = pytest.mark.parametrize('name', [*PAIRS])


def number(group, element):
    "Our integer for an element of escnn."
    if isinstance(group, CyclicGroup): return element.value
    m, r = element.value
    n = group.order//2
    return (r + m*n//2) % n + n*m


def numbers(group, space): return [number(group, e) for e in space.fibergroup.elements]   # in the order of its channels


class Bridge:
    "Between our tensors and the fields of escnn, for one group."
    def __init__(self, name, order=None):
        self.group, self.space = PAIRS[name]
        self.order = order or numbers(self.group, self.space)
        self.elements = [(e, number(self.group, e)) for e in self.space.fibergroup.elements]
        self.lattice = [(e, g) for e, g in self.elements if self.group.lattice[g]]

    def type(self, channels, ndim=5):
        "What `channels` of ours, images or group features, are to escnn."
        return enn.FieldType(self.space, [self.space.regular_repr if ndim == 5 else self.space.trivial_repr]*channels)

    def there(self, x): # (B, C, G, H, W) → field (B, C·G, H, W), or images as they are
        return enn.GeometricTensor(x[:, :, self.order].flatten(1, 2) if x.ndim == 5 else x, self.type(x.shape[1], x.ndim))

    def back(self, field): # (B, C·G, H, W) → (B, C, G, H, W), or images as they are
        if field.type.representations[0].is_trivial(): return field.tensor
        back = torch.tensor(self.order).argsort()
        return field.tensor.unflatten(1, (-1, self.group.order))[:, :, back]


def difference(a, b): return ((a - b).abs().max()/b.abs().max()).item()
def close(a, b, most=1e-5): return difference(a, b) < most


@each_group
def test_same_group(name):
    "The numbers follow from what the elements do to the plane, and products agree."
    group, space = PAIRS[name]
    elements = space.fibergroup.elements
    for e in elements:
        assert torch.allclose(torch.tensor(space.basespace_action(e)), group.matrix(number(group, e)), atol=1e-9)
        for f in elements: assert number(group, e @ f) == group.product(number(group, e), number(group, f))
    assert sorted(numbers(group, space)) == [*group.elements()]


@each_group
def test_our_features_are_regular_fields(name):
    "On the lattice escnn moves our images and features as `act` does."
    bridge = Bridge(name)
    for x in torch.randn(2, 3, 9, 9), torch.randn(2, 3, bridge.group.order, 9, 9):
        for e, g in bridge.lattice: assert close(bridge.back(bridge.there(x).transform(e)), act(bridge.group, g, x))


def test_the_order_matters():
    "Were D4's mirrors taken for each other, escnn would notice."
    x, bridge = torch.randn(1, 2, 8, 9, 9), Bridge('D4', order=[*range(8)])
    assert not all(close(bridge.back(bridge.there(x).transform(e)), act(bridge.group, g, x)) for e, g in bridge.lattice)


def test_between_the_quarter_turns():
    "C8 at 45°, by linear interpolation in both. escnn rounds its matrix to 11 bits, so ours is rounded, too; it cuts the border off, so that is left out."
    bridge, x = Bridge('C8'), smooth_images(2, 33, 8).unflatten(1, (1, 8))
    field, inside = bridge.there(x), disc(33, 33)*(disc(33, 33).sum(0) > 8)
    for e, g in bridge.elements:
        theirs = bridge.back(enn.GeometricTensor(field.type.transform(field.tensor, e, order=1), field.type))
        shuffled = x[:, :, bridge.group.table[bridge.group.inverse(g)]].flatten(1, 2)
        rounded = transform_image(shuffled, bridge.group.matrix(g).half().double()).unflatten(1, (1, 8))
        assert close(theirs*inside, rounded*inside)
        assert close(theirs*inside, act(bridge.group, g, x)*inside, 2e-3)


@each_group
def test_without_interpolation(name):
    "A feature as a function of the plane, moved by escnn point by point, is (L_g F)(x, h) = F(g⁻¹x, g⁻¹h) everywhere."
    bridge, frequency = Bridge(name), torch.randn(8, 2, dtype=torch.float64)
    F = lambda points: torch.cos(points @ frequency[:bridge.group.order].T)                     # (N, 2) → (N, G)
    points, kind = torch.randn(50, 2, dtype=torch.float64), bridge.type(1)
    for e, g in bridge.elements:
        values, places = kind.transform(F(points)[:, bridge.order].float(), e, coords=points)   # at g·x
        expected = F(places @ bridge.group.matrix(g))[:, bridge.group.table[bridge.group.inverse(g)]]
        assert close(values.double(), expected[:, bridge.order])


class Judged(enn.EquivariantModule):
    "A layer of ours as escnn sees it."
    def __init__(self, bridge, layer, shape):
        super().__init__()
        with torch.no_grad(): y = layer(torch.zeros(2, *shape))
        self.bridge, self.layer = bridge, layer
        self.in_type, self.out_type = bridge.type(shape[0], len(shape) + 1), bridge.type(y.shape[1], y.ndim)

    def forward(self, field): return self.bridge.there(self.layer(self.bridge.back(field)))
    def evaluate_output_shape(self, shape): return shape


class PerPose(nn.BatchNorm2d):
    "The usual mistake: a scale of its own for each pose."
    def forward(self, x): return super().forward(x.flatten(1, 2)).view_as(x)


def trained(layer):
    "Parameters away from their start, for a scale of 1 proves nothing."
    for p in layer.parameters(): nn.init.normal_(p)
    return layer.eval()


LAYERS = {
    'lifting': (lambda G: LiftingConv2d(2, 3, 5, G, padding=2), 4), 'convolution': (lambda G: GroupConv2d(2, 3, 3, G), 5),
    'grouped': (lambda G: GroupConv2d(2, 4, 3, G, padding=1, groups=2, basis='harmonic'), 5), 'batch norm': (lambda G: GroupBatchNorm(2), 5),
    'layer norm': (lambda G: GroupLayerNorm(2), 5), 'instance norm': (lambda G: GroupInstanceNorm(2), 5),
    'max pool': (lambda G: GroupMaxPool2d(2), 5), 'mean pool': (lambda G: GroupAvgPool2d(2), 5), 'half size': (lambda G: Downsample2d(), 5),
    'blur pool': (lambda G: BlurPool2d(), 5), 'max blur pool': (lambda G: MaxBlurPool2d(), 5), 'upsampling': (lambda G: Upsample2d(), 5),
    'pointwise': (lambda G: GroupPointwise(2, 3, G), 5), 'separable': (lambda G: SeparableGroupConv2d(2, 3, 3, G, padding=1), 5),
    'max over poses': (lambda G: GroupPool('max'), 5), 'mean over poses': (lambda G: GroupPool('mean'), 5)}


def escnn_check(bridge, make, ndim):
    "escnn's own test of a module: twenty random elements of its group, noise on 10 × 10 pixels."
    shape = (2, bridge.group.order, 10, 10)[:1 + 3*(ndim == 5)] + (10, 10)*(ndim == 4)
    Judged(bridge, trained(make(bridge.group)), shape).check_equivariance(atol=1e-4, rtol=1e-5)   # float32 sums of up to 400 products


@pytest.mark.parametrize('name', ['C4', 'D4'])   # the groups that escnn's test can move exactly
@pytest.mark.parametrize('layer', [*LAYERS])
def test_our_layers_pass_its_check(name, layer):
    torch.manual_seed(0)
    escnn_check(Bridge(name), *LAYERS[layer])


@pytest.mark.parametrize('make, ndim', [(lambda G: PerPose(2*G.order), 5), (lambda G: nn.Conv2d(2, 2, 3), 4)])
def test_its_check_can_fail(make, ndim):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match='too high'): escnn_check(Bridge('C4'), make, ndim)


@pytest.mark.parametrize('layer', [*LAYERS])
def test_our_layers_on_c8(layer):
    "Inputs that escnn has turned, and its turned outputs; 45° is left to the lifting error below."
    torch.manual_seed(0)
    (make, ndim), bridge = LAYERS[layer], Bridge('C8')
    module = trained(make(bridge.group))
    x = bridge.there(torch.randn(2, 2, *[8]*(ndim == 5), 10, 10))
    with torch.no_grad():
        for e, _ in bridge.lattice:
            assert close(module(bridge.back(x.transform(e))), bridge.back(bridge.there(module(bridge.back(x))).transform(e)))


def its_convolution(bridge, images=False):
    "An R2Conv of escnn as a map of our tensors."
    torch.manual_seed(0)
    conv = enn.R2Conv(bridge.type(2, 4 if images else 5), bridge.type(3), 5, padding=2, bias=False)
    return conv, lambda x: bridge.back(conv(bridge.there(x)))


@each_group
@pytest.mark.parametrize('images', [True, False])
def test_its_layers_pass_our_check(name, images):
    bridge = Bridge(name)
    x, lattice = torch.randn(2, 2, *[bridge.group.order]*(not images), 9, 9), [g for _, g in bridge.lattice]
    assert equivariance_error(its_convolution(bridge, images)[1], bridge.group, x, lattice).max() < 1e-5
    if name != 'D4': return
    wrong = Bridge(name, order=[*range(8)])                                          # the check can fail
    assert equivariance_error(its_convolution(wrong, images)[1], wrong.group, x, lattice).max() > 1e-2


@pytest.mark.parametrize('name', ['C4', 'D4'])
def test_same_convolution(name):
    "On the lattice every kernel of escnn's is one of ours: copy its filters for the identity pose, and both layers give the same."
    bridge = Bridge(name)
    conv, theirs = its_convolution(bridge)
    G, filters = bridge.group.order, conv.expand_parameters()[0].detach()
    kernel = filters.unflatten(0, (3, G))[:, bridge.order.index(bridge.group.identity)]           # (3, 2·G, 5, 5), the fields in its order
    ours = GroupConv2d(2, 3, 5, bridge.group, padding=2, bias=False, basis='pixel')
    ours.load_state_dict({'weight': kernel.unflatten(1, (2, G))[:, :, torch.tensor(bridge.order).argsort()].flatten(-2)})
    x = torch.randn(2, 2, G, 9, 9)
    assert close(theirs(x), ours(x))


@each_group
def test_mixed_network(name):
    "Our lifting, its convolution and non-linearity, our norm, its pooling over poses: what the libraries don't share is a name only."
    bridge = Bridge(name)
    lift, norm, (conv, _) = LiftingConv2d(1, 2, 5, bridge.group, padding=2), GroupBatchNorm(3).eval(), its_convolution(bridge)
    relu, pool = enn.ReLU(conv.out_type), enn.GroupPooling(conv.out_type)
    net = lambda x: pool(bridge.there(norm(bridge.back(relu(conv(bridge.there(lift(x))))))))
    x = torch.randn(2, 1, 9, 9)
    assert equivariance_error(lambda x: net(x).tensor, bridge.group, x, [g for _, g in bridge.lattice]).max() < 1e-5
    features = torch.randn(2, 3, bridge.group.order, 9, 9)
    assert torch.equal(pool(bridge.there(features)).tensor, GroupPool('max')(features))


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('k', KERNEL_SIZES)
def test_lifting_error_is_not_above_its(order, k):
    "With at least as many weights, by both probes of chapter 03."
    ours, theirs = (measure(operator, order, k) for operator in (our_operator, escnn_operator))
    assert ours['weights'] >= theirs['weights']
    for what in 'random_kernels', 'mean_function', 'worst_function': assert ours[what] <= theirs[what], what
    assert random_kernels_error(our_operator(order, k, 'bilinear')) > .1   # the probe sees a poor basis


def test_published_numbers():
    "The file that chapter 03 quotes is what this escnn measures."
    with open(PUBLISHED/'escnn_lifting.csv') as f: rows = [*csv.DictReader(f)]
    assert [(float(r['degrees']), int(r['kernel_size'])) for r in rows] == [(360/order, k) for order in ORDERS for k in KERNEL_SIZES]
    for row in rows:
        if row['escnn'] != escnn.__version__: pytest.skip(f"measured with escnn {row['escnn']}; python tests/escnn_numbers.py measures anew")
        found = measure(escnn_operator, round(360/float(row['degrees'])), int(row['kernel_size']))
        for what in 'weights', 'random_kernels', 'mean_function', 'worst_function': assert found[what] == pytest.approx(float(row[what]), rel=1e-3)


def moved_apart(bridge, images=False):
    "How far its motion of our images or features is from ours, at worst, on the lattice."
    x = torch.randn(2, 3, *[bridge.group.order]*(not images), 9, 9)
    return max(difference(bridge.back(bridge.there(x).transform(e)), act(bridge.group, g, x)) for e, g in bridge.lattice)


@torch.no_grad()
def judged(bridge, make, ndim):
    "How far a layer of ours is from commuting with its motions, at worst, on the lattice."
    layer, x = trained(make(bridge.group)), bridge.there(torch.randn(2, 2, *[bridge.group.order]*(ndim == 5), 10, 10))
    moved = lambda y, e: bridge.back(bridge.there(y).transform(e))
    return max(difference(layer(bridge.back(x.transform(e))), moved(layer(bridge.back(x)), e)) for e, _ in bridge.lattice)


def conformance():
    "What chapter 04 quotes: for each group and layer the worst difference, and the number of elements it was looked for at."
    for name in PAIRS:
        torch.manual_seed(0)
        bridge = Bridge(name)
        row = lambda what, worst: dict(group=name, what=what, elements=len(bridge.lattice), difference=worst)
        yield row('images moved', moved_apart(bridge, True))
        yield row('features moved', moved_apart(bridge))
        for what, (make, ndim) in LAYERS.items(): yield row(what, judged(bridge, make, ndim))


def test_conformance():
    "The file that chapter 04 quotes is what this escnn measures, but for the last digits."
    with open(PUBLISHED/'escnn_conformance.csv') as f: rows = [*csv.DictReader(f)]
    found = [*conformance()]
    assert [(r['group'], r['what'], int(r['elements'])) for r in rows] == [(r['group'], r['what'], r['elements']) for r in found]
    assert all(float(r['difference']) < 1e-5 for r in rows + found)


if __name__ == '__main__': write(PUBLISHED/'escnn_conformance.csv', [*conformance()])   # python tests/test_escnn.py
