"Paths, at every entrance: a home that is written ~, no home, an empty word, blanks and other alphabets. The next entrance is a line."
import os
import pwd
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from book import ROOT
from gcnn_stn import benchmark, data, dataset, figure, gallery, play, runner, study, style, train

DIGITS = Path(data._find([*data.MNIST_MD5])).parents[1]
FEW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28), dtype=np.uint8))
LABELS = torch.arange(40) % 10


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home, and somewhere else to work, with none of the data near."
    home, work = tmp_path/'home', tmp_path/'work'
    for folder in home, work: folder.mkdir()
    for name in 'GCNN_STN_DATA', 'XDG_CACHE_HOME': monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setattr(data, '_nearby', lambda: [])
    monkeypatch.setattr(dataset, 'AMAT', dict.fromkeys(dataset.AMAT, 40))
    monkeypatch.chdir(work)
    return home


def leave_home(monkeypatch, how):
    "Neither the environment nor the system knows a home."
    def unknown(*_): raise KeyError('nobody')
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    if how == 'unset': monkeypatch.delenv('HOME')
    else: monkeypatch.setenv('HOME', '')


def link(source, to):
    to.parent.mkdir(parents=True, exist_ok=True)
    to.symlink_to(source)


# what lies in a folder before it is read

def put_mnist(folder): link(DIGITS/'MNIST', folder/'MNIST')
def put_amat(folder):
    folder.mkdir(parents=True)
    for name in dataset.AMAT: put_table(folder/name)
def put_table(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(file, np.c_[FEW.flatten(1).numpy()/255, LABELS.numpy()], fmt='%.4g')
def put_pictures(folder):
    for i in range(10):
        file = folder/'eurosat'/'2750'/f'class {i % 2}'/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(FEW[i, 0].numpy()).save(file)
def put_weights(file): train.save_checkpoint(file, nn.Linear(2, 3))
def put_record(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"id": "x"}')
def put_rows(file): benchmark.write_rows(file, [dict(case='x')])
def put_study(folder): put_record(folder/'runs'/'x.json')


def named(variable, read):
    "A function that is told its folder by the environment."
    def told(path):
        os.environ[variable] = str(path)
        try: return read()
        finally: del os.environ[variable]
    return told


# what lies at a path, and a function that reads it
READS = {
    'mnist': (put_mnist, lambda path: data.mnist(False, root=path)),
    'mnist, named by the environment': (put_mnist, named('GCNN_STN_DATA', lambda: data.mnist(False))),
    'mnist, in a cache of its own': (lambda path: put_mnist(path/'gcnn_stn'), named('XDG_CACHE_HOME', lambda: data.mnist(False))),
    'load_dataset': (put_mnist, lambda path: dataset.load_dataset('mnist', path)),
    'mnist-rot, the original': (put_amat, lambda path: original(dataset.load_dataset('mnist-rot', path))),
    'the original, named by the environment': (put_amat, named('GCNN_STN_DATA', lambda: original(dataset.load_dataset('mnist-rot')))),
    'mnist_rot_original': (put_amat, lambda path: original(dataset.mnist_rot_original(path))),
    'read_amat': (put_table, dataset.read_amat),
    'from_torchvision': (put_pictures, lambda path: dataset.from_torchvision('EuroSAT', path, download=False)),
    'from_torchvision, named by the environment':
        (put_pictures, named('GCNN_STN_DATA', lambda: dataset.from_torchvision('EuroSAT', download=False))),
    'from_torchvision, from the cache':
        (lambda path: put_pictures(path/'gcnn_stn'), named('XDG_CACHE_HOME', lambda: dataset.from_torchvision('EuroSAT', download=False))),
    'load_checkpoint': (put_weights, lambda path: train.load_checkpoint(path, nn.Linear(2, 3))),
    'read_record': (put_record, runner.read_record),
    'read_rows': (put_rows, lambda path: benchmark.read_rows(path)[0]),
    'Evidence': (put_study, figure.Evidence),
}
VARIABLES = [name for name in READS if 'environment' in name or 'cache' in name]   # empty is as good as unset


def original(found):
    "The files' own digits, and not a set made anew."
    assert found.name == 'mnist-rot-original' and len(found.train[0]) == 40
    return found


def command(main, *args):
    "A command whose last argument is a path; its messages become errors."
    def run(path):
        try: status = main([*args, str(path)])
        except SystemExit as e: status = e.code
        if status: raise ValueError(f'exit status {status}')
    return run


def fit(path):
    train.fit(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), (FEW, LABELS), (FEW, LABELS), train.TrainConfig(epochs=1, batch_size=20),
              checkpoint=path, progress=False)


