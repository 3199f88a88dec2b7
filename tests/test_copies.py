"Turned copies and polar networks leave Python: ONNX, torch.export, and pickles. What a notebook can't hold."
import copy, io

import pytest, torch

from gcnn_stn.copies import TestTimeAverage, TIPool
from gcnn_stn.group import CyclicGroup
from gcnn_stn.model import CNN, GCNN
from gcnn_stn.polar import OriginNet, PolarCNN

C4 = CyclicGroup(4)
THIN = dict(channels=(2, 3, 4))
POLAR = dict(channels=(2, 3, 4, 4), angles=16, radii=8)
NETS = {
    'ti-pool': lambda: TIPool(CNN(**THIN), 8), 'ti-pool, mean of 3': lambda: TIPool(CNN(**THIN), 3, 'mean'),
    'average': lambda: TestTimeAverage(CNN(**THIN), 8), 'average of a group net': lambda: TestTimeAverage(GCNN(C4, **THIN), 6),
    'polar': lambda: PolarCNN(**POLAR), 'log-polar': lambda: PolarCNN(**POLAR, log=True),
    'origin': lambda: PolarCNN(**POLAR, origin=True), 'origin by a group': lambda: PolarCNN(**POLAR, origin=OriginNet(1, 2, C4))}
BATCH = {0: torch.export.Dim('batch', min=2)}


def made(name):
    "A network with norms that have seen something."
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad(): net.train()(torch.randn(16, 1, 28, 28))
    return net.eval().requires_grad_(False)


def near(got, want, tol=1e-4): return (got - want).abs().max() <= tol*want.abs().max()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', NETS)
def test_onnx(name):
    "Exported with four images, run in onnxruntime on seven and on one."
    for module in ('onnx', 'onnxscript'): pytest.importorskip(module, reason="needs pip install 'gcnn_stn[onnx]'")
    onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'gcnn_stn[onnx]'")
    net, file = made(name), io.BytesIO()
    torch.onnx.export(net, (torch.randn(4, 1, 28, 28),), dynamic_shapes=(BATCH,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for n in (7, 1):
        x = torch.randn(n, 1, 28, 28)
        got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert near(torch.from_numpy(got), net(x))


@pytest.mark.parametrize('name', NETS)
def test_export_at_free_sizes(name):
    "One program for batches of all sizes and for images of all heights and widths."
    net = made(name)
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    f = torch.export.export(net, (torch.randn(3, 1, 32, 34),), dynamic_shapes=(dims,)).module()
    for shape in ((2, 1, 36, 36), (5, 1, 33, 40)):
        x = torch.randn(shape)
        assert near(f(x), net(x), 1e-3), shape


@pytest.mark.parametrize('name', ('ti-pool', 'average', 'polar', 'origin'))
def test_half_precision(name):
    "In bfloat16 throughout, and under autocast: finite, and not far off."
    net, x = made(name), torch.randn(4, 1, 28, 28)
    want = net(x)
    half = copy.deepcopy(net).bfloat16()(x.bfloat16())
    assert half.isfinite().all() and (half.float() - want).norm() < .2*want.norm()
