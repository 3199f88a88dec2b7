"Checkpoints: of wrapped networks, foreign, damaged; and what a killed program leaves."
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import gcnn_stn.train as trainer
from gcnn_stn.train import (TrainConfig, check_writable, checkpoint_bytes, fit,
                            load_checkpoint, predict, save_checkpoint, write_atomically)


class Net(nn.Module):
    "Its parts are wrapped by themselves, too; and one is called what wrappers call theirs."
    def __init__(self, wrap=lambda part: part, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            blocks = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
            self.blocks, self.module = wrap(blocks), wrap(nn.Linear(8, 3))
        self.pixel_statistics = .4, .2

    def forward(self, x): return self.module(self.blocks(x))


def compiled(net): return torch.compile(net, backend='eager')
def both(net): return compiled(nn.DataParallel(net))


WRAPPED = {
    'plain': lambda seed: Net(seed=seed),
    'compiled': lambda seed: compiled(Net(seed=seed)),
    'parallel': lambda seed: nn.DataParallel(Net(seed=seed)),
    'distributed': lambda seed: DistributedDataParallel(Net(seed=seed)),
    'distributed, compiled': lambda seed: compiled(DistributedDataParallel(Net(seed=seed))),
    'compiled, distributed': lambda seed: DistributedDataParallel(compiled(Net(seed=seed))),
    'parts compiled': lambda seed: Net(compiled, seed),
    'parts parallel': lambda seed: Net(nn.DataParallel, seed),
    'all of it': lambda seed: both(Net(both, seed)),
}
NAMES = [*Net().state_dict()]
X = (torch.arange(80)*7 % 256).to(torch.uint8).view(5, 1, 4, 4)


@pytest.fixture(scope='module', autouse=True)
def one_process(tmp_path_factory):
    "DistributedDataParallel wants a group of processes, if only of one."
    place = tmp_path_factory.mktemp('group')/'file'
    dist.init_process_group('gloo', init_method=f'file://{place}', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('source, target', [*itertools.product(WRAPPED, WRAPPED)])
def test_wrapped(source, target, tmp_path):
    "Written under the network's own names, read into any wrapper; wrappers' names, too."
    path, net, wanted = tmp_path/'net', WRAPPED[source](seed=0), predict(Net(seed=0), X)
    save_checkpoint(path, net)
    with safe_open(path, 'pt') as f: assert sorted(f.keys()) == sorted(NAMES)
    foreign = save(net.state_dict(), dict(config=str(dict(mean=.4, std=.2))))
    for content in path.read_bytes(), foreign:
        path.write_bytes(content)
        other = WRAPPED[target](seed=1)
        load_checkpoint(path, other)
        assert torch.equal(predict(other, X), wanted)


def test_wrapped_otherwise(tmp_path):
    "What isn't the same network is refused, whatever the names."
    path, averaged = tmp_path/'net', AveragedModel(Net())
    own = Net().state_dict()
    twins = {f'_orig_mod.{k}': v.clone() for k, v in own.items()}
    for said, state in {
        'unexpected: n_averaged': averaged.state_dict(),
        'missing: blocks.0.bias': {f'module.{k}': own[k] for k in own if 'bias' not in k},
        'unexpected: _orig_mod.blocks.0': own | twins,
    }.items():
        path.write_bytes(save(state))
        with pytest.raises(ValueError, match=said): load_checkpoint(path, Net())


def trained_with(**kwargs): return dict(config=str(kwargs))   # as `fit` describes it


METADATA = {   # of a file → what the network carries afterwards
    'none': ({}, None),
    "fit's, formerly": (trained_with(epochs=3, mean=(.1, .2), std=.3), ((.1, .2), .3)),
    'a configuration without': (trained_with(epochs=3, mean=None, std=None), None),
    "somebody else's": (dict(config='resnet, small'), None),
    'nonsense': (trained_with(mean='a', std=0), None),
    'its own': (dict(pixel_statistics='[0.5, [0.1, 0.2]]'), (.5, (.1, .2))),
}


@pytest.mark.parametrize('kind', METADATA)
def test_metadata(kind, tmp_path):
    "Statistics that belonged to other weights don't stay."
    about, wanted = METADATA[kind]
    (tmp_path/'net').write_bytes(save(Net().state_dict(), about))
    net = Net(seed=1)
    load_checkpoint(tmp_path/'net', net)
    assert net.pixel_statistics == wanted


FILES = ['net', 'net.s0', 'net.s0.safetensors', '.net', 'a b', 'ü', "it's", 'new/net', 'n'*255]
REFUSED = {'': "got ''"}
REFUSED |= dict.fromkeys(['folder', 'new/', '.', '..'], 'add a name')
REFUSED |= dict.fromkeys(['file/below', 'n'*256], 'folder that can be written')
REFUSED['a\0b'] = 'must name a file'


def train(path):
    config = TrainConfig(epochs=1)
    fit(Net(), (X, torch.arange(5) % 3), config=config, progress=False, checkpoint=path)


WRITERS = {
    'bytes': lambda path: write_atomically(path, b'x'),
    'checkpoint': lambda path: save_checkpoint(path, Net()),
    'training': train,
    'trial': check_writable,
}


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    "A folder that is both home and where we are."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'folder').mkdir()
    (tmp_path/'file').touch()
    return tmp_path


@pytest.mark.parametrize('write', WRITERS)
@pytest.mark.parametrize('name', FILES)
def test_files(at_home, write, name):
    "Names are taken whole, and ~ is home; nothing else is left."
    for path in (name, f'~/{name}', at_home/name):
        WRITERS[write](path)
        assert (at_home/name).is_file() == (write != 'trial')
        if write in ('checkpoint', 'training'): load_checkpoint(path, Net())
        (at_home/name).unlink(missing_ok=True)
    assert {p.name for p in at_home.rglob('*')} <= {'folder', 'file', 'new'}


@pytest.mark.parametrize('write', WRITERS)
@pytest.mark.parametrize('name', REFUSED)
def test_files_refused(at_home, write, name):
    "Before anything is done, in words."
    with pytest.raises(ValueError) as e: WRITERS[write](name)
    assert REFUSED[name] in str(e.value), str(e.value)
    assert {p.name for p in at_home.rglob('*')} == {'folder', 'file'}


@pytest.mark.parametrize('write', WRITERS)
def test_no_path(write):
    for bad in 3, 1.5, b'net', ['net']:
        with pytest.raises(ValueError, match='must name a file or a folder'): WRITERS[write](bad)


def killed(path):
    "A process that was killed while it wrote, and the name of what it left."
    code = ("import os, signal, sys; from gcnn_stn.train import write_atomically; "
            "os.fsync = lambda f: os.kill(os.getpid(), signal.SIGKILL); "
            "write_atomically(sys.argv[1], b'half')")
    before = {*os.listdir(path.parent)}
    assert subprocess.run([sys.executable, '-c', code, path]).returncode == -signal.SIGKILL
    name, = {*os.listdir(path.parent)} - before
    return name


def test_abandoned(tmp_path):
    "The next writer takes it away, for whatever file; what others may be writing stays."
    left = killed(tmp_path/'a')
    host, pid, number, part = left[1:].split('.')
    assert part == 'part' and host == trainer._HOST
    stays = {f'.elsewhere.{pid}.0.part', f'{host}.{pid}.0.part', f'.{host}.x.0.part',
             'a.part', f'.{host}.{os.getppid()}.0.part', f'.{host}.1.0.part'}
    formerly = f'.{host}.{os.getpid()}.123456.part'   # of a process that had our number
    goes = {left, f'.{host}.{pid}.7.part', formerly}
    for write in WRITERS.values():
        for name in stays | goes: (tmp_path/name).touch()
        write(tmp_path/'b')
        assert {*os.listdir(tmp_path)} - {'b'} == stays


def test_interrupted(tmp_path, monkeypatch):
    "The old file stays as it was, and nothing else does."
    path = tmp_path/'net'
    save_checkpoint(path, Net())
    content = path.read_bytes()
    for exception in KeyboardInterrupt, SystemExit, MemoryError:
        def stop(*args): raise exception
        monkeypatch.setattr(os, 'fsync', stop)
        with pytest.raises(exception): save_checkpoint(path, Net(seed=1))
        assert path.read_bytes() == content and os.listdir(tmp_path) == ['net']


@pytest.mark.parametrize('place', range(0, 1200, 37))
def test_damaged(place, tmp_path):
    "A flipped bit, anywhere: refused, and the network is as it was; or it was in a note."
    content = bytearray(checkpoint_bytes(Net(), note='n'*300))
    net, path = Net(seed=1), tmp_path/'net'
    net.pixel_statistics = .1, .9
    before, wanted = predict(net, X), predict(Net(), X)
    content[place % len(content)] ^= 4
    path.write_bytes(content)
    try: load_checkpoint(path, net)
    except ValueError: assert torch.equal(predict(net, X), before)
    else: assert torch.equal(predict(net, X), wanted)
