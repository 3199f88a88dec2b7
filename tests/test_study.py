"The study survives whatever happens to it, on one machine and on several processes."
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from book import ROOT
from gcnn_stn.study.archive import record_fault
from gcnn_stn.study.contender import OPPONENTS, build
from gcnn_stn.study.data import load_dataset
from gcnn_stn.study.engine import inline, processes
from gcnn_stn.study.grid import GRIDS, select
from gcnn_stn.study.plan import run_grid
from gcnn_stn.study.train import TrainConfig, fit
from gcnn_stn.study.unit import run_unit

STUDY = [sys.executable, '-c', 'import sys; from gcnn_stn.study.__main__ import main; sys.exit(main())']   # as the command that pip installs
TOY = ['--device', 'cpu', '--digits', '200', '--epochs', '1', '--test', '100', '--jobs', '1']
LIMIT = 1200   # seconds; only what hangs takes as long


def command(out, *arguments, head=STUDY):
    part = () if '--only' in arguments else ('--only', 'regime=upright')
    return [*head, *TOY, '--out', str(out), *part, *arguments]


def start(out, *arguments, **kwargs):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(out, *arguments), cwd=ROOT, **pipes, **kwargs)


def stamps(out): return {p.stem: p.stat().st_mtime_ns for p in (out/'quick'/'runs').glob('*.json')}


def run(out, *arguments, **kwargs):
    "Run the command to its end."
    done = subprocess.run(command(out, *arguments, **kwargs), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(out):
    "What the records say, but for times."
    found = {p.stem: json.loads(p.read_text()) for p in (out/'quick'/'runs').glob('*.json')}
    for r in found.values(): r['cost'] = {k: r['cost'][k] for k in ('parameters', 'flops')}
    return found


def table(out):
    "The table, cell by cell."
    lines = (out/'quick'/'quick.md').read_text('utf-8').splitlines()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def timeless(out):
    "What records and table say, but for times."
    return records(out), [row[:5] + row[6:] for row in table(out)]   # not the seconds


def wait_for(condition, process):
    "Wait until something is so, as long as the process runs; returns it."
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(.05)
    return found


def workers(process):
    "The processes at work for a runner; one that ends while we look isn't."
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if 'forkserver' in ' '.join(child.cmdline()): found += child.children()
    return found


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Five runs, with nobody in the way."
    out = tmp_path_factory.mktemp('undisturbed')
    run(out, '--jobs', '2')
    return out


def test_same_bits(undisturbed, tmp_path, monkeypatch):
    "However many at a time, in whatever process, whatever threads there are: the same records and weights."
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    only = 'contender!=gcnn-c8,contender!=stcnn,regime=upright'
    run(tmp_path/'command', '--jobs', '1', '--only', only)
    same_as(undisturbed, tmp_path/'command', 3)
    runs, threads = select(GRIDS['quick'].runs(digits=200, epochs=1, test=100), only), torch.get_num_threads()
    torch.set_num_threads(2)
    run_grid(runs, tmp_path/'inline'/'quick', 'cpu', progress=False)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    same_as(undisturbed, tmp_path/'inline', 3)


def test_other_threads(tmp_path):
    "On two threads it is another run; both are kept, and the table tells them apart."
    for threads in '1', '2', '2':
        run(tmp_path, '--threads', threads, '--dataset', 'digits', '--only', 'contender=cnn,regime=upright')
    found = {id: r['versions']['threads'] for id, r in records(tmp_path).items()}
    assert found == {f'cnn-quick-digits-n200-e1-t100{more}-upright-s0': n for more, n in (('', 1), ('-threads2', 2))}
    variants = [row[0] for row in table(tmp_path)[2:]]
    assert variants == ['digits-n200-e1-t100', 'digits-n200-e1-t100-threads2']


def test_one_by_one(tmp_path):
    "Contenders run one after the other stand in one table, whoever is last."
    for contender in 'gcnn-c4', 'cnn', 'gcnn-c4':
        run(tmp_path, '--dataset', 'digits', '--only', f'contender={contender},regime=upright')
    assert [row[1] for row in table(tmp_path)[2:]] == ['CNN', 'GCNN C4']


def test_killed_five_times(undisturbed, tmp_path):
    "Kill -9 at five random moments, then resume: none lost, none double, all as if nothing had happened."
    moment, kept = random.Random(0), {}
    for _ in range(5):
        process = start(tmp_path)
        wait_for(lambda: workers(process) or process.poll() is not None, process)
        time.sleep(moment.uniform(0, 2))
        orphans = workers(process) if process.poll() is None else []
        process.kill(); process.wait()
        psutil.wait_procs(orphans, timeout=LIMIT)
        assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in orphans)   # nobody works on for a dead runner
        for p in (tmp_path/'quick'/'runs').glob('*.json'): json.loads(p.read_text())
        assert kept.items() <= stamps(tmp_path).items()                                   # what was done stays done
        kept = stamps(tmp_path)
    run(tmp_path)
    assert kept.items() <= stamps(tmp_path).items() and len(stamps(tmp_path)) == 5
    assert timeless(tmp_path) == timeless(undisturbed)


