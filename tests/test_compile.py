"What a chapter can't hold: a real compiler, and a fresh interpreter's import time."
import resource, shutil, subprocess, sys

import pytest, torch

from gcnn_stn.group import CyclicGroup
from gcnn_stn.layer import GroupConv2d, check_module
from gcnn_stn.model import GCNN, STCNN


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@pytest.mark.parametrize('model', [GCNN(CyclicGroup(8), (2, 3, 4)), STCNN((2, 3, 4))], ids=['GCNN', 'STCNN'])
def test_inductor(model): check_module(model, torch.randn(4, 1, 30, 30), backend='inductor')


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@torch.no_grad()
def test_inductor_follows():
    "Compiled after the filters were kept, a layer follows its weights; and writes by compiled code are noticed by those who keep."
    layer, x = GroupConv2d(2, 2, 3, CyclicGroup(8), padding=1).eval(), torch.randn(2, 2, 8, 9, 9)
    def right(run): return torch.allclose(run(x), layer._convolve(x.flatten(1, 2), layer.filters()), atol=1e-4)
    layer(x)
    compiled = torch.compile(layer, fullgraph=True); assert right(compiled)
    layer.weight.mul_(2); assert right(compiled) and right(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.)
    for p in layer.parameters(): p.grad = torch.ones_like(p)
    before = layer.weight.clone()
    torch.compile(optimizer.step)(); optimizer.zero_grad()
    assert not torch.equal(layer.weight, before) and right(layer) and right(compiled)


def fresh(code):
    "What a fresh interpreter says to it, and its processor seconds: how busy the machine is otherwise doesn't count."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return said.split(), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def heavy(module):
    "What it imports of that which few need."
    return fresh(f'import {module}, sys; print(*{{"pandas", "matplotlib", "torchvision", "seaborn", "scipy", "sklearn"}} & {{*sys.modules}})')[0]


def test_import(capsys):
    "The layers import nothing heavy beyond torch; the time is reported, not judged."
    assert heavy('gcnn_stn.layer') == [] and 'pandas' in heavy('gcnn_stn.study.report')
    layer, torch = (min(times) for times in zip(*((fresh('import gcnn_stn.layer')[1], fresh('import torch')[1]) for _ in range(3))))
    with capsys.disabled(): print(f'\nimport gcnn_stn.layer takes {layer/torch:.2f} × import torch')
