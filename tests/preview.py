"The site for those who don't have Quarto: nbdev's processed notebooks by pandoc, in a plain page. `make docs` calls it."
import json, re, shutil
from concurrent.futures import ThreadPoolExecutor
from html import escape
from urllib.parse import quote

import yaml

from book import HERE, ROOT, chapters, pandoc, python, to_markdown

PARTS = HERE/'preview'
MATHJAX = PARTS/'node_modules'/'mathjax'/'es5'/'tex-svg-full.js'   # once `make docs` or `make test` has asked npm for it


def page_name(notebook): return re.sub(r'^\d+[a-z]*_|\.ipynb$', '', notebook) + '.html'


def title(notebook):
    "The title in the front matter that nbdev writes."
    first = json.loads(notebook.read_text())['cells'][0]
    return yaml.safe_load(''.join(first['source']).strip().strip('-'))['title'] if first['cell_type'] == 'raw' else notebook.stem


def entries(contents):
    "The notebooks of a sidebar, in their order."
    for entry in contents:
        if isinstance(entry, str): yield entry
        else: yield from entries(entry['contents'])


def link(name, text, attributes=''): return f'<a href="{page_name(name)}"{attributes}>{text}</a>'


def sidebar(contents, titles, here):
    "The sidebar as nested lists; the page `here` is marked."
    def item(entry):
        if not isinstance(entry, str): return f"<span>{escape(entry['section'])}</span>{sidebar(entry['contents'], titles, here)}"
        return link(entry, escape(titles.get(entry, entry)), ' aria-current="page"' * (entry == here))
    return f"<ul>{''.join(f'<li>{item(entry)}</li>' for entry in contents)}</ul>"


def neighbours(order, titles, here):
    "Links to the page before and the page after."
    i = order.index(here) if here in order else 0
    before, after = order[max(i - 1, 0):i], order[i + 1:i + 2]
    return ''.join(f'<span>{link(n, arrow)}</span>' for names, arrow in ((before, '← {}'), (after, '{} →')) for n in names for arrow in [arrow.format(escape(titles.get(n, n)))])


def actions(site, name):
    "What a reader may do with a page: as Quarto's `repo-actions`."
    repository, source = site['repo-url'], f"{site['repo-subdir']}/{name}"
    ways = {'edit': ('Edit this page', f"edit/{site['repo-branch']}/{source}"), 'issue': ('Report an issue', f'issues/new?title={quote(name)}'),
            'source': ('View source', f"blob/{site['repo-branch']}/{source}")}
    return ' · '.join(f'<a href="{repository}/{path}">{text}</a>' for text, path in (ways[a] for a in site['repo-actions']))


def render(notebook, out, config, titles):
    "Write one page."
    site, name = config['website'], notebook.name
    contents = site['sidebar']['contents']
    values = dict(sidebar=sidebar(contents, titles, name), neighbours=neighbours(list(entries(contents)), titles, name), actions=actions(site, name),
                  site=site['title'], pagetitle=f"{titles[name]} – {site['title']}", favicon=site.get('favicon', ''), css=config['format']['html']['css'],
                  after_body=(notebook.parent/config['format']['html']['include-after-body']).read_text())
    math = '--mathjax=tex-svg-full.js' if MATHJAX.exists() else '--mathml'
    page = pandoc(to_markdown(notebook, out/f'{notebook.stem}_files'), 'html', '--standalone', f'--template={PARTS/"page.html"}', '--toc', '--toc-depth=3', math,
                  '--metadata=reference-section-title:References', *(f'--variable={k}={v}' for k, v in values.items()), nbs=notebook.parent)
    (out/page_name(name)).write_text(page)


def build(proc, config, out):
    "All pages of the processed notebooks in `proc`, with what they need beside them, in `out`; returns what pandoc complained of, page by page."
    out.mkdir(parents=True, exist_ok=True)
    for asset in (p for p in proc.iterdir() if p.suffix not in ('.ipynb', '.yml', '.bib', '.scss', '.html')): shutil.copy(asset, out)
    for asset in [PARTS/'preview.css', *[MATHJAX]*MATHJAX.exists()]: shutil.copy(asset, out)
    titles = {p.name: title(p) for p in chapters(proc)}
    def attempt(notebook):
        try: render(notebook, out, config, titles)
        except (ValueError, yaml.YAMLError) as e: return f'{notebook.name}: {e}'
    with ThreadPoolExecutor(2) as pool: return [e for e in pool.map(attempt, chapters(proc)) if e]


def process(project):
    "What nbdev makes of the notebooks for Quarto; only those that have changed since."
    python('from nbdev.serve import proc_nbs; proc_nbs(n_workers=2)', project)
    for gone in {p.name for p in chapters(project/'_proc')} - {p.name for p in chapters(project/'nbs')}: (project/'_proc'/gone).unlink()
    return project/'_proc'


if __name__ == '__main__':
    out = ROOT/'_docs'
    shutil.rmtree(out, ignore_errors=True)
    complaints = build(process(ROOT), yaml.safe_load((ROOT/'_quarto.yml').read_text()), out)
    if complaints: raise SystemExit('\n'.join(complaints))
    print(f'Without Quarto, a preview: {out/"index.html"}')
