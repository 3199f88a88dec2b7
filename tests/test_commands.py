"What all commands have in common: any terminal, any reader, paths as a user writes them, and a word before the work begins. A case is a line."
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from book import ROOT
from gcnn_stn.evidence import gallery, race
from gcnn_stn.study import __main__ as study
from gcnn_stn.study.grid import GRIDS, select
from gcnn_stn.study.plan import run_grid
from gcnn_stn.study.archive import all_records, is_missing, read_records
from gcnn_stn.study.report import write_summary
from gcnn_stn.study.unit import load_run

COMMANDS = {'study': study.main, 'train': study.train_main, 'figures': gallery.main, 'bench': race.main}
LIMIT = 1200   # seconds; only what hangs takes as long
FEW = '--dataset', 'digits', '--digits', '40', '--epochs', '1', '--device', 'cpu'
TOY = (*FEW, '--test', '20', '--only', 'contender=cnn,regime=upright')
RESULTS = '--results', str(ROOT/'results')


def call(command, *arguments, encoding='utf-8', errors='strict'):
    "What a command says in this process, to a terminal of that encoding: its status, its words, its complaints."
    streams = [TextIOWrapper(BytesIO(), encoding=encoding, errors=errors) for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try: status = COMMANDS[command]([*map(str, arguments)])
        except SystemExit as e: status = e.code or 0
    assert [s.errors for s in streams] == [errors]*2          # as before
    return status, *(s.buffer.getvalue().decode(encoding) for s in streams)


def alone(command, *arguments, env=(), **kwargs):
    "A command in a process of its own, as pip installs it."
    module, name = COMMANDS[command].__module__, COMMANDS[command].__name__
    words = [sys.executable, '-c', f'import sys; from {module} import {name}; sys.exit({name}())', *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kwargs
    return subprocess.run(words, env=os.environ | {'PYTHONPATH': str(ROOT)} | dict(env), timeout=LIMIT, **pipes)


# Terminals

ENCODINGS = 'ascii', 'latin-1', 'cp437', 'cp1252', 'utf-8'
SAYINGS = {   # what is said → the command, its status
    'help':          ('study', ['--help'], 0),
    'help of one':   ('train', ['--help'], 0),
    'a list':        ('figures', ['--list'], 0),
    'many cases':    ('bench', ['--list'], 0),
    'a listing':     ('study', ['--list', *TOY], 0),
    'a mistake':     ('study', ['--only', 'regime=≠ ☺', *FEW], 2),
    'another':       ('figures', ['☺', *RESULTS], 2),
    'a wrong word':  ('train', ['☺'], 2),
    'a wrong case':  ('bench', ['--only', '☺*'], 2),
    'a table':       ('figures', ['effects', *RESULTS, '--out', 'drawn ü'], 0)}


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('what', SAYINGS)
def test_terminal(what, encoding, tmp_path, monkeypatch):
    "Whatever a terminal can't show, the command says it as well as it can, and files are UTF-8."
    monkeypatch.chdir(tmp_path)
    command, arguments, wanted = SAYINGS[what]
    status, said, complaints = call(command, *arguments, encoding=encoding)
    assert status == wanted and 'Traceback' not in complaints, complaints
    assert (said if wanted == 0 else complaints).strip()
    for path in tmp_path.rglob('*.md'): assert '−' in path.read_text('utf-8')


def test_likeness(tmp_path, monkeypatch):
    "A minus stays a minus: a terminal gets what looks like the character that it lacks."
    monkeypatch.setattr(gallery, 'report_missing', lambda evidence: '−1 ± 2 … 45° ☺')
    said = call('figures', 'table-1', *RESULTS, '--out', tmp_path, encoding='ascii')[1]
    assert said.endswith('-1 +- 2 ... 45 deg ?\n')


PLAIN = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONIOENCODING': ''}
WORLDS = {   # the terminal and the system around it
    'DOS':   {'PYTHONIOENCODING': 'cp437'},
    'plain': PLAIN}


@pytest.mark.parametrize('world', WORLDS)
def test_study_in_a_plain_world(world, tmp_path):
    "A whole study with its bars, tables and a foreign file."
    runs = tmp_path/'ü'/'quick'/'runs'
    runs.mkdir(parents=True)
    (runs/'notes.json').write_text('{"♥": "☺"}', encoding='utf-8')
    done = alone('study', *TOY, '--out', tmp_path/'ü', env=WORLDS[world])
    assert done.returncode == 0 and b'Traceback' not in done.stderr and b'notes.json' in done.stderr, done.stderr
    assert b'CNN' in done.stdout and len([*runs.glob('cnn*.json')]) == 1
    json.loads(next(runs.glob('cnn*.json')).read_text('utf-8'))
    assert 'CNN' in (runs.parent/'quick.md').read_text('utf-8')


# Readers

@pytest.mark.parametrize('command, arguments', [('study', ['--help']), ('bench', ['--list']), ('figures', ['effects', *RESULTS])])
def test_reader_leaves(command, arguments, tmp_path):
    "As with `| head`: no traceback, and the status is that of the work."
    reader, writer = os.pipe()
    os.close(reader)
    more = ['--out', tmp_path] if 'effects' in arguments else []
    done = alone(command, *arguments, *more, stdout=writer)
    os.close(writer)
    assert done.returncode == 0 and b'Traceback' not in done.stderr and b'BrokenPipe' not in done.stderr, done.stderr


def test_nobody_listens(tmp_path):
    "Not even complaints are heard: the study is done all the same."
    reader, writer = os.pipe()
    os.close(reader)
    done = alone('study', *TOY, '--out', tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and (tmp_path/'quick'/'quick.md').exists()


@pytest.mark.parametrize('closed', [1, 2])
def test_closed(closed, tmp_path):
    "Standard output or error is closed from the start."
    done = alone('figures', 'effects', *RESULTS, '--out', tmp_path, preexec_fn=lambda: os.close(closed))
    assert done.returncode == 0 and b'Traceback' not in done.stderr and (tmp_path/'effects.md').exists()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_full(tmp_path):
    "Words that can't be written are missed, in a line."
    with open('/dev/full', 'w') as full: done = alone('figures', '--list', stdout=full)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


# Paths

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder; we work beside it."
    for name in 'home', 'here': (tmp_path/name).mkdir()
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path/'here')
    return tmp_path/'home'


PATHS = {   # what is asked → the command, a file that is left at home
    'study':   ('study', [*TOY, '--jobs', '1', '--out', '~/mine'], 'mine/quick/quick.md'),
    'train':   ('train', ['cnn', *FEW, '--out', '~/net.safetensors'], 'net.json'),
    'figures': ('figures', ['effects', *RESULTS, '--out', '~/drawn'], 'drawn/effects.md'),
    'results': ('figures', ['effects', '--results', '~/results'], 'results/figures/effects.md'),
    'bench':   ('bench', ['--only', 'rotate/batch=1', '--seconds', '0', '--out', '~/raced'], 'raced/cpu.csv')}


@pytest.mark.parametrize('what', PATHS)
def test_home(what, home):
    "~ is the user's home, and no folder of that name."
    command, arguments, left = PATHS[what]
    if what == 'results':
        (home/'results').mkdir()
        for part in 'runs', 'weights', 'published': (home/'results'/part).symlink_to(ROOT/'results'/part)
    status, _, complaints = call(command, *arguments)
    assert status == 0 and (home/left).exists() and not [*Path('.').iterdir()], complaints


def test_home_by_hand(home):
    "In Python, too."
    run, = select(GRIDS['quick'].runs(dataset='digits', digits=40, epochs=1, test=20), 'contender=cnn,regime=upright')
    records, failed = run_grid([run], '~/mine', 'cpu', progress=False)
    assert not failed and read_records([run], '~/mine') == all_records('~/mine') == records
    assert not is_missing(run, home/'mine') and not is_missing(run, '~/mine')
    load_run(run, '~/mine')
    write_summary(records, '~/mine')
    assert (home/'mine'/'table.md').exists() and not [*Path('.').iterdir()]


# Mistakes

def taken(name, text='mine'):
    def prepare(): Path(name).write_text(text)
    return prepare


def trained(name):
    "Somebody has trained a network before."
    def prepare(): assert call('train', 'cnn', *FEW, '--out', name)[0] == 0
    return prepare


def nothing(): pass
def folder(): Path('folder').mkdir()


HUGE = '9'*20
MISTAKES = {   # name → command, arguments, words that must be said, what is there before
    'no grid':           ('study', ['--grid', 'large'], 'invalid choice', nothing),
    'no seeds':          ('study', ['--seeds', '0'], 'seeds must be at least 1', nothing),
    'too many seeds':    ('study', ['--seeds', HUGE], 'seeds must be at least 1', nothing),
    'half a seed':       ('study', ['--seeds', '1.5'], 'invalid int', nothing),
    'no digits':         ('study', ['--digits', '0'], 'digits must be at least 1', nothing),
    'too many digits':   ('study', ['--digits', '2000', '--dataset', 'digits'], 'digits must be at most', nothing),
    'all too many':      ('study', ['--digits', HUGE], 'digits must be at least 1', nothing),
    'negative epochs':   ('study', ['--epochs', '-1'], 'epochs must be', nothing),
    'endless epochs':    ('study', ['--epochs', HUGE], 'epochs must be', nothing),
    'a negative test':   ('study', ['--test', '-1'], 'test must be at least 0', nothing),
    'no threads':        ('study', ['--threads', '0'], 'threads must be at least 1', nothing),
    'all threads':       ('study', ['--threads', HUGE], 'threads must be', nothing),
    'no jobs':           ('study', ['--jobs', '0'], 'jobs must be at least 1', nothing),
    'negative jobs':     ('study', ['--jobs', '-2'], 'jobs must be at least 1', nothing),
    'no stack':          ('study', ['--stack', '0'], 'stack must be at least 1', nothing),
    'no number of gpus': ('study', ['--engine', 'ray', '--gpus', 'nan'], 'gpus must be', nothing),
    'gpus without end':  ('study', ['--engine', 'ray', '--gpus', 'inf'], 'gpus must be', nothing),
    'no device':         ('study', ['--device', 'abacus'], 'device must be', nothing),
    'no set':            ('study', ['--dataset', 'Sudoku'], 'name must be one of', nothing),
    'an empty set':      ('study', ['--dataset', ''], 'name must be one of', nothing),
    'no size':           ('study', ['--dataset', 'digits', '--size', '0'], 'size must be', nothing),
    'a size in words':   ('train', ['cnn', '--dataset', 'digits', '--size', 'large'], 'size must be', nothing),
    'a fill for digits': ('study', ['--fill', '3'], "options of mnist must be among", nothing),
    'quickly':           ('study', ['--grid', 'small', '--quick'], 'quick is for the grid compare', nothing),
    'no key':            ('study', ['--only', 'colour=red'], 'keys of batch_size', nothing),
    'no key at all':     ('study', ['--only', '=red'], 'keys of batch_size', nothing),
    'no value':          ('study', ['--only', 'contender'], 'key=value or key!=value', nothing),
    'an unknown value':  ('study', ['--only', 'contender=ccn'], 'which none has; there are cnn,', nothing),
    'an unknown other':  ('study', ['--only', 'contender!=ccn'], 'which none has; there are cnn,', nothing),
    'an empty value':    ('study', ['--only', 'contender='], 'which none has', nothing),
    'a contradiction':   ('study', ['--only', 'seed=0,seed!=0'], 'must leave some runs', nothing),
    'nowhere':           ('study', ['--out', ''], 'must name a file or a folder', nothing),
    'no home':           ('study', ['--out', '~no-such-user/x'], 'needs a home folder', nothing),
    'under a file':      ('study', [*TOY, '--out', 'file/results'], 'can be written', taken('file')),
    'a file':            ('study', [*TOY, '--out', 'file'], 'can be written', taken('file')),
    'not to be written': ('study', [*TOY, '--out', '/proc/nowhere'], 'can be written', nothing),

    'no network':        ('train', ['ccn'], 'invalid choice', nothing),
    'a huge seed':       ('train', ['cnn', '--seed', HUGE], 'seed must be at least 0', nothing),
    'a negative seed':   ('train', ['cnn', '--seed', '-1'], 'seed must be at least 0', nothing),
    'no images':         ('train', ['cnn', '--digits', '0'], 'digits must be at least 1', nothing),
    'too many images':   ('train', ['cnn', '--digits', '2000', '--dataset', 'digits'], 'digits must be at most', nothing),
    'no epochs':         ('train', ['cnn', '--epochs', '0'], 'epochs must be', nothing),
    'no rate':           ('train', ['cnn', '--lr', '0'], 'lr must be', nothing),
    'a rate of nothing': ('train', ['cnn', '--lr', 'nan'], 'lr must be', nothing),
    'an endless rate':   ('train', ['cnn', '--lr', 'inf'], 'lr must be', nothing),
    'a penalty alone':   ('train', ['cnn', '--penalty', '1'], 'equivariance must be', nothing),
    'no penalty':        ('train', ['cnn', '--equivariance', '4', '--penalty', 'nan'], 'penalty must be', nothing),
    'an endless one':    ('train', ['cnn', '--equivariance', '4', '--penalty', 'inf'], 'penalty must be', nothing),
    'one rotation':      ('train', ['cnn', '--equivariance', '1'], 'equivariance must be', nothing),
    'no thread':         ('train', ['cnn', '--threads', '-1'], 'threads must be', nothing),
    'device':            ('train', ['cnn', '--device', 'abacus'], 'device must be', nothing),
    'an empty name':     ('train', ['cnn', *FEW, '--out', ''], 'must name a file or a folder', nothing),
    'a folder':          ('train', ['cnn', *FEW, '--out', 'folder'], 'must be a file', folder),
    'a folder to be':    ('train', ['cnn', *FEW, '--out', 'new/'], 'must be a file', nothing),
    'this folder':       ('train', ['cnn', *FEW, '--out', '.'], 'must be a file', nothing),
    'a device':          ('train', ['cnn', *FEW, '--out', '/dev/null'], 'must be a file', nothing),
    "the record's name": ('train', ['cnn', *FEW, '--out', 'net.json'], 'must not end in', nothing),
    'beneath a file':    ('train', ['cnn', *FEW, '--out', 'file/net'], 'can be written', taken('file')),
    'read only':         ('train', ['cnn', *FEW, '--out', '/proc/net.safetensors'], 'can be written', nothing),
    "somebody's notes":  ('train', ['cnn', *FEW, '--out', 'net'], 'net.json would be overwritten', taken('net.json')),
    "somebody's table":  ('train', ['cnn', *FEW, '--out', 'net.safetensors'], 'net.csv would be overwritten', taken('net.csv')),
    "another's record":  ('train', ['cnn', *FEW, '--out', 'net'], 'net.csv would be overwritten', trained('net.safetensors')),

    'no figure':         ('figures', ['figure-99', *RESULTS], 'names must be among', nothing),
    'no study':          ('figures', ['--results', 'folder'], 'gcnn_stn_study makes it', folder),
    'an empty study':    ('figures', ['--results', ''], 'must name a file or a folder', nothing),
    'drawn nowhere':     ('figures', ['effects', *RESULTS, '--out', ''], 'must name a file or a folder', nothing),
    'drawn in a file':   ('figures', ['effects', *RESULTS, '--out', 'file'], 'can be written', taken('file')),
    'drawn under one':   ('figures', ['effects', *RESULTS, '--out', 'file/x'], 'can be written', taken('file')),
    'drawn in /proc':    ('figures', ['effects', *RESULTS, '--out', '/proc/x'], 'can be written', nothing),
    'drawn by an abacus': ('figures', ['effects', *RESULTS, '--out', 'x', '--device', 'abacus'], 'device must be', nothing),

    'no case':           ('bench', ['--only', 'nothing*'], 'must match a case', nothing),
    'no time':           ('bench', ['--seconds', 'nan'], 'seconds must be', nothing),
    'all time':          ('bench', ['--seconds', 'inf'], 'seconds must be', nothing),
    'threads':           ('bench', ['--threads', HUGE], 'threads must be', nothing),
    'raced nowhere':     ('bench', ['--quick', '--out', ''], 'must name a file or a folder', nothing),
    'raced in a file':   ('bench', ['--quick', '--out', 'file'], 'can be written', taken('file')),
    'raced in /proc':    ('bench', ['--quick', '--out', '/proc/x'], 'can be written', nothing)}


def there(): return {str(p): p.is_file() and p.read_bytes() for p in Path('.').rglob('*')}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistake(name, home):
    "It is said in a line what is wrong; nothing has been written, and nothing lost."
    command, arguments, words, prepare = MISTAKES[name]
    prepare()
    before = there()
    status, said, complaints = call(command, *arguments)
    assert (status, said) == (2, '') and words in complaints, complaints
    assert len(complaints.splitlines()) == 1 or 'usage' in complaints, complaints   # argparse says how it is used
    assert there() == before


def test_names_taken_whole(home):
    "What a network is called stays whole: two of them, two records; the same again, the same."
    for name in 'net.s0', 'net.s1', 'net.safetensors', 'net.s1': assert call('train', 'cnn', *FEW, '--out', name)[0] == 0, name
    wanted = {f'{stem}{end}' for stem in ('net.s0', 'net.s1') for end in ('', '.json', '.csv')} | {'net.safetensors', 'net.json', 'net.csv'}
    assert {p.name for p in Path('.').iterdir()} == wanted
    assert call('train', 'cnn', *FEW, '--seed', '1', '--out', 'net.s1')[0] == 0
    seeds = {p.name: json.loads(p.read_text())['seed'] for p in Path('.').glob('*.json')}
    assert seeds == {'net.s0.json': 0, 'net.s1.json': 1, 'net.json': 0}


ONLY = {   # --only → which runs of the quick grid are left
    '':                                       10,
    'contender=cnn':                          2,
    'contender!=cnn':                         8,
    'contender != cnn , regime = upright':    4,
    'contender!=cnn,contender!=stcnn':        6,
    'order=8':                                2,
    'order!=8':                               8,
    'lr=0.03,regime!=rotated':                3,
    'lr=.03,seed=0.0':                        6,
    'channels=(8, 16, 27)':                   2,
    'model!=gcnn,regime=upright,':            3,
    'id!=cnn-quick-upright-s0':               9,
    'patience=None':                          10}


@pytest.mark.parametrize('only', ONLY)
def test_only(only): assert len(select(GRIDS['quick'].runs(), only)) == ONLY[only]
