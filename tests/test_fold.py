"What a chapter can't hold: exported networks without this package, every network in onnxruntime, a real compiler."
import io, json, shutil, subprocess, sys

import pytest, torch
from torch import nn

from book import ROOT
from gcnn_stn.data import mnist, normalize
from gcnn_stn.fold import fold
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.layer import GlobalPool, GroupBatchNorm, GroupConv2d, GroupInstanceNorm, LiftingConv2d
from gcnn_stn.model import CNN, GCNN, STCNN, published_gcnn, published_stcnn
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import SeparableGroupConv2d

BATCH = {0: torch.export.Dim('batch')}


def hourglass():
    "The layers that no model of the book uses."
    c4 = CyclicGroup(4)
    return nn.Sequential(LiftingConv2d(1, 4, 5, c4), GroupInstanceNorm(4), nn.ReLU(), MaxBlurPool2d(), SeparableGroupConv2d(4, 4, 3, c4), GroupBatchNorm(4),
                         nn.ReLU(), BlurPool2d(), Upsample2d(), GroupConv2d(4, 4, 3, c4), GlobalPool('mean', 'max'))


NETS = {'gcnn-c8': lambda: GCNN(CyclicGroup(8), (2, 3, 4)), 'gcnn-d4': lambda: GCNN(DihedralGroup(4), (2, 3, 4)), 'cnn': lambda: CNN((2, 3, 4)),
        'stcnn': lambda: STCNN((2, 3, 4)), 'stcnn-affine': lambda: STCNN((2, 3, 4), transformation='affine'), 'published-gcnn': lambda: published_gcnn(8, 2, 4),
        'published-stcnn': lambda: published_stcnn('single', 3, 4, 4, 'random'), 'published-stcnn-multi': lambda: published_stcnn('multi', 3, 4, 4, 'random', 'affine'),
        'hourglass': hourglass}


@pytest.fixture(scope='module')
def digits(): return normalize(mnist(train=False)[0][:64])


def made(name):
    "A network with running statistics, in evaluation."
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad():
        for p in net.parameters(): p.add_(.1*torch.randn_like(p))
        net(torch.randn(16, 1, 28, 28))
    return net.eval()


def run(code, cwd): return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def near(a, b): return ((a - b).norm()/b.norm()).item() < 1e-5


@pytest.mark.parametrize('name', NETS)
def test_onnx(name, digits):
    "Exported with four digits, run in onnxruntime on one and on 64."
    runtime = pytest.importorskip('onnxruntime', reason="needs pip install 'gcnn_stn[onnx]'")
    for module in ('onnx', 'onnxscript'): pytest.importorskip(module, reason="needs pip install 'gcnn_stn[onnx]'")
    net, file = made(name), io.BytesIO()
    torch.onnx.export(fold(net), (digits[:4],), dynamic_shapes=(BATCH,), verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    for x in (digits, digits[:1]):
        with torch.no_grad(): assert near(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), net(x))


@pytest.mark.filterwarnings('ignore')   # tracing is deprecated, and checks of shapes are traced away
@pytest.mark.parametrize('name', ['gcnn-c8', 'stcnn', 'hourglass'])
def test_without_this_package(name, digits, tmp_path):
    "A fresh interpreter that can't import gcnn_stn runs the exported program and the traced one."
    net = made(name)
    folded = fold(net)
    torch.export.save(torch.export.export(folded, (digits[:4],), dynamic_shapes=(BATCH,)), tmp_path/'net.pt2')
    torch.jit.trace(folded, (digits[:4],)).save(tmp_path/'net.ts')
    with torch.no_grad(): torch.save((digits, net(digits)), tmp_path/'data.pt')
    done = run("""import sys; sys.modules['gcnn_stn'] = None
import torch
x, y = torch.load('data.pt')
for f in (torch.export.load('net.pt2').module(), torch.jit.load('net.ts')):
    with torch.no_grad(): assert ((f(x) - y).norm()/y.norm()).item() < 1e-5
try: import gcnn_stn.layer
except ImportError: print('it is not there')""", tmp_path)
    assert 'it is not there' in done.stdout, done.stdout


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
def test_inductor(digits):
    net = made('gcnn-c8')
    with torch.no_grad(): assert near(torch.compile(fold(net), fullgraph=True)(digits), net(digits))


def test_ten_lines(tmp_path):
    "The chapter's ten lines are ten, and run in an empty folder."
    cells = json.loads((ROOT/'nbs'/'07_fold.ipynb').read_text())['cells']
    code, = [''.join(c['source']) for c in cells if c['cell_type'] == 'code' and 'program = torch.export.export(fold(net)' in ''.join(c['source'])]
    assert len([line for line in code.split('\n') if line.strip()]) == 10
    done = run(code + "\nassert program.module()(x[:3]).shape == (3, 10)\nprint('ran')", tmp_path)
    assert done.stdout.endswith('ran\n'), done.stdout
