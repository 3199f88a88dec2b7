"`make test` says when it began and when the environment was ready; the times are printed beside pytest's own summary."
import os, time


def pytest_terminal_summary(terminalreporter):
    if 'TEST_BEGAN' not in os.environ: return
    began, ready = float(os.environ['TEST_BEGAN']), float(os.environ['TEST_READY'])
    terminalreporter.write_line(f'set-up {ready - began:.0f} s, tests {time.time() - ready:.0f} s')
