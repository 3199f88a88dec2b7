"What a chapter can't hold: a real compiler, and a fresh interpreter's import time."
import shutil, statistics, subprocess, sys, time

import pytest, torch

from gcnn_stn.group import CyclicGroup
from gcnn_stn.layer import check_module
from gcnn_stn.model import GCNN, STCNN


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@pytest.mark.parametrize('model', [GCNN(CyclicGroup(8), (2, 3, 4)), STCNN((2, 3, 4))], ids=['GCNN', 'STCNN'])
def test_inductor(model): check_module(model, torch.randn(4, 1, 30, 30), backend='inductor')


def seconds(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - start


def test_import_time(capsys):
    "Reported, not judged: machines differ and are busy."
    ratios = [seconds('import gcnn_stn.layer')/seconds('import torch') for _ in range(5)]
    with capsys.disabled(): print(f'\nimport gcnn_stn.layer takes {statistics.median(ratios):.2f} × import torch')
