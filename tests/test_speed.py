"What a chapter can't hold: `Speed(compile=True)`, which takes a real compiler; most cases trace for real and skip the code generation."
import copy, functools, shutil
from dataclasses import replace

import pytest, torch
from torch import nn
from torch._dynamo.utils import counters

from gcnn_stn.data import mnist
from gcnn_stn.group import CyclicGroup
from gcnn_stn.model import GCNN, published_stcnn
from gcnn_stn.study.stacked import fit_stacked
from gcnn_stn.study.train import Speed, TrainConfig, fit

CONFIG = TrainConfig(epochs=3, batch_size=32, rotate=True, lr=1e-3)   # 75 images: the last batch is smaller
NETS = {'stcnn': lambda: published_stcnn('single', 3, 4, 3, init='random'), 'gcnn': lambda: GCNN(CyclicGroup(4), (2, 3, 4))}


def digits(n=75):
    x, y = mnist()
    return x[:n], y[:n]


@pytest.fixture
def graphs(monkeypatch):
    "No code generation; gives a function that tells how many graphs were traced so far."
    torch.compiler.reset(); counters.clear()
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, dynamic, mode: compile(f, dynamic=dynamic, backend='aot_eager'))
    return lambda: counters['stats']['unique_graphs']


def near(one, two): return all(abs(a['loss'] - b['loss']) < 1e-4 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize('name', NETS)
@pytest.mark.slow
def test_compiled(name, graphs):
    "The same loss; a graph for each size of a batch and no more; the model stays what it was."
    one = NETS[name](); two = copy.deepcopy(one)
    plain = fit(one, digits(), digits(30), CONFIG, progress=False)
    assert graphs() == 0
    assert near(plain, fit(two, digits(), digits(30), CONFIG, progress=False, speed=Speed(compile=True)))
    assert graphs() == 2 and type(one) is type(two) and [*one.state_dict()] == [*two.state_dict()]


@pytest.mark.parametrize('name', NETS)
@pytest.mark.slow
def test_stack_compiled(name, graphs):
    "Likewise, when runs leave the stack."
    ones = [NETS[name]() for _ in range(3)]; twos = copy.deepcopy(ones)
    configs = [replace(CONFIG, seed=s, epochs=6, patience=1, lr=1e-2) for s in range(3)]
    args = [digits()]*3, [digits(30)]*3, configs
    plain = fit_stacked(ones, *args, progress=False)
    for one, two in zip(plain, fit_stacked(twos, *args, progress=False, speed=Speed(compile=True))): assert near(one, two)
    assert 2 <= graphs() <= 2*len({len(history) for history in plain})


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@pytest.mark.slow
def test_inductor():
    "The real thing, small."
    one = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)); two = copy.deepcopy(one)
    assert near(fit(one, digits(), config=CONFIG, progress=False), fit(two, digits(), config=CONFIG, progress=False, speed=Speed(compile=True)))