RESULT = runner.Result(dict(id='x'), [dict(epoch=1)], b'x')

# functions and commands that write to a path
WRITES = {
    'write_atomically': lambda path: train.write_atomically(path, b'x'),
    'save_checkpoint': lambda path: train.save_checkpoint(path, nn.Linear(2, 3)),
    'fit': fit,
    'write_rows': lambda path: benchmark.write_rows(path, [dict(case='x')]),
    'run_cases': lambda path: benchmark.run_cases(['rotate/batch=8'], path, seconds=0, progress=False),
    'write_page': lambda path: play.write_page(play.Plaything('x'), path),
    'save_figure': lambda path: style.save_figure(plt.figure(), path),
    'write a figure': lambda path: gallery.write(plt.figure(), path),
    'write a table': lambda path: gallery.write(pd.DataFrame(dict(a=[1])), path),
    'write_result': lambda path: runner.write_result(path, RESULT),
    'write_failure': lambda path: runner.write_failure(path, 'x', runner.Failure('x', 'x')),
    'run_missing': lambda path: runner.run_missing([], None, path, None, progress=False) and None,
    'gcnn_stn_train': command(study.train_main, 'cnn', '--dataset', 'digits', '--digits', '64', '--epochs', '1', '--out'),
    'gcnn_stn_study': command(study.main, '--grid', 'quick', '--dataset', 'digits', '--digits', '64', '--epochs', '1', '--seeds', '1',
                              '--only', 'contender=cnn,regime=upright', '--out'),
    'gcnn_stn_bench': command(benchmark.main, '--only', 'rotate/batch=8', '--seconds', '0', '--out'),
    'gcnn_stn_figures': command(gallery.main, '--results', str(ROOT/'results'), 'published-rows', '--out'),
}


FORMS = {
    '~': lambda home, name: f'~/{name}',
    '~ in a path': lambda home, name: Path(f'~/{name}'),
    'written out': lambda home, name: str(home/name),
    'a path': lambda home, name: home/name,
    'relative': lambda home, name: os.path.relpath(home/name),
    'relative to here': lambda home, name: f'./{os.path.relpath(home/name)}',
}
NAMES = 'data', 'with a blank', 'größe 数字', "it's, «odd»; $HOME"


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('entrance', READS)
def test_read(entrance, form, home):
    put, read = READS[entrance]
    for name in NAMES if form in ('~', 'a path') else NAMES[:1]:
        put(home/name)
        assert read(FORMS[form](home, name))
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize('entrance', READS)
def test_read_without_a_home(entrance, home, monkeypatch):
    put, read = READS[entrance]
    put(home/'data')
    for how in 'unset', 'empty':
        with monkeypatch.context() as m:
            leave_home(m, how)
            assert read(home/'data') and read(os.path.relpath(home/'data'))
            with pytest.raises(ValueError, match='home'): read('~/data')


@pytest.mark.parametrize('entrance', [name for name in READS if name not in VARIABLES])
@pytest.mark.parametrize('path', ['', None, 3, b'data', 'data\0'])
def test_read_from_nowhere(entrance, path, home):
    if path is None and entrance in ('mnist', 'load_dataset', 'mnist-rot, the original', 'from_torchvision'): return   # not said
    with pytest.raises(ValueError): READS[entrance][1](path)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('entrance', WRITES)