def test_goes_on_within_a_run(tmp_path):
    "A run that ends in its third epoch isn't begun again, and comes to the record and the weights of one that nobody disturbed."
    unit, steps = tuple(select(GRIDS['quick'].runs(digits=1000, epochs=4, test=100), 'contender=cnn,regime=upright')), []

    def lid(done, total):
        steps.append(done)
        if done > total/2 and len(steps) < 100: raise KeyboardInterrupt

    [whole] = run_unit(unit, device='cpu')
    with pytest.raises(KeyboardInterrupt): run_unit(unit, lid, device='cpu', unfinished=tmp_path)
    [left] = tmp_path.iterdir()
    state, before = torch.load(left, weights_only=True), len(steps)
    assert len(state['history']) == 2 and left.name.startswith(unit[0].id)
    steps += [0]*100                                                # from now on the lid stays open
    [resumed] = run_unit(unit, lid, device='cpu', unfinished=tmp_path)
    assert min(steps[before + 100:]) > steps[before - 1]/2          # it went on, and didn't begin
    assert all(resumed.record[k] == whole.record[k] for k in ('weights', 'metrics', 'training'))   # weights: the hash of them
    assert [e['loss'] for e in resumed.epochs] == [e['loss'] for e in whole.epochs]
    assert all(resumed.record['cost'][k] > v > 0 for k, v in state['spent'].items()) and not [*tmp_path.iterdir()]


