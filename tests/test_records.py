"Damaged, foreign and lying records and weights: each is named and skipped, and mended by running again. A case is a line."
import copy
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import reduce
from io import StringIO
from types import SimpleNamespace

import pytest
import torch

from book import ROOT
from gcnn_stn.study import __main__ as command
from gcnn_stn.study import plan, report, unit
from gcnn_stn.study.grid import GRIDS, select
from gcnn_stn.study.plan import run_grid
from gcnn_stn.study.archive import (LATER, METRICS, RECORD, TEXT, all_records, is_missing,
                                   read_records, record_fault, why_missing)
from gcnn_stn.study.record import epochs_path, record_path, weights_path, write_result
from gcnn_stn.study.engine import inline
from gcnn_stn.study.checkpoint import checkpoint_bytes
from gcnn_stn.study.unit import fresh_model, load_data, load_run, run_unit

TOY = dict(dataset='digits', digits=60, epochs=1, test=50)
RUNS = select(GRIDS['quick'].runs(**TOY), 'contender=cnn')
RUN, OTHER = RUNS
COMMAND = ['--only', 'contender=cnn', '--device', 'cpu', '--jobs', '1', *(w for k, v in TOY.items() for w in (f'--{k}', str(v)))]
DAMAGE = pytest.mark.filterwarnings('ignore::gcnn_stn.study.record.RecordWarning')


@pytest.fixture(scope='module')
def results():
    "What two runs leave."
    return {run.id: run_unit((run,), device='cpu')[0] for run in RUNS}


@pytest.fixture
def folder(results, tmp_path, monkeypatch):
    "A finished study; whoever runs it again gets the same results in no time, and is counted."
    def work(unit, report=None, **how):
        again.extend(run.id for run in unit)
        return [results[run.id] for run in unit]
    again = []
    monkeypatch.setattr(plan, 'run_unit', work)
    monkeypatch.setattr(command, 'processes', lambda *args: inline)
    monkeypatch.setattr(report, 'plot_by_angle', lambda records: [SimpleNamespace(figure=None)])   # takes its time
    monkeypatch.setattr(report, 'save_figure', lambda figure, path: None)
    monkeypatch.setattr(plan, 'again', again, raising=False)
    for result in results.values(): write_result(tmp_path/'quick', result)
    return tmp_path/'quick'


def told(folder, *arguments):
    "What the command says: its status, its words, its complaints."
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = command.main([*COMMAND, '--out', str(folder.parent), *arguments])
    return status, out.getvalue(), err.getvalue()


# What lies under a run's name and isn't its record

def edit(**changes):
    "A record with something else in it; a__b is b in a."
    def damage(folder):
        path = record_path(folder, RUN.id)
        record = json.loads(path.read_text())
        for key, value in changes.items():
            *outer, last = key.split('__')
            place = reduce(dict.get, outer, record)
            if value is GONE: del place[last]
            else: place[last] = value(place[last]) if callable(value) else value
        path.write_text(json.dumps(record))
    return damage


def write(place, change):
    "A file with other bytes."
    def damage(folder):
        path = place(folder, RUN.id)
        path.write_bytes(change(path.read_bytes()))
    return damage


