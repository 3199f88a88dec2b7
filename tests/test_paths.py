"""Paths, at every entrance: a home that is written ~, no home at all, an empty word,
blanks and other alphabets. The next entrance is a line."""
import os
import pwd
import shutil
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from book import ROOT
from gcnn_stn import (benchmark, data, dataset, figure, gallery, play, runner, study, style,
                      train)
from gcnn_stn.dataset import from_torchvision, load_dataset

DIGITS = Path(data._find([*data.MNIST_MD5])).parents[1]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 1, 28, 28), dtype=np.uint8)
FEW, LABELS = torch.from_numpy(NOISE), torch.arange(40) % 10


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home, and somewhere else to work, with none of the data near."
    home, work = tmp_path/'home', tmp_path/'work'
    for folder in home, work: folder.mkdir()
    for name in 'GCNN_STN_DATA', 'XDG_CACHE_HOME': monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setattr(data, '_nearby', lambda: [])
    monkeypatch.setattr(dataset, 'AMAT', dict.fromkeys(dataset.AMAT, 40))
    monkeypatch.setattr(dataset, 'ROT_SIZES', (40, 60))
    monkeypatch.chdir(work)
    return home


def leave_home(monkeypatch, how):
    "Neither the environment nor the system knows a home."
    def unknown(*_): raise KeyError('nobody')
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    if how == 'unset': monkeypatch.delenv('HOME')
    else: monkeypatch.setenv('HOME', '')


# what lies at a path before it is read

def put_mnist(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'MNIST').symlink_to(DIGITS/'MNIST')


def put_table(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(file, np.c_[FEW.flatten(1).numpy()/255, LABELS.numpy()], fmt='%.4g')


def put_amat(folder):
    for name in dataset.AMAT: put_table(folder/name)


def put_pictures(folder):
    for i in range(10):
        file = folder/'eurosat'/'2750'/f'class {i % 2}'/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE[i, 0]).save(file)


def put_weights(file): train.save_checkpoint(file, nn.Linear(2, 3))
def put_rows(file): benchmark.write_rows(file, [dict(case='x')])


def put_record(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"id": "x"}')


def put_study(folder): put_record(folder/'runs'/'x.json')
def in_cache(put): return lambda folder: put(folder/'gcnn_stn')


def told(variable, read):
    "A function that hears of its folder from the environment."
    def read_there(path):
        os.environ[variable] = str(path)
        try: return read()
        finally: del os.environ[variable]
    return read_there


def original(read):
    "A function that must find the files' own digits, and not make a set anew."
    def checked(*path):
        found = read(*path)
        assert found.name == 'mnist-rot-original' and len(found.train[0]) == 40
        return found
    return checked


digits = partial(data.mnist, False)
pictures = partial(from_torchvision, 'EuroSAT', download=False)
rotated = original(partial(load_dataset, 'mnist-rot'))

# what lies at a path, and a function that reads it
READS = {
    'mnist': (put_mnist, digits),
    'mnist, by the environment': (put_mnist, told('GCNN_STN_DATA', digits)),
    'mnist, by the cache': (in_cache(put_mnist), told('XDG_CACHE_HOME', digits)),
    'mnist_rot': (put_mnist, partial(dataset.mnist_rot, 0)),
    'load_dataset': (put_mnist, partial(load_dataset, 'mnist')),
    'mnist-rot': (put_amat, rotated),
    'mnist-rot, by the environment': (put_amat, told('GCNN_STN_DATA', rotated)),
    'mnist_rot_original': (put_amat, original(dataset.mnist_rot_original)),
    'read_amat': (put_table, dataset.read_amat),
    'from_torchvision': (put_pictures, pictures),
    'from_torchvision, by the environment': (put_pictures, told('GCNN_STN_DATA', pictures)),
    'from_torchvision, by the cache':
        (in_cache(put_pictures), told('XDG_CACHE_HOME', pictures)),
    'load_checkpoint':
        (put_weights, lambda path: train.load_checkpoint(path, nn.Linear(2, 3))),
    'read_record': (put_record, runner.read_record),
    'read_rows': (put_rows, lambda path: benchmark.read_rows(path)[0]),
    'Evidence': (put_study, figure.Evidence),
}
SEARCHES = 'mnist', 'mnist_rot', 'load_dataset', 'mnist-rot', 'from_torchvision'
ARGUMENTS = [name for name in READS if ', by the' not in name]    # the others hear of it


