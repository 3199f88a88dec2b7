"Every chapter opens in Colab: a link below its title, and a cell that does something there alone. `make export` calls it."
import json
from configparser import ConfigParser

from book import ROOT, chapters, name_of

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
REPOSITORY, BRANCH = settings['DEFAULT']['git_url'], settings['DEFAULT']['branch']
NAME = REPOSITORY.rpartition('/')[2]
LINK = f'[Open in Colab]({REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")}/blob/{BRANCH}/nbs/'
INSTALL = f'''#| hide
#| eval: false
# On Colab, and only there: fetch the book, with its records and digits, and install its package.
import sys
if 'google.colab' in sys.modules:
    !test -d /content/{NAME} || git clone --quiet --depth 1 {REPOSITORY} /content/{NAME}
    %pip install --quiet /content/{NAME}
    %cd /content/{NAME}/nbs/{{part}}'''


def cell(name, kind, text, **more): return dict(cell_type=kind, id=f'colab-{name}', metadata={}, source=text.splitlines(keepends=True), **more)
def source(cell): return ''.join(cell['source'])
def ours(cell): return source(cell).startswith((LINK[:LINK.index('http')], INSTALL[:INSTALL.index(',')]))   # of an earlier version, too


def installation(name):
    "The cell that fetches the book, and goes to the folder of the chapter."
    return INSTALL.format(part=name.rpartition('/')[0]).rstrip('/')


def with_colab(cells, name):
    "The cells of a notebook, with link and installation after its title, once."
    link, install = f'{LINK}{name})', installation(name)
    if [source(c) for c in cells[1:3]] == [link, install]: return cells
    title, *rest = (c for c in cells if not ours(c))
    return [title, cell('link', 'markdown', link), cell('install', 'code', install, execution_count=None, outputs=[]), *rest]


def colab(folder=ROOT/'nbs'):
    "Bring all notebooks of a folder up to date; returns those that weren't."
    changed = []
    for path in chapters(folder):
        notebook = json.loads(path.read_text())
        name = name_of(path, folder)
        cells = with_colab(notebook['cells'], name)
        if cells == notebook['cells']: continue
        path.write_text(json.dumps({**notebook, 'cells': cells}, indent=1, ensure_ascii=False, sort_keys=True) + '\n')
        changed.append(name)
    return changed


if __name__ == '__main__': colab()
