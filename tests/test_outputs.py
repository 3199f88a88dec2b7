"Figures and tables on the pages are what the code gives now: notebooks run anew, and each picture is compared with the one that is kept.\n\nAll of them: `make outputs`, or `python tests/test_outputs.py layers/kernel evidence/results`."
import base64, io, json, os, sys

import matplotlib.image as mpimg
import nbformat, numpy as np, pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from book import ROOT, chapters, name_of

NBS = ROOT/'nbs'
SAMPLE = ('foundations/group', 'study/style', 'evidence/results')
TOLERANCE = .01   # mean difference of a picture's grey values, white being 1: fonts and rounding stay below, another curve doesn't


def source(cell): return ''.join(cell['source'])
def timed(cell): return any(word in source(cell) for word in ('seconds', 'times[', 'took', 'time_ratio'))   # what measures time differs each time


def kept(cell):
    "Pictures and tables of a cell: media type → content."
    data = [out['data'] for out in cell.get('outputs', []) if 'data' in out]
    return {(i, kind): ''.join(d[kind]) for i, d in enumerate(data) for kind in ('image/png', 'text/markdown') if kind in d}


def picture(text):
    rgb = mpimg.imread(io.BytesIO(base64.b64decode(text)))[..., :3]
    return rgb.mean(-1) if rgb.ndim == 3 else rgb


def apart(kind, old, new):
    "Whether two outputs of a cell differ."
    if kind != 'image/png': return old.strip() != new.strip()
    a, b = picture(old), picture(new)
    if max(abs(m - n) for m, n in zip(a.shape, b.shape)) > 2: return True   # a label a pixel wider is no matter
    h, w = (min(m, n) for m, n in zip(a.shape, b.shape))
    return np.abs(a[:h, :w] - b[:h, :w]).mean() > TOLERANCE


def compare(old, new):
    "Cells of two runs of a notebook whose pictures or tables differ."
    assert len(old) == len(new)
    for a, b in zip(old, new):
        if a['cell_type'] != 'code' or timed(a): continue
        before, now = kept(a), kept(b)
        if before.keys() != now.keys() or any(apart(key[1], before[key], now[key]) for key in before): yield source(a)


def execute(path):
    "A notebook's cells, run in a fresh kernel."
    nb = nbformat.read(path, 4)
    for cell in nb.cells: cell.pop('outputs', None); cell.update(outputs=[]) if cell.cell_type == 'code' else None
    return NotebookClient(nb, timeout=300, kernel_name='python3', resources=dict(metadata=dict(path=str(path.parent)))).execute().cells


def stale(name): return [*compare(json.loads((NBS/f'{name}.ipynb').read_text())['cells'], execute(NBS/f'{name}.ipynb'))]


@pytest.mark.parametrize('name', SAMPLE)
def test_outputs_are_of_now(name): assert not stale(name), f'run nbs/{name}.ipynb again, and keep its outputs'


def code(text, **data): return dict(cell_type='code', source=text, outputs=[dict(data=data)])


def png(shift=0., width=60):
    image = np.tile(np.linspace(0, 1, width), (40, 1))
    buffer = io.BytesIO(); mpimg.imsave(buffer, np.roll(image, round(shift*width), 1), cmap='gray', vmin=0, vmax=1)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize('new, seen', [
    (dict([('image/png', png())]), False), (dict([('image/png', png(.5))]), True), (dict([('image/png', png(width=70))]), True), ({}, True),
    (dict([('image/png', png()), ('text/markdown', '| 1 |')]), True)])
def test_faults_are_seen(new, seen): assert bool([*compare([code('draw()', **{'image/png': png()})], [code('draw()', **new)])]) == seen


def test_times_may_differ(): assert not [*compare([code('seconds', **{'text/markdown': '1'})], [code('seconds', **{'text/markdown': '2'})])]


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    found = {}
    for name in sys.argv[1:] or [name_of(p, NBS).removesuffix('.ipynb') for p in chapters(NBS)]:
        try: found[name], verdict = stale(name), '{} cells differ'
        except CellExecutionError as e: found[name], verdict = [str(e)], 'it fails'   # the others are still to be looked at
        print(f"{name}: {verdict.format(len(found[name])) if found[name] else 'as kept'}", flush=True)
        for text in found[name]: print('    ' + text.strip().replace('\n', '\n    '))
    sys.exit(any(found.values()))