def command(main, *args):
    "A command whose last argument is a path; its messages become errors."
    def run(path):
        try: status = main([*args, str(path)])
        except SystemExit as e: status = e.code
        if status: raise ValueError(f'exit status {status}')
    return run


def fit(path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    config = train.TrainConfig(epochs=1, batch_size=20)
    train.fit(net, (FEW, LABELS), (FEW, LABELS), config, checkpoint=path, progress=False)


RESULT = runner.Result(dict(id='x'), [dict(epoch=1)], b'x')
FAILURE = runner.Failure('x', 'x')
TABLE = pd.DataFrame(dict(a=[1]))
SHORT = '--dataset', 'digits', '--digits', '64', '--epochs', '1'
ONE = '--grid', 'quick', '--seeds', '1', '--only', 'contender=cnn,regime=upright'
CASE = 'rotate/batch=8'

# functions and commands that write to a path
WRITES = {
    'write_atomically': lambda path: train.write_atomically(path, b'x'),
    'save_checkpoint': put_weights,
    'fit': fit,
    'write_rows': put_rows,
    'run_cases': lambda path: benchmark.run_cases([CASE], path, seconds=0, progress=False),
    'write_page': lambda path: play.write_page(play.Plaything('x'), path),
    'save_figure': lambda path: style.save_figure(plt.figure(), path),
    'write a figure': lambda path: gallery.write(plt.figure(), path),
    'write a table': lambda path: gallery.write(TABLE, path),
    'write_result': lambda path: runner.write_result(path, RESULT),
    'write_failure': lambda path: runner.write_failure(path, 'x', FAILURE),
    'run_missing': lambda path: runner.run_missing([], None, path, None, progress=False),
    'gcnn_stn_train': command(study.train_main, 'cnn', *SHORT, '--out'),
    'gcnn_stn_study': command(study.main, *ONE, *SHORT, '--out'),
    'gcnn_stn_bench': command(benchmark.main, '--only', CASE, '--seconds', '0', '--out'),
    'gcnn_stn_figures': command(gallery.main, '--results', str(ROOT/'results'),
                                'published-rows', '--out'),
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


def nothing_here(): return not any(Path.cwd().iterdir())


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('entrance', READS)
def test_read(entrance, form, home):
    put, read = READS[entrance]
    for name in NAMES if form in ('~', 'a path') else NAMES[:1]:
        put(home/name)
        assert read(FORMS[form](home, name))
    assert nothing_here()


@pytest.mark.parametrize('entrance', READS)
def test_read_without_a_home(entrance, home, monkeypatch):
    put, read = READS[entrance]
    put(home/'data')
    for how in 'unset', 'empty':
        with monkeypatch.context() as m:
            leave_home(m, how)
            assert read(home/'data') and read(os.path.relpath(home/'data'))
            with pytest.raises(ValueError, match='home'): read('~/data')


@pytest.mark.parametrize('entrance', ARGUMENTS)
@pytest.mark.parametrize('path', ['', None, 3, b'data', 'data\0'])
def test_read_from_nowhere(entrance, path, home):
    if path is None and entrance in SEARCHES: return
    with pytest.raises(ValueError): READS[entrance][1](path)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('entrance', WRITES)
def test_write(entrance, form, home, monkeypatch):
    is_command = entrance.startswith('gcnn_stn')      # which takes its time
    if is_command and form not in ('~', 'relative'): return
    monkeypatch.setattr(data, '_nearby', lambda: [DIGITS])
    for name in NAMES if form == '~' and not is_command else NAMES[:1]:
        WRITES[entrance](FORMS[form](home, name))
        made = [str(file.relative_to(home)) for file in home.rglob('*')]
        assert made and all(file.startswith(name) for file in made)
        assert nothing_here()
        for file in home.iterdir(): shutil.rmtree(file) if file.is_dir() else file.unlink()


@pytest.mark.parametrize('entrance', WRITES)
def test_write_without_a_home(entrance, home, monkeypatch):
    for how in 'unset', 'empty':
        with monkeypatch.context() as m:
            leave_home(m, how)
            with pytest.raises(ValueError): WRITES[entrance]('~/gcnn_stn-test')
            assert nothing_here() and not any(Path('/').glob('gcnn_stn-test*'))


@pytest.mark.parametrize('entrance', WRITES)
def test_write_to_nowhere(entrance, home):
    with pytest.raises(ValueError): WRITES[entrance]('')
    assert nothing_here()


# what lies next door is found, whoever one is

@pytest.mark.parametrize('how', ['unset', 'empty'])
@pytest.mark.parametrize('name', ['mnist', 'digits'])
def test_data_next_door_need_no_home(name, how, home, monkeypatch):
    monkeypatch.setattr(data, '_nearby', lambda: [DIGITS])
    leave_home(monkeypatch, how)
    assert load_dataset(name)


def test_made_up_images_need_no_home(home, monkeypatch):
    monkeypatch.setattr('torchvision.datasets.FakeData.__len__', lambda self: 10)
    leave_home(monkeypatch, 'unset')
    assert load_dataset('FakeData', image_size=(1, 8, 8), num_classes=3)


@pytest.mark.parametrize('name', ['mnist', 'KMNIST'])
def test_nothing_next_door_and_no_home(name, home, monkeypatch):
    leave_home(monkeypatch, 'unset')
    with pytest.raises(ValueError, match='set HOME or XDG_CACHE_HOME'):
        load_dataset(name, download=False)


def test_folders_that_nobody_may_enter_are_passed_by(home, monkeypatch):
    "As /data of some clusters: the search goes on behind it."
    def refuse(self, **kwargs): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(data, '_nearby', lambda: [DIGITS])
    monkeypatch.setattr(Path, 'is_file', refuse)
    assert len(data.mnist(False)[0]) == 10_000


@pytest.mark.parametrize('name', ['GCNN_STN_DATA', 'XDG_CACHE_HOME'])
def test_an_empty_variable_is_none(name, home, monkeypatch):
    put_mnist(home/'.cache'/'gcnn_stn')
    monkeypatch.setenv(name, '')
    assert len(data.mnist(False, download=False)[0]) == 10_000


@pytest.mark.parametrize('read', [digits, told('GCNN_STN_DATA', digits)])
def test_a_folder_that_was_named_is_the_only_one(read, home):
    "Quietly taking others would be worse than an error."
    put_mnist(home/'.cache'/'gcnn_stn')
    (home/'empty').mkdir()
    with pytest.raises(ValueError, match='must name a folder'): read('~/empty')


USER_PATHS = {'~': '{home}', '~/': '{home}', '~/a/../b': '{home}/a/../b', 'a/~': 'a/~',
              './~': '~', '.': '.', '/': '/', ' ': ' '}


@pytest.mark.parametrize('path', USER_PATHS)
def test_user_path(path, home):
    assert str(data.user_path(path)) == USER_PATHS[path].format(home=home)
    if path != './~': assert data.user_path(Path(path)) == data.user_path(path)


def test_other_users(home):
    me = pwd.getpwuid(os.getuid())
    assert data.user_path(f'~{me.pw_name}/x') == Path(me.pw_dir)/'x'
    with pytest.raises(ValueError, match="say './~nobody-here/x' if it is called so"):
        data.user_path('~nobody-here/x')
