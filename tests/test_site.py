"Every page of the site is sound: what is written, what it links to, its mathematics, and what a reader meets in a browser."
import base64, filecmp, json
from pathlib import Path

import pytest, yaml

import checks
from book import ROOT, copy_project, readme
from browser import CHROMIUM, browser, needs_chromium
from preview import build, process

NEEDS_NODE = pytest.mark.skipif(bool(checks.NO_NODE), reason=str(checks.NO_NODE))
CONFIG = yaml.safe_load((ROOT/'_quarto.yml').read_text())
PARTS = ['_quarto.yml', 'references.bib', 'theme.scss', 'after_body.html', 'favicon.svg', 'card.png']


@pytest.fixture(scope='module')
def site(tmp_path_factory, request):
    "The whole book as pages: those that `--site` names, or a preview made now."
    if folder := request.config.getoption('--site'): return Path(folder).resolve()
    project = copy_project(tmp_path_factory.mktemp('book'), 'settings.ini', 'gcnn_stn', 'nbs')
    try: process(project)
    except ValueError as e: pytest.fail(str(e)[-1500:], pytrace=False)   # nbdev names the notebook and the cell
    assert not build(project/'_proc', CONFIG, project/'site')
    return project/'site'


def test_config(): assert not checks.check_config(ROOT)
def test_cells(): assert not checks.check_cells(ROOT)
def test_ids(site): assert not checks.check_ids(site)
def test_links(site): assert not checks.check_links(site, ROOT, CONFIG)
def test_marks(site): assert not checks.check_marks(site)
def test_reach(site): assert not checks.check_reach(site, CONFIG)
@NEEDS_NODE
def test_math(site): assert not checks.check_math(site)


@needs_chromium
@NEEDS_NODE   # without its packages the preview has no theme
@pytest.mark.parametrize('width, dark', [(1280, False), (390, True)], ids=['desk by day', 'phone by night'])
def test_reader(site, browser, width, dark):
    assert len(pages := checks.pages(site)) > 30
    assert not [c for page in pages for c in checks.check_rendered(browser, page, width, dark)]


def test_readme(tmp_path):
    readme(target=tmp_path)
    made = [p.relative_to(tmp_path) for p in tmp_path.rglob('*') if p.is_file()]
    assert not [str(p) for p in made if not ((ROOT/p).exists() and filecmp.cmp(tmp_path/p, ROOT/p, shallow=False))], 'run `make export`'


def test_card():
    assert filecmp.cmp(ROOT/'results'/'figures'/'card.png', ROOT/'nbs'/'card.png', shallow=False), 'run `gcnn_stn_figures card`, and copy it to nbs/'


# Every check can fail: a book of two pages, and one fault at a time.

def picture():
    return base64.b64encode((ROOT/'nbs'/'card.png').read_bytes()).decode()


TEXT = """## A section {#sec-one}

Words [@cohen2016group], a link to [the first page](../index.ipynb), one to [a heading](#sec-one), @sec-one, @fig-card and @eq-one: $x^2$.

$$ \\\\int f(x)\\\\,dx $$ {#eq-one}

::: {.callout-note}
A note.
:::

| what | how much |
|---|---|
| a | 1 |
"""
CODE = """#| label: fig-card
#| fig-cap: "A caption."
#| fig-alt: "A description."
show()"""


def cell(source, kind='code', **more): return dict(cell_type=kind, metadata={}, source=source, **(dict(outputs=[], execution_count=None) if kind == 'code' else {}) | more)
def front(title): return cell(f'---\ndescription: About it\ntitle: {title}\n---\n', 'raw')