def test_killed_within_a_run(tmp_path):
    "The command, killed once it has a state to go on from, comes to the same; a state that can't be read is left aside."
    more = ['--digits', '2000', '--epochs', '6', '--only', 'contender=cnn,regime=upright']
    run(tmp_path/'whole', *more)
    for damage in False, True:
        out = tmp_path/str(damage)
        process, states = start(out, *more, start_new_session=True), lambda: [*(out/'quick'/'unfinished').glob('*.pt')]
        wait_for(lambda: states() or process.poll() is not None, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for path in states() if damage else (): path.write_bytes(path.read_bytes()[:100])
        run(out, *more)
        assert records(out) == records(tmp_path/'whole') and not states()


def test_interrupted(tmp_path):
    "Ctrl-C, which a terminal sends to all processes of the command; whoever runs the tests may have told their children to ignore it."
    process = start(tmp_path, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(lambda: stamps(tmp_path), process)
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate(timeout=LIMIT)
    kept = stamps(tmp_path)
    assert process.returncode == 130 and f'{len(kept)} of 5 runs are kept' in messages and 'Traceback' not in messages, messages
    listed = run(tmp_path, '--list')
    assert listed.count('done ') == len(kept) and listed.count('missing ') == 5 - len(kept) and 'one after the other' in listed


def test_two_runners(tmp_path):
    "Two runners share a folder; each run is done by one of them, and both see all in the end."
    pair = [start(tmp_path) for _ in range(2)]
    outputs = [p.communicate(timeout=LIMIT)[0] for p in pair]
    assert [p.returncode for p in pair] == [0, 0] and len(stamps(tmp_path)) == 5
    said = [o[o.index('trained'):].splitlines()[:6] for o in outputs]
    assert said[0] == said[1]                                                             # seconds included: the same records


LONGER = ['--jobs', '2', '--digits', '1000', '--epochs', '2']


def starve(out):
    "One worker is killed, another runs out of memory; why each failed, as the records have it."
    out.mkdir()
    with open(out/'messages', 'w') as messages:
        process = subprocess.Popen(command(out, *LONGER), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=messages)
    said = lambda: (out/'messages').read_text()
    wait_for(lambda: said().count(' 0/32 ') >= 2, process)                                # both have said that they finished an epoch
    pair = workers(process)
    pair[0].kill()
    memory = pair[1].memory_info().vms - 2**26                                            # what is there stays; the next large tensor is too much
    resource.prlimit(pair[1].pid, resource.RLIMIT_AS, (memory, memory))
    process.wait(timeout=LIMIT)
    failures = {p.stem: json.loads(p.read_text())['reason'] for p in (out/'quick'/'failed').glob('*.json')}
    assert process.returncode == 1 and len(failures) == 2 and len(stamps(out)) == 3, (said(), failures)
    assert any('SIGKILL' in reason for reason in failures.values()) and all(f'failed: {id}' in said() for id in failures)
    return failures


def test_dead_worker_and_memory(tmp_path):
    "Both are recorded with the reason, and the others go on. Without memory, C code may crash, or now and then call it another error: one of three says it."
    for out in tmp_path/'first', tmp_path/'second', tmp_path/'third':
        failures = starve(out)
        if any('memory' in reason.lower() and 'SIGKILL' not in reason for reason in failures.values()): break
    else: pytest.fail(str(failures))
    run(out, *LONGER)                                                                     # the next runner tries again
    assert len(stamps(out)) == 5 and not any((out/'quick'/'failed').iterdir())


def test_full_disk(tmp_path):
    "The system refuses to write; the runner waits until it doesn't, and nothing is lost."
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    process = start(tmp_path, '--only', 'contender=cnn', preexec_fn=limit)
    for line in process.stderr:
        if 'kept in memory' in line: break
    assert process.poll() is None and not stamps(tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
    _, messages = process.communicate(timeout=LIMIT)
    assert process.returncode == 0 and len(stamps(tmp_path)) == 2, messages


@pytest.fixture
def cluster(monkeypatch):
    "A Ray cluster of two processors that runs already, and is named by RAY_ADDRESS."
    pytest.importorskip('ray', reason='the extra ray is not installed')
    monkeypatch.setenv('RAY_AUTH_MODE', 'disabled')   # newer versions ask who is there
    ray = [str(Path(sys.executable).with_name('ray'))]
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    subprocess.run([*ray, 'start', '--head', '--num-cpus', '2', '--port', str(port), '--node-ip-address', '127.0.0.1', '--disable-usage-stats'], check=True, capture_output=True)
    monkeypatch.setenv('RAY_ADDRESS', f'127.0.0.1:{port}')
    yield
    subprocess.run([*ray, 'stop', '--force'], check=True, capture_output=True)


def same_as(undisturbed, out, n):
    ours, theirs = records(out), records(undisturbed)
    assert len(ours) == n and all(theirs[id] == record for id, record in ours.items())


def test_ray(undisturbed, tmp_path):
    "A cluster that the command starts gives the same records as one machine does."
    pytest.importorskip('ray', reason='the extra ray is not installed')
    run(tmp_path, '--engine', 'ray', '--only', 'model=gcnn,regime=upright')
    same_as(undisturbed, tmp_path, 2)


@pytest.mark.slow
def test_ray_cluster(undisturbed, tmp_path, cluster):
    "And so does one that is there already."
    run(tmp_path, '--engine', 'ray', '--only', 'contender=cnn,regime=upright')
    same_as(undisturbed, tmp_path, 1)


@pytest.mark.slow
def test_torchrun_refuses(tmp_path):
    "Batch norm over half a batch is another network, so it isn't done silently."
    done = subprocess.run(command(tmp_path, '--only', 'contender=cnn', head=[sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '-m', 'gcnn_stn.study']),
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and 'without batch statistics' in done.stderr and not stamps(tmp_path), done.stderr


@pytest.mark.slow
def test_stacked(undisturbed, tmp_path):
    "Two seeds trained together give what each gives alone, up to rounding."
    run(tmp_path, '--only', 'contender=cnn,regime=upright', '--seeds', '2', '--stack', '2')
    record = json.loads((tmp_path/'quick'/'runs'/'cnn-quick-n200-e1-t100-upright-s0.json').read_text())
    alone = json.loads((undisturbed/'quick'/'runs'/'cnn-quick-n200-e1-t100-upright-s0.json').read_text())
    assert record['speed']['stacked'] == 2 and record['hashes'] == alone['hashes']
    assert abs(record['metrics']['upright'] - alone['metrics']['upright']) < .05 and len(stamps(tmp_path)) == 2


def sleep_long(unit, report): time.sleep(LIMIT)


def test_interrupted_at_start(monkeypatch):
    "Ctrl-C in the moment in which a process is started ends that process, too."
    monkeypatch.setattr(multiprocessing.context.ForkServerProcess, 'start', start_and_interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt): list(processes()(iter([('a',)]), sleep_long, print))
        assert not multiprocessing.active_children()
    finally:
        signal.signal(signal.SIGINT, before)
        for child in multiprocessing.active_children(): child.kill()


def start_and_interrupt(process):
    multiprocessing.process.BaseProcess.start(process)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='threads have no names here')
def test_torchrun_leaves_nothing(tmp_path):
    "A thread of the group that outlived it could abort the process, when Python has ended."
    script = tmp_path/'end.py'
    script.write_text(THREADS)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('gloo: True False') == 2, done.stdout + done.stderr


THREADS = """
from pathlib import Path
from gcnn_stn.study.train import distributed

def gloo(): return any('gloo' in p.read_text() for p in Path('/proc/self/task').glob('*/comm'))

with distributed():
    import torch._dynamo   # as optimizers do
    before = gloo()
print('gloo:', before, gloo())
"""


def test_torchrun(tmp_path):
    "Two processes train one network, and leave one record, with the loss that one process finds."
    only = ['--only', 'contender=stcnn-published,regime=upright']
    run(tmp_path/'one', *only)
    run(tmp_path/'two', *only, head=[sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '-m', 'gcnn_stn.study'])
    losses = [float(next((tmp_path/n/'quick'/'runs').glob('*.csv')).read_text().splitlines()[1].split(',')[1]) for n in ('one', 'two')]
    assert abs(losses[0] - losses[1]) < 1e-4 and losses[0] > 0


def test_other_data(tmp_path):
    "scikit-learn's digits, enlarged."
    run(tmp_path, '--dataset', 'digits', '--only', 'contender=gcnn-c4,regime=rotated', '--digits', '50', '--test', '20')
    record = json.loads(next((tmp_path/'quick'/'runs').glob('*.json')).read_text())
    assert record['dataset'] == 'digits' and 0 <= record['metrics']['rotated'] <= 1 and record['config']['mean'] > .2


@pytest.mark.parametrize('contender', ['gcnn-c8', 'stcnn', 'cnn'])
def test_coloured(contender):
    "Three channels, another size, oblong."
    data = load_dataset('FakeData', image_size=(3, 40, 36))
    history = fit(build(contender, 3, data.classes), tuple(t[:100] for t in data.train), config=TrainConfig(epochs=1, rotate=True, mean=data.mean, std=data.std), progress=False)
    assert history[0]['loss'] > 0 and len(data.mean) == 3


@pytest.mark.parametrize('contender', OPPONENTS)
def test_opponents(tmp_path, contender):
    "Each trains, leaves a record that is believed, and says whether it turns if it says angles."
    runs = [run for grid in ('duel', 'shifted') for run in GRIDS[grid].runs(seeds=1, digits=130, epochs=1, test=80)]
    runs = select(runs, f'contender={contender}')[:1]
    [result] = [r for _, found in inline(iter([tuple(runs)]), run_unit, print) for r in found]
    record = json.loads(json.dumps(result.record))
    assert record_fault(record) is None and ('pose' in record['metrics']) == hasattr(build(contender), 'angle')
    if 'pose' in record['metrics']: assert record_fault(record | dict(metrics=record['metrics'] | dict(pose={'slope': 9}))) is not None


def test_opponents_are_not_stacked(tmp_path):
    "Those that learn in their own way are trained one by one, whatever was asked."
    only = ['--grid', 'duel', '--seeds', '2', '--stack', '2', '--only', 'contender=stcnn-coached,regime=upright']
    run(tmp_path, *only)
    found = [json.loads(p.read_text()) for p in (tmp_path/'runs').glob('*.json')]
    assert [record['speed']['stacked'] for record in found] == [1, 1]


def test_bad_arguments(tmp_path):
    "Complaints of the command itself; the chapter has the others."
    done = subprocess.run(command(tmp_path, '--jobs', '0'), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'jobs must be' in done.stderr and 'Traceback' not in done.stderr, done.stderr


SCRIPT = """
import multiprocessing, sys
from gcnn_stn.study.engine import inline, processes
from gcnn_stn.study.record import record_path
from gcnn_stn.study.runner import run_missing
from chores import Chore, do

{before}
def study(out={out!r}):
    units = [(Chore(name),) for name in 'abc']
    run_missing(units, do, out, lambda run: not record_path(out, run.id).exists(), engine=processes(2), progress=False)

{call}
"""
CHORES = """
from dataclasses import dataclass
from gcnn_stn.study.record import Result

@dataclass(frozen=True)
class Chore: id:str
def do(unit, report): return [Result(dict(id=chore.id)) for chore in unit]
"""
GUARDED = "if __name__ == '__main__': "
SPAWN = "multiprocessing.get_all_start_methods = lambda: ['spawn']"
FILE, STDIN, TEXT, INTERACTIVE = ('script.py',), ('-',), ('-c',), ('-i', '-q')
SCRIPTS = {   # how it is started, what comes before, how the study is called → whether it is done; or what is said
    'guarded':          (FILE, '', GUARDED + 'study()', True),
    'guarded, spawn':   (FILE, SPAWN, GUARDED + 'study()', True),
    'in a process':     (FILE, '', GUARDED + 'p = multiprocessing.Process(target=study); p.start(); p.join(); sys.exit(p.exitcode)', True),
    'a text':           (TEXT, '', 'study()', True),
    'a text, spawn':    (TEXT, SPAWN, 'study()', True),
    'typed in':         (INTERACTIVE, '', 'study()', True),
    'unguarded':        (FILE, '', 'study()', "__name__ == '__main__'"),
    'unguarded, spawn': (FILE, SPAWN, 'study()', "__name__ == '__main__'"),
    'standard input':   (STDIN, '', GUARDED + 'study()', "__name__ == '__main__'"),
    'unguarded there':  (STDIN, '', 'study()', "__name__ == '__main__'"),
    'in a pool':        (FILE, '', GUARDED + 'multiprocessing.Pool(1).apply(study)', 'worker of a pool')}


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts(name, tmp_path):
    "Wherever a script calls for processes, it gets them or is told what to do; it never waits, and never multiplies."
    how, before, call, wanted = SCRIPTS[name]
    script = SCRIPT.format(before=before, call=call, out=str(tmp_path/'out'))
    for file, text in {'chores.py': CHORES, 'script.py': script}.items(): (tmp_path/file).write_text(text)
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = (*how, script) if how == TEXT else how
    done = subprocess.run([sys.executable, *words], input='' if how in (FILE, TEXT) else script, cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=LIMIT)
    kept = sorted(p.stem for p in (tmp_path/'out'/'runs').glob('*.json'))
    if wanted is True: assert kept == ['a', 'b', 'c'], done.stderr
    else: assert not kept and done.returncode and 'ValueError' in done.stderr and wanted in done.stderr, done.stderr
