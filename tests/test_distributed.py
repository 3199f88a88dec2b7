"What a chapter can't hold: two real processes that train one network together, on real digits; and each layer in PyTorch's own wrapper."
import os, subprocess, sys
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gcnn_stn.study.train as trainer
from gcnn_stn.data import mnist, unit_range
from gcnn_stn.group import CyclicGroup, DihedralGroup
from gcnn_stn.layer import (Downsample2d, GlobalPool, GroupAvgPool2d, GroupBatchNorm, GroupConv2d, GroupDropout, GroupInstanceNorm, GroupLayerNorm, GroupMaxPool2d,
                            GroupPool, LiftingConv2d)
from gcnn_stn.model import published_gcnn, published_stcnn, unwrapped
from gcnn_stn.sampling import BlurPool2d, MaxBlurPool2d, Upsample2d
from gcnn_stn.separable import GroupPointwise, SeparableGroupConv2d
from gcnn_stn.subgroup import CosetPool, Restrict
from gcnn_stn.study.train import TrainConfig, distributed, fit

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
def in_the_wrapper():
    "As scripts for several processes have it; a single one needs none."
    net = published_gcnn(4, 2, 4)
    return DistributedDataParallel(net) if torch.distributed.is_initialized() else net


CASES = {
    'wrapped': (in_the_wrapper, *ONES),
    'gcnn': (lambda: published_gcnn(4, 2, 4), *ODD),
    'stcnn': (lambda: published_stcnn('single', 3, 8, 4), *ODD),
    'living': (lambda: published_stcnn('single', 3, 8, 4, init='random').double(), *ODD),   # float64: it amplifies the last bits
    'idle': (Idle, *ONES),
    'penalized': (lambda: published_stcnn('single', 3, 8, 4), ODD[0] | dict(equivariance=8, penalty=1.), ODD[1]),   # under eight rotations
    'stats': (Stats, *ODD),
    'unweighted': (lambda: published_gcnn(4, 2, 4), *ODD)}


def train(name, folder, rank, world):
    "Twenty steps, logged one by one."
    make, kwargs, n = CASES[name]
    torch.manual_seed(rank)   # other weights on each process: those of the first must win
    model, (x, y) = make(), (t[:n] for t in mnist())
    x = unit_range(x).to(next(model.parameters()))
    losses = step_by_step(model, (x, y), TrainConfig(lr=1e-3, rotate=True, **kwargs), f'{folder}/{name}.best')
    state = unwrapped(model).state_dict() | {'losses': torch.tensor(losses, dtype=torch.float64)}
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
        for name in LAYERS: wrapped(name, folder, rank, world)


C8, D4 = CyclicGroup(8), DihedralGroup(4)
def after(*layers, group=D4): return lambda: nn.Sequential(LiftingConv2d(1, 4, 3, group, padding=1), *(layer() for layer in layers))
LAYERS = {   # each after a lifting layer, for the wrapper refuses modules without parameters
    'lifting': after(group=C8), 'bilinear': after(lambda: GroupConv2d(4, 3, 3, C8, basis='bilinear'), group=C8), 'harmonic': after(lambda: GroupConv2d(4, 4, 5, C8, groups=2), group=C8),
    'convolution': after(lambda: GroupConv2d(4, 3, 3, D4, stride=2)),
    'batch norm': after(lambda: GroupBatchNorm(4)), 'layer norm': after(lambda: GroupLayerNorm(4)), 'instance norm': after(lambda: GroupInstanceNorm(4)),
    'dropout': after(lambda: GroupDropout(.5)), 'max pool': after(lambda: GroupMaxPool2d(2)), 'mean pool': after(lambda: GroupAvgPool2d(2)), 'half size': after(Downsample2d),
    'group pool': after(lambda: GroupPool('max')), 'global pool': after(lambda: GlobalPool('mean', 'max')),
    'blur pool': after(BlurPool2d), 'max blur pool': after(MaxBlurPool2d), 'upsampling': after(lambda: Upsample2d(2)),
    'coset pool': after(lambda: CosetPool(D4, [0, 2])), 'restriction': after(lambda: Restrict(D4, [0, 1, 2, 3])),
    'pointwise': after(lambda: GroupPointwise(4, 3, D4)), 'separable': after(lambda: SeparableGroupConv2d(4, 3, 3, C8), group=C8)}
APART = {'batch norm', 'dropout'}   # statistics of a share, and masks of each process's own


def wrapped(name, folder, rank, world):
    "One step of gradient descent on half a batch each, in DistributedDataParallel; on all of it in a single process."
    torch.manual_seed(rank)     # other weights on each process: those of the first must win
    layer = LAYERS[name]().double()
    x, seen = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64), slice(rank, None, world)
    target = torch.randn(4, *layer(x).shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = layer if world == 1 else DistributedDataParallel(layer, find_unused_parameters=False)
    (net(x[seen]) - target[seen]).square().mean().backward()
    grads = {f'grad.{k}': p.grad.clone() for k, p in layer.named_parameters()}
    torch.optim.SGD(layer.parameters(), lr=.1).step()
    save_file({k: v.contiguous() for k, v in (grads | layer.state_dict()).items()}, f'{folder}/layer-{name}.{rank}')


@pytest.fixture(scope='module')
def left(tmp_path_factory):
    "What one process left, and what each of two did."
    one, two = (tmp_path_factory.mktemp(name) for name in ('one', 'two'))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    subprocess.run([*torchrun, __file__, str(two)], check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    main(one)
    names = [*CASES, *(f'layer-{name}' for name in LAYERS)]
    return {name: [load_file(path/f'{name}.{rank}') for path, rank in ((one, 0), (two, 0), (two, 1))] for name in names} | {'files': two}


def apart(a, b, losses):
    "The largest difference of losses, or of weights."
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a if (k == 'losses') == losses)


@pytest.mark.parametrize('name, most', [('gcnn', 1e-4), ('wrapped', 1e-4), ('stcnn', 1e-4), ('living', 1e-8), ('idle', 1e-4), ('penalized', 1e-4)])
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


def off(a, b, of): return max((a[k] - b[k]).abs().max().item()/b[k].abs().max().clamp_min(1e-9).item() for k in b if k.startswith('grad.') == of)


@pytest.mark.parametrize('name', [*LAYERS])
def test_layer_in_the_wrapper(left, name):
    "Gradients and new weights are those of a single process, but where half a batch must differ; and both processes have the same."
    one, two, other = left[f'layer-{name}']
    assert all(torch.equal(two[k], other[k]) for k in two if 'running' not in k)   # the wrapper evens these out before the next step
    assert two['grad.0.weight'].abs().max() > 1e-6
    if name in APART: assert off(two, one, of=True) > 1e-3      # the check can fail
    else: assert off(two, one, of=True) < 1e-5 and off(two, one, of=False) < 1e-5


if __name__ == '__main__': main(Path(sys.argv[1]))