def test_write(entrance, form, home, monkeypatch):
    if entrance.startswith('gcnn_stn') and form not in ('~', 'relative'): return    # a command gets words, and takes its time
    monkeypatch.setattr(data, '_nearby', lambda: [DIGITS])
    for name in NAMES[:2] if form == '~' and not entrance.startswith('gcnn_stn') else NAMES[:1]:
        WRITES[entrance](FORMS[form](home, name))
        found = [file for file in home.rglob('*') if file.is_file() or entrance == 'run_missing']
        assert found and all(name in str(file.relative_to(home)) for file in found)
        assert not any(Path.cwd().iterdir())
        for file in home.iterdir(): shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.mark.parametrize('entrance', WRITES)
def test_write_without_a_home(entrance, home, monkeypatch):
    for how in 'unset', 'empty':
        with monkeypatch.context() as m:
            leave_home(m, how)
            with pytest.raises(ValueError): WRITES[entrance]('~/data')
            assert not any(Path.cwd().iterdir()) and not Path('/data/x').exists()


@pytest.mark.parametrize('entrance', WRITES)
def test_write_to_nowhere(entrance, home):
    with pytest.raises(ValueError): WRITES[entrance]('')
    assert not any(Path.cwd().iterdir())


# what lies next door is found, whoever one is

@pytest.mark.parametrize('how', ['unset', 'empty'])
@pytest.mark.parametrize('load', [lambda: data.mnist(False), lambda: dataset.load_dataset('digits'), lambda: dataset.load_dataset('mnist')])
def test_data_next_door_needs_no_home(load, how, home, monkeypatch):
    monkeypatch.setattr(data, '_nearby', lambda: [DIGITS])
    leave_home(monkeypatch, how)
    assert load()


def test_made_up_images_need_no_home(home, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.FakeData.__len__', lambda self: 10)
    leave_home(monkeypatch, 'unset')
    assert dataset.load_dataset('FakeData', image_size=(1, 8, 8), num_classes=3)


def test_nothing_next_door_and_no_home(home, monkeypatch):
    leave_home(monkeypatch, 'unset')
    for load in lambda: data.mnist(False, download=False), lambda: dataset.load_dataset('KMNIST', download=False):
        with pytest.raises(ValueError, match='set HOME or XDG_CACHE_HOME'): load()


def test_folders_that_nobody_may_enter_are_passed_by(home, monkeypatch):
    "As /data of some clusters: the search goes on behind it."
    def refuse(self, *args, **kwargs): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(data, '_nearby', lambda: [DIGITS])
    monkeypatch.setattr(Path, 'is_file', refuse)
    assert len(data.mnist(False)[0]) == 10_000


@pytest.mark.parametrize('name', ['GCNN_STN_DATA', 'XDG_CACHE_HOME'])
def test_an_empty_variable_is_none(name, home, monkeypatch):
    put_mnist(home/'.cache'/'gcnn_stn')
    monkeypatch.setenv(name, '')
    assert len(data.mnist(False, download=False)[0]) == 10_000


def test_a_folder_that_was_named_is_the_only_one(home, monkeypatch):
    "Quietly taking others would be worse than an error."
    put_mnist(home/'.cache'/'gcnn_stn')
    (home/'empty').mkdir()
    for load in lambda path: data.mnist(False, root=path), named('GCNN_STN_DATA', lambda: data.mnist(False)):
        with pytest.raises(ValueError, match='must name a folder'): load('~/empty')


@pytest.mark.parametrize('path, wanted', [('~', '{home}'), ('~/', '{home}'), ('~/a/../b', '{home}/a/../b'), ('a/~', 'a/~'), ('./~', '~'),
                                          ('~root' if os.name == 'posix' else '~', None), ('.', '.'), ('/', '/'), (' ', ' ')])
def test_user_path(path, wanted, home):
    found = data.user_path(path)
    assert found.is_absolute() and '~' not in str(found) if wanted is None else str(found) == wanted.format(home=home)
    assert data.user_path(Path(path)) == (home if path == './~' else found)     # a Path forgets the dot


def test_an_unknown_user(home):
    with pytest.raises(ValueError, match=r"'\./~nobody-of-this-name/x' if it is called so"): data.user_path('~nobody-of-this-name/x')
