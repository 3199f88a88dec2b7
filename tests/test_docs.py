"Every chapter becomes a page without a warning, and the README is what `index` says."
import filecmp, re

import pytest, yaml

from book import ROOT, chapters, copy_project, pandoc, python, readme, to_markdown

NBS = ROOT/'nbs'
CHAPTERS = [p.name for p in chapters(NBS)]


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    "The notebooks as nbdev hands them to Quarto."
    project = copy_project(tmp_path_factory.mktemp('book'), 'settings.ini', 'gcnn_stn', 'nbs')
    try: python('from nbdev.serve import proc_nbs; proc_nbs(n_workers=2)', project)
    except ValueError as e: pytest.fail(str(e)[-1500:], pytrace=False)   # nbdev names the notebook and the cell
    return project/'_proc'


@pytest.mark.parametrize('name', CHAPTERS)
def test_page(name, pages, tmp_path):
    page = pandoc(to_markdown(pages/name, tmp_path/'figures'), 'html')
    links = re.findall(r'href="([\w]+)\.html', page)
    assert set(links) <= {re.sub(r'^\d+[a-z]*_|\.ipynb$', '', c) for c in CHAPTERS}
    assert not re.findall(r'<img(?![^>]*\salt="[^"]+")[^>]*>', page), 'every figure needs a `fig-alt`'


@pytest.mark.parametrize('text, complaint', [
    ('As in [@nobody1900nothing].', 'nobody1900nothing'),
    ('See @fig-missing.', 'fig-missing is not resolved'),
    ('$$x$$ {#eq-x}\n\n$$y$$ {#eq-x}', 'eq-x is used twice'),
    ('::: {.callout-note}\nnever closed', 'unclosed'),
])
def test_fault_is_seen(text, complaint):
    with pytest.raises(ValueError, match=complaint): pandoc(text, 'html')


def entries(contents):
    for entry in contents:
        if isinstance(entry, str): yield entry
        else: yield from entries(entry['contents'])


def test_sidebar():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    assert sorted(entries(site['website']['sidebar']['contents'])) == CHAPTERS
    assert yaml.safe_load((NBS/'_quarto.yml').read_text()) == {'metadata-files': ['../_quarto.yml']}


def test_readme(tmp_path):
    readme(target=tmp_path)
    made = [p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.is_file()]
    assert not [str(p) for p in made if not ((ROOT/p).exists() and filecmp.cmp(tmp_path/p, ROOT/p, shallow=False))], 'run `make export`'