def remove(place): return lambda folder: place(folder, RUN.id).unlink()
def swap(place): return lambda folder: shutil.copy(place(folder, OTHER.id), place(folder, RUN.id))
def move(matrix): return [[matrix[0][0] - 1, matrix[0][1] + 1, *matrix[0][2:]], *matrix[1:]]
def cut(data): return data[:len(data)//2]
def flip(data): return data[:-1] + bytes([data[-1] ^ 1])


def retrained(folder):
    "Weights of the same run at another time."
    net = fresh_model(replace(RUN, seed=7), load_data('digits'))
    weights_path(folder, RUN.id).write_bytes(checkpoint_bytes(net, torch.float16, run=RUN.id))


def link_to(target):
    def damage(folder):
        record_path(folder, RUN.id).unlink()
        record_path(folder, RUN.id).symlink_to(target)
    return damage


def unreadable(folder):
    record_path(folder, RUN.id).chmod(0)
    if os.access(record_path(folder, RUN.id), os.R_OK): record_path(folder, RUN.id).write_bytes(b'')   # as root


GONE = object()
DAMAGED = {   # name → damage; words that must be said
    'cut off':                (write(record_path, cut), 'whole JSON'),
    'empty':                  (write(record_path, lambda b: b''), 'whole JSON'),
    'a list':                 (write(record_path, lambda b: b'[' + b + b']'), 'a list'),
    'null':                   (write(record_path, lambda b: b'null'), 'NoneType'),
    'no text':                (write(record_path, lambda b: bytes(range(256))), 'whole JSON'),
    'zeros':                  (write(record_path, lambda b: bytes(len(b))), 'whole JSON'),
    'UTF-16':                 (write(record_path, lambda b: b.decode().encode('utf-16')), 'whole JSON'),
    'too deep':               (write(record_path, lambda b: b'['*100_000), 'whole JSON'),
    'NaN':                    (edit(metrics__rotated=float('nan')), 'NaN is no number'),
    'infinity':               (edit(cost__seconds=float('inf')), 'Infinity is no number'),
    'too good':               (edit(metrics__rotated=7.), 'metrics.rotated must be'),
    'negative':               (edit(metrics__upright=-.1), 'confusion matrix'),
    'an accuracy as text':    (edit(metrics__rotated='0.5'), 'metrics.rotated must be'),
    'an accuracy that lies':  (edit(metrics__rotated=1.), 'confusion matrix'),
    'no accuracy':            (edit(metrics__upright=GONE), 'accuracy'),
    'no confusion':           (edit(metrics__confusion__upright=GONE), 'confusion matrix'),
    'confusions disagree':    (edit(metrics__confusion__rotated=lambda c: [*c[:8], c[9], c[8]]), 'confusion'),
    'a ragged confusion':     (edit(metrics__confusion__rotated=lambda c: [c[0][:-1], *c[1:]]), 'square of counts'),
    'a negative count':       (edit(metrics__confusion__rotated=lambda c: [[-1, *c[0][1:]], *c[1:]]), 'square of counts'),
    'an empty confusion':     (edit(metrics__confusion__rotated=[]), 'square of counts'),
    'another confusion':      (edit(metrics__confusion__foo=[[1]]), 'confusion'),
    'a digit read otherwise': (edit(metrics__confusion__rotated=move), 'confusion'),
    'too few angles':         (edit(metrics__by_angle=lambda a: a[:-1]), '24 numbers'),
    'too many angles':        (edit(metrics__by_angle=lambda a: [*a, .5]), '24 numbers'),
    'too few fine angles':    (edit(metrics__by_fine_angle=lambda a: a[:-1]), '72 numbers'),
    'a calibration too bad':  (edit(metrics__calibration__ece=2.), 'metrics.calibration.ece'),
    'shares of other images': (edit(metrics__by_angle=lambda a: [1/3]*24, metrics__six_nine_by_angle=[0.]*24), 'shares of 50'),
    'sixes beyond errors':    (edit(metrics__six_nine_by_angle=[1.]*24), 'six for nine'),
    'no metrics':             (edit(metrics={}), 'metrics must be there'),
    'another seed':           (edit(seed=3), 'id must'),
    'another seed inside':    (edit(config__seed=3), 'seed must be'),
    'a seed that is true':    (edit(seed=True), 'seed must be'),
    'another id':             (edit(id='cnn-quick-upright-s0'), 'id is'),
    'another contender':      (edit(contender='stcnn'), 'id must'),
    'another rate':           (edit(config__lr=.5), 'config.lr is 0.5'),
    'more epochs':            (edit(config__epochs=2), 'as many epochs'),
    'more epochs done':       (edit(training__epochs=2), 'as many epochs'),
    'a later best epoch':     (edit(training__best_epoch=2), 'best epoch'),
    'a validation':           (edit(training__valid_accuracy=.5), 'valid_accuracy'),
    'another test':           (edit(test=None), 'test is None'),
    'more digits':            (edit(digits=61), 'digits is 61'),
    'other threads':          (edit(threads=2), 'threads is 2'),
    'other arguments':        (edit(model__channels=[1, 2, 3]), 'model has channels'),
    'another network':        (edit(model__model='stcnn'), 'model.model is'),
    'other parameters':       (edit(cost__parameters=7), '7 parameters'),
    'other regime':           (edit(regime='rotated'), 'id must'),
    'turned otherwise':       (edit(config__rotate=True), 'regime must be'),
    'no regime':              (edit(config__rotate=None), 'config.rotate must be'),
    'other images':           (edit(hashes__test='0'*64), 'other images'),
    'no hash':                (edit(hashes__train='abc'), '64 hexadecimal'),
    'a bad configuration':    (edit(config__weight_decay=-1), 'config: weight_decay'),
    'an unknown decision':    (edit(config__mixup=.5), 'config has mixup'),
    'no configuration':       (edit(config=GONE), 'config is missing'),
    'a list of settings':     (edit(speed=[]), 'speed must be an object'),
    'another record':         (swap(record_path), 'id is'),
    'a link to nowhere':      (link_to('/nowhere/at/all'), ''),
    'a link to itself':       (link_to(f'{RUN.id}.json'), ''),
    'not to be read':         (unreadable, 'whole JSON'),
    'epochs gone':            (remove(epochs_path), 'its epochs'),
    'epochs cut off':         (write(epochs_path, lambda b: b.splitlines(keepends=True)[0]), 'must be 1 lines'),
    'epochs empty':           (write(epochs_path, lambda b: b''), 'must be 1 lines'),
    'epochs of binary':       (write(epochs_path, lambda b: bytes(range(256))), 'its epochs'),
    'epochs of others':       (write(epochs_path, lambda b: b + b.splitlines()[1]), 'must be 1 lines'),
    'a loss of nothing':      (write(epochs_path, lambda b: b'epoch,loss\n1,nan\n'), 'must be 1 lines'),
    'no loss':                (write(epochs_path, lambda b: b'epoch\n1\n'), 'its epochs'),
    'weights gone':           (remove(weights_path), 'lost'),
    'weights cut off':        (write(weights_path, cut), 'its weights'),
    'weights empty':          (write(weights_path, lambda b: b''), 'its weights'),
    'a bit flipped':          (write(weights_path, flip), 'its weights'),
    'weights of another run': (swap(weights_path), f'got those of {OTHER.id}'),
    'weights of other times': (retrained, 'got others')}


def test_sound(folder):
    "Nothing is done again where nothing is wrong."
    status, said, complaints = told(folder)
    assert (status, plan.again) == (0, []) and said.count('CNN') == 2 and not complaints, complaints


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged(name, folder):
    "It is said what is wrong, and by running again it is as it was."
    damage, words = DAMAGED[name]
    damage(folder)
    why = why_missing(RUN, folder)
    assert why is not None and words in why and len(why.splitlines()) < 2, why
    assert is_missing(RUN, folder) and not is_missing(OTHER, folder)
    assert '1 of 2 runs are missing' in told(folder, '--missing')[1]
    status, said, complaints = told(folder)
    assert (status, plan.again) == (0, [RUN.id]) and said.count('CNN') == 2
    assert complaints.count(f'{RUN.id} is done again') == (why != ''), complaints
    assert not is_missing(RUN, folder) and told(folder)[2] == '' and plan.again == [RUN.id]
    load_run(RUN, folder)


def test_belief_follows_the_file(folder):
    "A record is looked at again when it has changed, however quickly."
    path = record_path(folder, RUN.id)
    whole = path.read_text()
    for text, missing in ((whole.replace('"seed": 0', '"seed": 3'), True), (whole, False))*3:   # of one length
        path.write_text(text)
        assert is_missing(RUN, folder) is missing


def leaves(schema, where=()):
    "All keys of a schema, from the outside in."
    for key, rule in schema.items():
        yield (*where, key)
        if isinstance(rule, dict): yield from leaves(rule, (*where, key))


SCHEMA = RECORD | {'metrics': METRICS} | LATER
ALL = [*leaves(SCHEMA)]


@pytest.mark.parametrize('keys', ALL, ids='.'.join)
def test_each_key(keys, results):
    "None may be missing, and none may be something else."
    whole = results[RUN.id].record
    assert record_fault(whole) is None
    for value in GONE, 'nonsense', -1, float('nan'), {}, [], 10**400, [[]]:
        record = copy.deepcopy(whole)
        *outer, last = keys
        place = reduce(dict.get, outer, record)
        if value is GONE: del place[last]
        else: place[last] = value
        optional = keys[0] in LATER and value is GONE and len(keys) == 1
        text = value == 'nonsense' and TEXT is reduce(dict.get, keys, SCHEMA) and keys[0] not in ('id', 'contender', 'grid', 'regime')
        assert bool(record_fault(record)) is not (optional or text), (value, record_fault(record))


def test_places_taken(folder):
    "A folder where a file must go is refused before anything is done."
    for place in record_path, epochs_path, weights_path:
        path = place(folder, RUN.id)
        path.unlink(missing_ok=True)
        path.mkdir()
        status, _, complaints = told(folder)
        assert (status, plan.again) == (2, []) and 'must be a file' in complaints, complaints
        path.rmdir()


# What lies among the records and is nobody's

def foreign(name, text): return lambda folder: (folder/'runs'/name).write_text(text)
def pipe(folder): os.mkfifo(folder/'runs'/'pipe.json')


FOREIGN = {   # name → what lies there, the file's stem
    'notes':            (foreign('notes.json', '{"to do": "sleep"}'), 'notes'),
    'a list':           (foreign('list.json', '[1, 2]'), 'list'),
    'nothing':          (foreign('nothing.json', ''), 'nothing'),
    'binary':           (lambda folder: (folder/'runs'/'x.json').write_bytes(bytes(range(256))), 'x'),
    'a copy':           (lambda folder: shutil.copy(record_path(folder, RUN.id), folder/'runs'/'copy.json'), 'copy'),
    'a hidden copy':    (lambda folder: shutil.copy(record_path(folder, RUN.id), folder/'runs'/'._a.json'), '._a'),
    'a folder':         (lambda folder: (folder/'runs'/'deep.json').mkdir(), 'deep'),
    'a pipe':           (pipe, 'pipe'),
    'a link':           (lambda folder: (folder/'runs'/'lost.json').symlink_to('/nowhere'), 'lost'),
    'too deep':         (foreign('brackets.json', '['*100_000), 'brackets'),
    'a long name':      (foreign(f'{"ü"*100}.json', '{}'), 'ü'*100)}


@pytest.mark.parametrize('name', FOREIGN)
def test_foreign(name, folder):
    "It is named once, left alone, and the study comes to its end with all its tables."
    put, stem = FOREIGN[name]
    put(folder)
    before = os.lstat(folder/'runs'/f'{stem}.json').st_mtime_ns
    edit(seed=3)(folder)                                     # there is something to do, too
    status, said, complaints = told(folder)
    assert (status, plan.again) == (0, [RUN.id]) and said.count('CNN') == 2
    assert complaints.count(f'{stem}.json') == 1 and 'Traceback' not in complaints, complaints
    assert os.lstat(folder/'runs'/f'{stem}.json').st_mtime_ns == before
    assert (folder/'quick.md').read_text('utf-8').count('CNN') == 2
    assert len((folder/'runs.csv').read_text('utf-8').splitlines()) == 3


def test_other_grid(folder):
    "A record of another grid is a record, and stands in no table of this one."
    text = record_path(folder, RUN.id).read_text()
    record_path(folder, RUN.id.replace('quick', 'slow')).write_text(text.replace('quick', 'slow'))
    status, said, complaints = told(folder)
    assert (status, complaints) == (0, '') and said.count('CNN') == 2
    assert len((folder/'runs.csv').read_text('utf-8').splitlines()) == 4


def test_other_variant(folder, results):
    "A run of another size has rows of its own; one that the grid can't have is named."
    for size in 61, 62:
        text = json.dumps(results[RUN.id].record).replace('-n60-', f'-n{size}-').replace('"digits": 60', f'"digits": {size}')
        if size == 62: text = text.replace('"lr": ', '"lr": 1')
        record_path(folder, RUN.id.replace('-n60-', f'-n{size}-')).write_text(text)
    status, said, complaints = told(folder)
    assert status == 0 and said.count('CNN') == 3 and 'n61' in said and 'n62' not in said
    assert complaints.count('n62') == 1 and 'config.lr' in complaints, complaints


# What isn't a fault

def test_older_and_newer(folder):
    "Records that lack what was added later count as done, and so do those that say more; the threads are told."
    edit(threads=GONE, weights=GONE, versions__threads=4, config__penalty=GONE)(folder)
    edit(invented={'later': 1}, versions__gcnn_stn='99.0', metrics__upside_down=.5)(folder)
    assert not is_missing(RUN, folder) and 'on 4 threads' in told(folder, '--list')[1]
    status, _, complaints = told(folder)
    assert (status, plan.again) == (0, []) and '1 older records were computed on other numbers of threads' in complaints
    weights_path(folder, RUN.id).unlink()
    assert not is_missing(RUN, folder)                       # nobody can tell whether they were kept
    (folder/'left_out.txt').write_text('# none\n')
    assert is_missing(RUN, folder)                           # somebody has said which aren't


@DAMAGE
def test_left_out(folder):
    "Weights may be left out on purpose, if that is said; damaged ones are damaged all the same."
    weights_path(folder, RUN.id).unlink()
    assert is_missing(RUN, folder) and len(read_records(RUNS, folder)) == 2   # the record is there
    (folder/'left_out.txt').write_text('gcnn-*\ncnn-*-s0   # small\n')
    assert not is_missing(RUN, folder) and told(folder)[0] == 0 and not plan.again
    weights_path(folder, RUN.id).write_bytes(b'x')
    assert is_missing(RUN, folder)
    swap(weights_path)(folder)
    with pytest.raises(ValueError, match='got weights of'): load_run(RUN, folder)


def test_other_data(folder, monkeypatch):
    "Ten images less are another data set."
    load = unit.load_dataset
    def fewer(*args, **kwargs):
        data = load(*args, **kwargs)
        return replace(data, train=tuple(t[:-10] for t in data.train))
    monkeypatch.setattr(unit, 'load_dataset', fewer)
    load_data.cache_clear()
    try:
        assert all('other images' in why_missing(run, folder) for run in RUNS)
        with pytest.warns(UserWarning, match='other images'): assert not read_records(RUNS, folder)
    finally: load_data.cache_clear()


def test_never_ending(folder, results, monkeypatch):
    "A run whose record is refused as soon as it is written isn't done for ever."
    honest = results[RUN.id]
    lie = replace(honest, record=honest.record | dict(seed=5))
    monkeypatch.setattr(plan, 'run_unit', lambda unit, report=None, **how: [lie])
    remove(record_path)(folder)
    with pytest.warns(UserWarning): failed = run_grid(RUNS, folder, 'cpu', progress=False)[1]
    assert [*failed] == [RUN.id] and 'does not count as done' in failed[RUN.id].reason


@pytest.mark.parametrize('grid', ['small', 'mnist-rot', 'slim', 'tune'])
def test_published_here(grid):
    "All runs of these grids are done in the repository, weights or not; of each published figure some are."
    assert {why_missing(run, ROOT/'results') for run in GRIDS[grid].runs()} == {None}


@DAMAGE
def test_copies(tmp_path):
    "The records count without their folder, too; weights that should be there are missed."
    small = GRIDS['small'].runs()
    shutil.copytree(ROOT/'results'/'runs', tmp_path/'runs')
    assert not any(is_missing(run, tmp_path) for run in small)
    shutil.copytree(ROOT/'results'/'weights', tmp_path/'weights')
    shutil.copy(ROOT/'results'/'left_out.txt', tmp_path)
    weights_path(tmp_path, small[0].id).unlink()
    assert [run for run in small if is_missing(run, tmp_path)] == small[:1]
    assert all_records(tmp_path) == all_records(ROOT/'results')
