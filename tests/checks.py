"What can be wrong with the site, as lists of complaints. A clean book has none."
import json, posixpath, re, shutil, subprocess
from collections import Counter
from functools import cache
from urllib.parse import unquote

import yaml
from jsonschema import Draft202012Validator
from lxml import html

from book import HERE, chapters, name_of, split_cell
from preview import PARTS, build, entries, relative

SCHEMA = yaml.safe_load((HERE/'quarto.schema.yml').read_text())
NODE_MODULES = PARTS/'node_modules'
AXE = NODE_MODULES/'axe-core'/'axe.min.js'


# the sources

class Strict(yaml.SafeLoader):
    "YAML in which no key may come twice."
    def construct_mapping(self, node, deep=False):
        twice = [k for k, n in Counter(k.value for k, _ in node.value).items() if n > 1]
        if twice: raise yaml.YAMLError(f'the key {twice[0]} comes twice')
        return super().construct_mapping(node, deep)


def read_yaml(text): return yaml.load(text, Strict)


def against(part, value, where):
    "What the allow-list has against a value."
    schema = {**SCHEMA[part], '$defs': SCHEMA['$defs']}
    return [f"{where}: {'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in Draft202012Validator(schema).iter_errors(value)]


def check_config(project):
    "`_quarto.yml`: only keys and values that are known to work, the pages that there are, files that exist."
    try: config = read_yaml((project/'_quarto.yml').read_text())
    except yaml.YAMLError as e: return [f'_quarto.yml: {e}']
    complaints = against('config', config, '_quarto.yml')
    if read_yaml((project/'nbs'/'_quarto.yml').read_text()) != {'metadata-files': ['../_quarto.yml']}: complaints.append('nbs/_quarto.yml must only point to ../_quarto.yml')
    listed, there = Counter(entries(config['website']['sidebar']['contents'])), {name_of(p, project/'nbs') for p in chapters(project/'nbs')}
    complaints += [f'sidebar: {name} is listed {n} times' for name, n in listed.items() if n > 1]
    complaints += [f'sidebar: {name} {fault}' for names, fault in ((set(listed) - there, 'has no notebook'), (there - set(listed), 'is not listed')) for name in sorted(names)]
    html = config['format']['html']
    site, styles = config['website'], (f for theme in html['theme'].values() for f in theme if '.' in f)
    cards = [site[kind]['image'].lstrip('/') for kind in ('open-graph', 'twitter-card')]
    files = [config['bibliography'], html['include-after-body'], site['favicon'], *cards, *styles]
    return complaints + [f'_quarto.yml: nbs/{f} does not exist' for f in files if not (project/'nbs'/f).exists()]


WIDEST = 92   # characters of a line of code that fit the column


def check_cells(project):
    "Directives and options of all cells: known, well-formed, a picture never without a description, lines that fit the page."
    complaints = []
    for notebook in chapters(project/'nbs'):
        for number, cell in enumerate(json.loads(notebook.read_text())['cells']):
            if cell['cell_type'] != 'code': continue
            where = f"{name_of(notebook, project/'nbs')}, cell {number}"
            try: directives, options, code = split_cell(''.join(cell['source']), read_yaml)
            except yaml.YAMLError as e: complaints.append(f"{where}: {str(e).splitlines()[0]}"); continue
            complaints += against('options', options, where) + against('directives', sorted(directives), where)
            if 'hide' not in directives: complaints += [f'{where}: {len(line)} characters in a line: {line.strip()[:60]}' for line in code.split('\n') if len(line) > WIDEST]
            complaints += [f"{where}: it failed: {o['ename']}" for o in cell['outputs'] if o['output_type'] == 'error']
            drawn = any('image/png' in o.get('data', {}) for o in cell['outputs'])
            if drawn and 'hide' not in directives and 'fig-alt' not in options: complaints.append(f'{where}: a picture without fig-alt')
    return complaints


# the pages

@cache
def tree(path, _changed): return html.parse(str(path)).getroot()
def parse(path): return tree(path, path.stat().st_mtime_ns)
def ids(path): return parse(path).xpath('//body//@id')      # Quarto names style sheets of the head twice
def pages(site): return sorted(p for p in site.rglob('*.html') if 'site_libs' not in p.parts)   # its own scripts lie there


def check_ids(site):
    return [f'{name_of(path, site)}: the id {i} is used {n} times' for path in pages(site) for i, n in Counter(ids(path)).items() if n > 1]


def broken(site, project, config, path, target):
    "What is wrong with a link of a page, if anything."
    if target.startswith(repo := config['website']['repo-url']): return broken_source(project, target[len(repo):])
    if re.match(r'https://|mailto:|data:', target): return None
    if re.match(r'\w+:|//|/', target): return 'is neither relative nor https'
    file, _, anchor = unquote(target).partition('#')
    there = path.parent/file if file else path
    if not there.exists(): return 'leads nowhere'
    if anchor and there.suffix == '.html' and anchor not in ids(there): return 'has no such anchor'


def broken_source(project, rest):
    "Links into the repository are judged by the files that are here."
    kind, _, place = rest.strip('/').partition('/')
    if kind not in ('blob', 'edit', 'tree'): return None
    file, _, line = place.partition('/')[2].partition('#L')
    if not (project/file).exists(): return 'points to a file that is not in the repository'
    if line and int(line) > len((project/file).read_text().splitlines()): return 'points past the end of the file'


QUARTOS = re.compile(r'https://cdn\.jsdelivr\.net/npm/mathjax@|https://cdnjs\.cloudflare\.com/polyfill/')   # what Quarto asks for where there are formulas


def is_foreign(tag, target):
    "Does the page fetch it from another server, other than MathJax?"
    return tag.tag != 'a' and re.match(r'(\w+:)?//', target) and not QUARTOS.match(target)


def inside(site, config, path, target):
    "A link to the site's own address, as one from page to page."
    own = config['website']['site-url'].rstrip('/') + '/'
    return relative(target.removeprefix(own), name_of(path, site)) if target.startswith(own) else target


def check_links(site, project, config):
    "Every link and every file that a page asks for; nothing comes from elsewhere, but for MathJax."
    complaints = []
    for path in pages(site):
        for tag in parse(path).xpath('//*[@href or @src]'):
            target = tag.get('href') or tag.get('src') or ''
            if tag.tag == 'a': target = inside(site, config, path, target)
            fault = 'is fetched from elsewhere' if is_foreign(tag, target) else broken(site, project, config, path, target)
            if fault: complaints.append(f'{name_of(path, site)}: {target[:200]} {fault}')
        complaints += [f"{name_of(path, site)}: an image without a description: {tag.get('src', '')[:60]}" for tag in parse(path).xpath('//img[not(normalize-space(@alt))]')]
    return complaints


def check_marks(site):
    "Markup that came through as text."
    leftover = re.compile(r':::|\{\{<|\{#(fig|tbl|eq|sec)-|(?<![\w.])@(fig|tbl|eq|sec)-|\]\(')
    texts = ((path, text) for path in pages(site) for text in parse(path).xpath('//main//text()[not(ancestor::code or ancestor::pre or ancestor::script or ancestor::style)]'))
    links = ((path, code.text_content()) for path in pages(site) for code in parse(path).xpath('//main//pre'))   # nbdev makes them of backquoted names, also in a signature
    return [f'{name_of(path, site)}: raw markup: {text.strip()[:80]}' for path, text in texts if leftover.search(text)] + \
        [f'{name_of(path, site)}: a link in code: {found[0]}' for path, text in links if (found := re.search(r'\[`[^`\n]+`\]\(http[^)\n]*\)', text))]


def check_reach(site, config, clicks=3):
    "From the first page to every other one, by the links of the text alone: how many clicks?"
    away, front = {'index.html': 0}, ['index.html']
    for distance in range(1, clicks + 1):
        links = [posixpath.normpath(posixpath.join(posixpath.dirname(name), inside(site, config, site/name, a).partition('#')[0]))
                 for name in front for a in parse(site/name).xpath('//main//a[not(ancestor::nav)]/@href')]
        front = sorted({a for a in links if (site/a).is_file() and a.endswith('.html')} - set(away))
        away |= dict.fromkeys(front, distance)
    return [f'{name}: more than {clicks} clicks from the first page' for path in pages(site) if (name := name_of(path, site)) not in away]


def formulas(site):
    "All formulas of the pages, as they are written."
    for path in pages(site):
        for span in parse(path).xpath('//span[contains(concat(" ", @class, " "), " math ")]'):
            yield dict(page=name_of(path, site), tex=re.sub(r'^\\[(\[]|\\[)\]]$', '', span.text_content().strip()), display='display' in span.get('class'))


def check_math(site):
    "Every formula through KaTeX and MathJax."
    done = subprocess.run(['node', PARTS/'math.mjs'], input=json.dumps(list(formulas(site))), capture_output=True, text=True)
    return (done.stdout + done.stderr * bool(done.returncode)).splitlines()


NO_NODE = None if shutil.which('node') and AXE.exists() else 'needs Node and its packages: npm install --prefix tests/preview'


# the pages in a browser

def check_access(browser, path):
    "axe-core's verdict on the page that is open."
    browser.js(AXE.read_text())
    found = browser.js("axe.run(document, {preload: false, resultTypes: ['violations']}).then(r => r.violations.map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 150)]))")
    return [f'{path.name}: {rule} ({n} times): {html}' for rule, n, html in found]


CULPRIT = '''(() => {
  const free = e => { for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible') return false; return true; };
  const found = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && free(e));
  return found.length ? found[found.length - 1].outerHTML.slice(0, 120) : '?'; })()'''
def check_width(browser, path):
    "Nothing makes the open page scroll sideways."
    excess = browser.js('document.scrollingElement.scrollWidth - innerWidth')
    return [f'{path.name}: {excess} px too wide: {browser.js(CULPRIT)}']*(excess > 0)


OVERFULL = '''[...document.querySelectorAll('main .cell pre, main .cell table, main .cell-output, main table')]
  .filter(e => e.checkVisibility() && (e.scrollWidth > e.clientWidth + 1 || e.matches('.cards') && innerWidth > 1000))
  .map(e => [e.scrollWidth - e.clientWidth, e.textContent.trim().slice(0, 60)])'''
def check_overflow(browser, path):
    "No code, output or table is wider than its box; only on a phone may a table become a list of cards."
    return [f'{path.name}: {excess} px out of its box: {text}' for excess, text in browser.js(OVERFULL)]


PICTURE = '''Math.min(...[...document.querySelectorAll('main img, main svg:not(mjx-container svg), main canvas')]
  .filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().top + scrollY), 1e9)'''
FIRST_SCREEN = 1200
def check_picture(browser, path):
    "What a page is about can be seen in its first screen."
    top = browser.js(PICTURE)
    return [f'{path.name}: the first picture comes at {top:.0f} px']*(top > FIRST_SCREEN)


FOCUSABLE = 'a[href], button, input, select, textarea, summary, [tabindex="0"]'
WALK = '''(() => { const e = document.activeElement, s = getComputedStyle(e); return e === document.body ? null : {
    number: [...document.querySelectorAll(%r)].indexOf(e), html: e.outerHTML.slice(0, 80), ring: s.outlineStyle !== 'none' || s.boxShadow !== 'none'}; })()''' % FOCUSABLE
def check_keyboard(browser, path, steps=25):
    "The first steps of the Tab key: each moves on, in the order of the page, and can be seen; the first one can skip the menu."
    browser.js('document.activeElement.blur(), scrollTo(0, 0)')
    complaints, seen = [], []
    for _ in range(steps):
        browser.press('Tab')
        here = browser.js(WALK)
        if here is None or here['number'] == next(iter(seen), None): break                # the end of the page, or once around
        if not here['ring']: complaints.append(f"{path.name}: no ring around the focus: {here['html']}")
        if seen and 0 <= here['number'] <= seen[-1]: complaints.append(f"{path.name}: the focus doesn't move on: {here['html']}")
        if not seen and 'class="skip"' not in here['html']: complaints.append(f'{path.name}: the first stop must lead past the menu')
        seen.append(here['number'])
    return complaints + [f'{path.name}: the keyboard reaches nothing']*(not seen)


def check_rendered(browser, path, width, dark=False):
    "One page as a reader meets it; at the end it is looked at in the other light, too."
    browser.open(path, width=width, dark=dark)
    browser.js('window.MathJax?.startup?.promise')
    complaints = check_width(browser, path) + check_overflow(browser, path) + [f'{path.name}: {c}' for c in browser.complaints()]
    if width >= 1000: complaints += check_picture(browser, path)
    complaints += check_keyboard(browser, path)
    if not AXE.exists(): return complaints
    complaints += check_access(browser, path)
    browser.light(not dark)
    return complaints + check_access(browser, path)


def check_all(project, processed, site, browser=None):
    "All of it: the sources of a project, the pages made of its processed notebooks in the folder `site`, and these in a browser."
    complaints = check_config(project) + check_cells(project)
    try: config = read_yaml((project/'_quarto.yml').read_text())
    except yaml.YAMLError: return complaints
    complaints += build(processed, config, site)
    complaints += check_ids(site) + check_links(site, project, config) + check_marks(site) + check_reach(site, config)
    if not NO_NODE: complaints += check_math(site)
    if browser: complaints += [c for path in pages(site) for width, dark in ((1280, False), (390, True)) for c in check_rendered(browser, path, width, dark)]
    return complaints
