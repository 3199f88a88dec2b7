"The site for those who don't have Quarto: nbdev's processed notebooks by pandoc, in a plain page. `make docs` calls it."
import json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from html import escape
from urllib.parse import quote

import yaml

from book import HERE, ROOT, chapters, name_of, pandoc, python, to_markdown

PARTS = HERE/'preview'
SASS = PARTS/'node_modules'/'sass'
MATHJAX = PARTS/'node_modules'/'mathjax'/'es5'/'tex-svg-full.js'   # both once `make docs` or `make test` has asked npm for it


def page_name(notebook): return notebook.removesuffix('.ipynb') + '.html'


def relative(name, here):
    "The way from the page `here` to the file `name`, both below the site's root."
    return os.path.relpath(name, os.path.dirname(here) or '.')


def title(notebook):
    "The title in the front matter that nbdev writes."
    first = json.loads(notebook.read_text())['cells'][0]
    return yaml.safe_load(''.join(first['source']).strip().strip('-'))['title'] if first['cell_type'] == 'raw' else notebook.stem


def entries(contents):
    "The notebooks of a sidebar, in their order."
    for entry in contents:
        if isinstance(entry, str): yield entry
        elif 'href' in entry: yield entry['href']
        else: yield from entries(entry['contents'])


def link(name, here, text, attributes=''):
    return f'<a href="{relative(page_name(name), here)}"{attributes}>{text}</a>'


def is_section(entry): return not isinstance(entry, str) and 'section' in entry


def sidebar(contents, titles, here):
    "The sidebar as nested lists; the page `here` is marked."
    def item(entry):
        if is_section(entry): return f"<span>{escape(entry['section'])}</span>{sidebar(entry['contents'], titles, here)}"
        name, text = (entry, titles.get(entry, entry)) if isinstance(entry, str) else (entry['href'], entry['text'])
        return link(name, here, escape(text), ' aria-current="page"' * (name == here))
    return f"<ul>{''.join(f'<li>{item(entry)}</li>' for entry in contents)}</ul>"


def neighbours(order, titles, here):
    "Links to the page before and the page after."
    i = order.index(here) if here in order else 0
    before, after = order[max(i - 1, 0):i], order[i + 1:i + 2]
    return ''.join(f'<span>{link(n, here, arrow)}</span>' for names, arrow in ((before, '← {}'), (after, '{} →')) for n in names for arrow in [arrow.format(escape(titles.get(n, n)))])


def actions(site, name):
    "What a reader may do with a page: as Quarto's `repo-actions`."
    repository, source = site['repo-url'], f"{site['repo-subdir']}/{name}"
    ways = {'edit': ('Edit this page', f"edit/{site['repo-branch']}/{source}"), 'issue': ('Report an issue', f'issues/new?title={quote(name)}'),
            'source': ('View source', f"blob/{site['repo-branch']}/{source}")}
    return ' · '.join(f'<a href="{repository}/{path}">{text}</a>' for text, path in (ways[a] for a in site['repo-actions']))


def render(notebook, proc, out, config, titles):
    "Write one page."
    site, name = config['website'], name_of(notebook, proc)
    page = out/page_name(name)
    page.parent.mkdir(parents=True, exist_ok=True)
    html = config['format']['html']
    contents = site['sidebar']['contents']
    values = dict(sidebar=sidebar(contents, titles, name), neighbours=neighbours(list(entries(contents)), titles, name), actions=actions(site, name),
                  site=site['title'], pagetitle=f"{titles[name]} – {site['title']}", root=relative('.', name) + '/' if (out/'theme-light.css').exists() else '', home=relative('index.html', name),
                  favicon=relative(site.get('favicon', ''), name), after_body=(proc/html['include-after-body']).read_text())
    math = f"--mathjax={relative('tex-svg-full.js', name)}" if MATHJAX.exists() else '--mathml'
    text = pandoc(to_markdown(notebook, page.parent/f'{notebook.stem}_files'), 'html', '--standalone', f'--template={PARTS/"page.html"}', '--toc', '--toc-depth=3', math,
                  '--metadata=reference-section-title:References', *(f'--variable={k}={v}' for k, v in values.items()), nbs=proc)
    page.write_text(text)


def build(proc, config, out, only=()):
    "The pages of the processed notebooks in `proc`, or of `only` some, with what they need beside them, in `out`; returns what pandoc complained of, page by page."
    out.mkdir(parents=True, exist_ok=True)
    for asset in (p for p in proc.iterdir() if p.is_file() and p.suffix not in ('.ipynb', '.yml', '.bib', '.scss', '.html')): shutil.copy(asset, out)
    if MATHJAX.exists(): shutil.copy(MATHJAX, out)
    if SASS.exists(): subprocess.run(['node', PARTS/'theme.mjs', proc/'theme.scss', out], check=True)
    titles = {name_of(p, proc): title(p) for p in chapters(proc)}
    def attempt(notebook):
        try: render(notebook, proc, out, config, titles)
        except (ValueError, yaml.YAMLError) as e: return f'{name_of(notebook, proc)}: {e}'
    with ThreadPoolExecutor(2) as pool: return [e for e in pool.map(attempt, [proc/f'{name}.ipynb' for name in only] or chapters(proc)) if e]


def process(project):
    "What nbdev makes of the notebooks for Quarto; only those that have changed since."
    python('from nbdev.serve import proc_nbs; proc_nbs(n_workers=2)', project)
    proc, nbs = project/'_proc', project/'nbs'
    for gone in {name_of(p, proc) for p in chapters(proc)} - {name_of(p, nbs) for p in chapters(nbs)}: (proc/gone).unlink()
    return proc


if __name__ == '__main__':
    out = ROOT/'_docs'
    only = sys.argv[1:]   # such as layers/layer; none: all of them
    if not only: shutil.rmtree(out, ignore_errors=True)
    complaints = build(process(ROOT), yaml.safe_load((ROOT/'_quarto.yml').read_text()), out, only)
    if complaints: raise SystemExit('\n'.join(complaints))
    print(f'Without Quarto, a preview: {out/"index.html"}')
