"What the chapter can't hold: canonicalizers exported at every size, and trained by `fit`."
import io

import pytest, torch
from torch import nn

from gcnn_stn.canonical import READ_OUTS, Canonicalizer, GroupPose, MomentPose, PrincipalAxisPose
from gcnn_stn.data import mnist, normalize
from gcnn_stn.group import CyclicGroup
from gcnn_stn.model import CNN
from gcnn_stn.study.train import TrainConfig, fit

SMALL = dict(channels=(2, 3), kernel_sizes=(5, 3))
POSES = {'moment': MomentPose, 'axis': PrincipalAxisPose}
POSES |= {f'{how}-c{n}': lambda how=how, n=n: GroupPose(CyclicGroup(n), how, **SMALL) for how in READ_OUTS for n in (4, 8)}
SIZES = (2, 36, 36), (3, 37, 37), (5, 35, 34), (1, 40, 33)     # (B, H, W); exported with (3, 32, 34)


def near(a, b): return a.shape == b.shape and ((a - b).norm()/b.norm()).item() < 1e-4   # noise, read between pixels in float32


def made(name, dense=False):
    torch.manual_seed(0)
    model = nn.Conv2d(1, 2, 3) if dense else CNN((2, 3, 4))
    return Canonicalizer(POSES[name](), model, dense=dense).eval().requires_grad_(False)


def one_sided(size): return (torch.randn(size) + torch.linspace(0, 5, size[-1]))[:, None]   # noise alone has hardly a pose


def free(x): return {i: f'd{i}' for i in (0, 2, 3)}


def in_onnxruntime(net, x, dynamo):
    for module in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(module, reason="needs pip install 'gcnn_stn[onnx]'")
    import onnxruntime
    file = io.BytesIO()
    if dynamo:
        dims = {i: torch.export.Dim(name, min=2 if i == 0 else 28) for i, name in free(x).items()}
        torch.onnx.export(net, (x,), dynamic_shapes=(dims,), dynamo=True, verbose=False).save(file)
    else:
        axes = dict(input_names=['x'], output_names=['y'], dynamic_axes={'x': free(x)})
        torch.onnx.export(net, (x,), file, dynamo=False, **axes)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4       # shapes of the traced example are only a hint
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def by_export(net, x):
    return torch.export.export(net, (x,), dynamic_shapes=(dict.fromkeys(free(x), torch.export.Dim.AUTO),)).module()


WAYS = dict(onnx=lambda net, x: in_onnxruntime(net, x, True), onnx_torchscript=lambda net, x: in_onnxruntime(net, x, False), export=by_export)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name, dense', [*((name, False) for name in ('moment', 'axis', 'vector-c8', 'hard-c4')), ('moment', True)])
def test_exports_at_every_size(name, dense, way):
    "Batch, height and width are free."
    net = made(name, dense)
    f = WAYS[way](net, one_sided((3, 32, 34)))
    for size in SIZES:
        x = one_sided(size)
        assert near(f(x), net(x)), f'{size}'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ('moment', 'soft-c8', 'hard-c4'))
def test_onnx_of_digits(name):
    "Square images of one size: turns of the lattice are permutations in the file, too."
    net, digits = made(name), normalize(mnist(train=False)[0][:64])
    for module in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(module, reason="needs pip install 'gcnn_stn[onnx]'")
    import onnxruntime
    file = io.BytesIO()
    torch.onnx.export(net, (digits[:4],), dynamic_shapes=({0: torch.export.Dim('batch')},), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for x in (digits, digits[:1]):
        got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert near(torch.from_numpy(got), net(x))


def test_fit():
    "The prior is an objective of the network's own; it keeps upright images as they lie."
    train, y = mnist()[0][:256], mnist()[1][:256]
    turns = []
    for prior in (0., 5.):
        torch.manual_seed(0)
        net = Canonicalizer(GroupPose(), CNN((2, 3, 4)), prior=prior)
        fit(net, (train, y), config=TrainConfig(epochs=4, lr=.02, rotate=False), progress=False)
        assert net.pixel_statistics and all(p.isfinite().all() for p in net.parameters())
        with torch.no_grad(): turns.append(net.eval().angle(normalize(train)).abs().mean())
    assert turns[1] < min(30, turns[0])
