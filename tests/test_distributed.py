"What a chapter can't hold: two real processes that train one network together, on real digits."
import os, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn

import gcnn_stn.train as trainer
from gcnn_stn.data import mnist, unit_range
from gcnn_stn.model import published_gcnn, published_stcnn
from gcnn_stn.train import TrainConfig, distributed, fit

STEPS = 20


class Stats(nn.Sequential):
    "Batch norm: its statistics are of each process's share."
    def __init__(self): super().__init__(nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


class Idle(nn.Module):
    "One of its layers gets no gradient, and AdamW must not decay it."
    def __init__(self): super().__init__(); self.busy, self.idle = nn.Linear(784, 10), nn.Linear(3, 3)
    def forward(self, x): return self.busy(x.flatten(1))


ODD = dict(batch_size=33, epochs=2), 9*33 + 2     # ten steps an epoch; the last has two images, one for each process
ONES = dict(batch_size=1, epochs=2), 10           # the second process never has an image
CASES = {
    'gcnn': (lambda: published_gcnn(4, 2, 4), *ODD),
    'stcnn': (lambda: published_stcnn('single', 3, 8, 4), *ODD),
    'living': (lambda: published_stcnn('single', 3, 8, 4, init='random').double(), *ODD),   # float64: it amplifies the last bits
    'idle': (Idle, *ONES),
    'stats': (Stats, *ODD),
    'unweighted': (lambda: published_gcnn(4, 2, 4), *ODD)}


def train(name, folder, rank, world):
    "Twenty steps, logged one by one."
    make, kwargs, n = CASES[name]
    torch.manual_seed(rank)   # other weights on each process: those of the first must win
    model, (x, y) = make(), (t[:n] for t in mnist())
    x = unit_range(x).to(next(model.parameters()))
    losses = step_by_step(model, (x, y), TrainConfig(lr=1e-3, rotate=True, **kwargs), f'{folder}/{name}.best')
    state = model.state_dict() | {'losses': torch.tensor(losses, dtype=torch.float64)}
    save_file({k: v.contiguous() for k, v in state.items()}, f'{folder}/{name}.{rank}')


def step_by_step(model, data, config, path):
    "Train; returns the loss of every step, as `fit` logs it."
    losses, add = [], trainer._Log.add
    trainer._Log.add = lambda self, loss, *args: (losses.append(loss.item()), add(self, loss, *args))
    try: fit(model, data, tuple(t[:11] for t in data), config, progress=False, checkpoint=path)
    finally: trainer._Log.add = add
    return losses


def main(folder):
    "All cases, one after the other, by whatever processes there are."
    differentiate = trainer._differentiate
    with distributed() as (rank, world):
        for name in CASES:
            if name == 'unweighted': trainer._differentiate = lambda *args: differentiate(*args[:-1], 1/world)   # the usual average
            train(name, folder, rank, world)
    trainer._differentiate = differentiate


@pytest.fixture(scope='module')
def left(tmp_path_factory):
    "What one process left, and what each of two did."
    one, two = (tmp_path_factory.mktemp(name) for name in ('one', 'two'))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    subprocess.run([*torchrun, __file__, str(two)], check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    main(one)
    return {name: [load_file(path/f'{name}.{rank}') for path, rank in ((one, 0), (two, 0), (two, 1))] for name in CASES} | {'files': two}


def apart(a, b, losses):
    "The largest difference of losses, or of weights."
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a if (k == 'losses') == losses)


@pytest.mark.parametrize('name, most', [('gcnn', 1e-4), ('stcnn', 1e-4), ('living', 1e-8), ('idle', 1e-4)])
def test_same_as_one_process(left, name, most):
    one, two, _ = left[name]
    assert len(one['losses']) == len(two['losses']) == STEPS
    assert apart(one, two, losses=True) < most and apart(one, two, losses=False) < most


@pytest.mark.parametrize('name', ['stats', 'unweighted'])
def test_the_check_can_fail(left, name):
    "Statistics of half a batch are others, and a plain average gives small shares too much say."
    one, two, _ = left[name]
    assert apart(one, two, losses=True) > 1e-3 and apart(one, two, losses=False) > 1e-3


@pytest.mark.parametrize('name', [*CASES])
def test_processes_agree(left, name):
    "Buffers, too; and the best weights are written by one of them."
    _, two, other = left[name]
    assert all(torch.equal(two[k], other[k]) for k in two)
    assert {p.name for p in left['files'].glob(f'{name}.*')} == {f'{name}.{what}' for what in (0, 1, 'best')}


if __name__ == '__main__': main(Path(sys.argv[1]))
