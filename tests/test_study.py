"The study survives being stopped at any moment."
import json, signal, subprocess, sys, time

import pytest

from book import ROOT

COMMAND = [sys.executable, '-m', 'gcnn_stn.study', '--grid', 'quick', '--digits', '200', '--epochs', '1', '--device', 'cpu', '--out']


def start(out): return subprocess.Popen([*COMMAND, out], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
def records(out): return {p.name: p.stat().st_mtime_ns for p in (out/'quick'/'runs').glob('*.json')}


def wait_for(out, n, process, limit=300):
    "Wait until `n` records are there."
    end = time.time() + limit
    while len(records(out)) < n:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < end, 'no record came'
        time.sleep(.1)


def test_killed_then_interrupted_then_resumed(tmp_path):
    first = start(tmp_path)
    wait_for(tmp_path, 1, first)
    time.sleep(2)                                               # well into the second run
    first.kill(); first.wait()
    kept = records(tmp_path)
    for name in kept: json.loads((tmp_path/'quick'/'runs'/name).read_text())

    second = start(tmp_path)
    wait_for(tmp_path, len(kept) + 1, second)
    time.sleep(1)
    second.send_signal(signal.SIGINT)
    _, messages = second.communicate(timeout=60)
    after = records(tmp_path)
    assert second.returncode == 130 and f'{len(after)} of 10 runs are kept' in messages, messages
    assert kept.items() <= after.items()                        # what was done was not done again

    listed = subprocess.run([*COMMAND, tmp_path, '--list'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed.count('done') == len(after) and listed.count('missing') == 10 - len(after)


@pytest.mark.parametrize('arguments, complaint', [
    (['--out', '/proc/nowhere'], 'folder that can be written'), (['--epochs', '0'], 'epochs must be'),
    (['--grid', 'large'], 'invalid choice'), (['--seeds', '0'], 'seeds must be'), (['--device', 'abacus'], 'abacus')])
def test_bad_arguments(arguments, complaint, tmp_path):
    done = subprocess.run([*COMMAND, tmp_path, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr and 'Traceback' not in done.stderr, done.stderr