@pytest.fixture
def mini(tmp_path):
    "A small book without fault: what to change is in `mini.files`."
    (tmp_path/'nbs'/'part').mkdir(parents=True)
    copy_project(tmp_path/'nbs', *PARTS, root=ROOT/'nbs')
    config = {**CONFIG, 'website': {**CONFIG['website'], 'sidebar': dict(style='docked', contents=['index.ipynb', dict(section='All', contents=['part/thing.ipynb'])])}}
    image = dict(output_type='display_data', metadata={}, data={'image/png': picture(), 'text/plain': '<Figure>'})
    (tmp_path/'_quarto.yml').write_text(yaml.safe_dump(config, sort_keys=False))
    for name, cells in {'index': [front('Welcome'), cell('![The card](card.png)\n\n## Where to\n\nTo [the thing](part/thing.ipynb#sec-one).', 'markdown')],
                        'part/thing': [front('A thing'), cell(TEXT.replace('\\\\', '\\'), 'markdown'), cell(CODE, outputs=[image])]}.items():
        (tmp_path/'nbs'/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5), indent=1))
    return tmp_path


@pytest.fixture(scope='module')
def reader(tmp_path_factory, request): return request.getfixturevalue('browser') if CHROMIUM and not checks.NO_NODE else None


def complaints(mini, reader): return checks.check_all(mini, mini/'nbs', mini/'site', reader)
def test_without_fault(mini, reader): assert not complaints(mini, reader)


def change(path, old, new):
    def edit(mini):
        text = (mini/path).read_text()
        assert old in text, old
        (mini/path).write_text(text.replace(old, new, 1))
    return edit


def config(old, new): return change('_quarto.yml', old, new)
def raw(old, new): return change('nbs/part/thing.ipynb', old, new)
def page(old, new): return change('nbs/part/thing.ipynb', *(json.dumps(s)[1:-1] for s in (old, new)))
def write(text): return page('Words', text + '\n\nWords')


