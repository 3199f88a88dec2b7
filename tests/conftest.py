"`make test` says when it began and when the environment was ready; the times are printed beside pytest's own summary."
import os, sys, time

import pytest


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="run the slow tests, too")
    parser.addoption('--site', help="check the pages in this folder, such as _docs by Quarto, instead of a preview")
def pytest_configure(config): config.addinivalue_line('markers', 'slow: runs with --slow only')


LONGEST = 'test_site.py', 'test_study.py', 'test_fold.py'   # files that take longest begin, so that nobody waits for them at the end


def pytest_collection_modifyitems(config, items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))   # files stay together, for the others keep their order
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'): item.add_marker(pytest.mark.skip(reason="slow; to run it: make test ARGS=--slow"))


def pytest_terminal_summary(terminalreporter):
    if 'TEST_BEGAN' not in os.environ: return
    began, ready = float(os.environ['TEST_BEGAN']), float(os.environ['TEST_READY'])
    terminalreporter.write_line(f'set-up {ready - began:.0f} s, tests {time.time() - ready:.0f} s')


@pytest.fixture(autouse=True)
def fresh_compiler():
    "What one test compiled, or gave up to compile, is forgotten before the next: PyTorch keeps it by function, such as `nn.Sequential.forward`."
    yield
    if 'torch._dynamo' in sys.modules: sys.modules['torch'].compiler.reset()