FAULTS = {
    'an unknown key': (config('toc: true', 'tocc: true'), 'tocc'),
    'an unknown value': (config('flatly', 'flattly'), 'flattly'),
    'a key twice': (config('lang: en', 'lang: en\nlang: en'), 'comes twice'),
    'a page that is not there': (config('- index.ipynb', '- index.ipynb\n    - nothing.ipynb'), 'nothing.ipynb has no notebook'),
    'a page not in the sidebar': (config('      - part/thing.ipynb', '      - index.ipynb'), 'part/thing.ipynb is not listed'),
    'a missing icon': (lambda mini: (mini/'nbs'/'favicon.svg').unlink(), 'favicon.svg'),
    'an unknown option': (page('#| fig-cap', '#| fig-width: 3\n#| fig-cap'), 'fig-width'),
    'an unknown directive': (page('#| label', '#| exprot\n#| label'), 'exprot'),
    'an option that is no YAML': (page('"A caption."', '"A caption.'), 'part/thing.ipynb, cell 2'),
    'a figure without description': (page('#| fig-alt: "A description."\n', ''), 'fig-alt'),
    'a line too long for the page': (page('show()', f"show({'1, '*40})"), 'characters in a line'),
    'a cell that failed': (raw('"output_type": "display_data"', '"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []'), 'it failed: ValueError'),
    'an unknown citation': (page('@cohen2016group', '@nobody1900nothing'), 'nobody1900nothing'),
    'a reference into the void': (page('@fig-card', '@fig-missing'), 'fig-missing is not resolved'),
    'a label twice': (write('$$ y $$ {#eq-one}'), 'eq-one is used twice'),
    'a box never closed': (write('::: {.callout-tip}\nnever closed'), 'unclosed'),
    'an unknown box': (page('callout-note', 'callout-nonsense'), 'callout-nonsense'),
    'a dead link': (page('../index.ipynb', '../nowhere.ipynb'), 'nowhere.html leads nowhere'),
    'a dead anchor': (page('#sec-one)', '#sec-two)'), 'no such anchor'),
    'a missing picture': (write('![A picture](missing.png)'), 'missing.png leads nowhere'),
    'a picture without description': (write('<img src="../favicon.svg">'), 'without a description'),
    'an id twice': (write('<p id="twice">a</p><p id="twice">b</p>'), 'twice is used 2 times'),
    'a script from elsewhere': (write('<script src="https://example.org/x.js"></script>'), 'fetched from elsewhere'),
    'a link to a file that is gone': (write(f'[source]({CONFIG["website"]["repo-url"]}/blob/main/gone.py#L3)'), 'not in the repository'),
    'markup as text': (write('Look {{< video x >}}'), 'raw markup'),
    'a link in code': (write('```python\n# of [`x`](https://example.org)\n```'), 'a link in code'),
    'a page out of reach': (change('nbs/index.ipynb', '[the thing](part/thing.ipynb#sec-one)', 'the thing'), 'more than 3 clicks'),
    'an unknown macro': (page('x^2', r'\undefinedmacro x'), 'undefinedmacro'),
    'a brace too few': (page('x^2', 'x^{2'), 'KaTeX'),
    'Unicode in a formula': (page('x^2', 'é^2'), 'KaTeX'),
    'pale text': (write('<p style="color:#bbb;background:#fff">pale</p>'), 'color-contrast'),
    'a heading too deep': (page('## A section', '##### A section'), 'heading-order'),
    'a link without a name': (write('<a href="../index.html"></a>'), 'link-name'),
    'too wide for a phone': (write('<p style="width:50rem">wide</p>'), 'px too wide'),
    'an order of its own': (write('<a href="../index.html" tabindex="3">first of all</a>'), 'must lead past the menu'),
    'an invisible focus': (write('<style>main a:focus-visible { outline: none }</style>'), 'no ring around the focus'),
    'code out of its box': (write('<div class="cell"><pre style="white-space: pre">' + 'wide '*80 + '</pre></div>'), 'out of its box'),
    'a picture too far below': (write('<div style="height: 90rem"></div>'), 'the first picture comes at'),
    'pale by night': (write('<style>.pale { color: #444 }</style><p class="pale">dark on dark</p>'), 'color-contrast'),
    'an error in a script': (write('<script>nothing.to.see()</script>'), 'nothing is not defined'),
}
RULES = ('color-contrast', 'heading-order', 'link-name')
READER = ('px too wide', 'must lead past the menu', 'no ring around the focus', 'nothing is not defined',
          'out of its box', 'the first picture comes at')


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_seen(name, mini, reader):
    fault, complaint = FAULTS[name]
    if checks.NO_NODE and complaint in (*RULES, 'KaTeX', 'undefinedmacro'): pytest.skip(checks.NO_NODE)
    if not reader and complaint in RULES + READER: pytest.skip(checks.NO_NODE or 'no Chromium')
    fault(mini)
    assert any(complaint in c for c in complaints(mini, reader)), complaints(mini, reader)


# What Quarto adds to each page by itself is no fault.

HEAD = """<link id="quarto-bootstrap" href="site_libs/a.css"><link id="quarto-bootstrap" href="site_libs/a.css">
<script src="https://cdnjs.cloudflare.com/polyfill/v3/polyfill.min.js?features=es6"></script>
<script src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml-full.js"></script>"""
TOGGLE = '<a href="" class="quarto-color-scheme-toggle" title="Toggle dark mode">light</a>'


def test_quartos_own_markup(mini):
    site = mini/'site'
    assert not checks.check_all(mini, mini/'nbs', site)
    (site/'site_libs').mkdir()
    (site/'site_libs'/'a.css').touch()
    (site/'site_libs'/'plugin.html').write_text('<html><body><a href="nowhere">x</a></body></html>')
    index = site/'index.html'
    absolute = CONFIG['website']['site-url'].rstrip('/') + '/part/thing.html'
    text = index.read_text().replace('</head>', f'{HEAD}</head>').replace('<main', f'{TOGGLE}<main', 1)
    index.write_text(text.replace('"part/thing.html', f'"{absolute}'))
    assert absolute in index.read_text()
    assert not checks.check_ids(site) + checks.check_links(site, mini, CONFIG) + checks.check_reach(site, CONFIG)
