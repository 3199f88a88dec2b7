"The book's pages and its README, by pandoc, for machines without Quarto."
import base64, html, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pypandoc, yaml

HERE = Path(__file__).parent
ROOT = HERE.parent


def python(code, cwd):
    "Run `code` in a fresh Python in the project `cwd`, for nbdev reads its settings from there."
    env = {**os.environ, 'PYTHONPATH': str(cwd)}
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode: raise ValueError(done.stdout)


def copy_project(target, *names, root=ROOT):
    "The files `names` of the project in the folder `target`: checks work on copies."
    for name in names:
        source = root/name
        if source.is_dir(): shutil.copytree(source, target/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        elif source.exists():
            (target/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target/name)
    return target


def chapters(folder):
    "The notebooks of a book, in the folders of its parts; what begins with a dot or an underscore is none."
    found = (p for p in Path(folder).rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(folder).parts))
    return sorted(found)


def name_of(notebook, folder):
    "What the sidebar and links call a chapter: its path below `folder`."
    return notebook.relative_to(folder).as_posix()


def split_cell(source, read=yaml.safe_load):
    "The directives, the options and the code of a cell."
    lines = source.split('\n')
    head = [line[2:].strip() for line in lines if line.startswith('#|')]
    options = read('\n'.join(line for line in head if ':' in line)) or {}
    return {line.split()[0] for line in head if line and ':' not in line}, options, '\n'.join(line for line in lines if not line.startswith('#|')).strip()


def fence(text, classes): return f'~~~~ {{{classes}}}\n{text.rstrip()}\n~~~~'
def div(classes, *parts): return '\n\n'.join([f':::: {{{classes}}}', *parts, '::::'])


def show_output(output, options, figure):
    "Markdown for one output; a picture is written to the file `figure`."
    data = {k: ''.join(v) for k, v in output.get('data', {}).items() if not isinstance(v, dict)}
    if output['output_type'] == 'error': raise ValueError(f"a cell failed: {output['ename']}: {output['evalue']}")
    if output['output_type'] == 'stream': return fence(''.join(output['text']), '.output')
    if 'image/png' in data:
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_bytes(base64.b64decode(data['image/png']))
        alt = options.get('fig-alt', '').replace('"', "'")
        width = output.get('metadata', {}).get('image/png', {}).get('width')   # where the picture has more pixels than that
        return f'![]({figure.parent.name}/{figure.name}){{alt="{alt}"{f" width={width}" if width else ""}}}'
    if 'text/markdown' in data: return data['text/markdown']
    if 'text/html' in data: return '```{=html}\n' + data['text/html'] + '\n```'
    return fence(data['text/plain'], '.output')


def show_source(code, options):
    "Markdown for the code of a cell, folded if the cell says so."
    source, fold = fence(code, '.python .cell-code'), options.get('code-fold')
    if not fold: return source
    summary = html.escape(options.get('code-summary', 'Code'))
    return raw_html(f'<details{" open" * (fold == "show")}><summary>{summary}</summary>') + f'\n\n{source}\n\n' + raw_html('</details>')


def raw_html(text): return f'```{{=html}}\n{text}\n```'


def show_code(cell, figures, number):
    "Markdown for a code cell and its outputs."
    directives, options, code = split_cell(''.join(cell['source']))
    if 'hide' in directives or options.get('include') is False: return ''
    label = options.get('label', f'cell-{number}')
    shown = [show_output(o, options, figures/f'{label}-{i}.png') for i, o in enumerate(cell['outputs'])] if options.get('output', True) else []
    caption = options.get('fig-cap') or options.get('tbl-cap')
    if shown and caption: shown = [f'::: {{#{label}}}', *shown, caption, ':::']
    if shown and options.get('output') != 'asis': shown = [div('.cell-output', *shown)]
    source = [show_source(code, options)] * bool(code and options.get('echo', True))
    return div('.cell', *source, *shown) if source + shown else ''


def is_plaything(cell):
    "Does it need a browser's scripts?"
    return any('text/html' in o.get('data', {}) for o in cell.get('outputs', []))


def to_markdown(notebook, figures, playthings=True):
    "The notebook as pandoc's Markdown; its pictures go to the folder `figures`."
    cells = [c for c in json.loads(notebook.read_text())['cells'] if playthings or not is_plaything(c)]
    return '\n\n'.join(show_code(c, figures, i) if c['cell_type'] == 'code' else ''.join(c['source']) for i, c in enumerate(cells))


def pandoc(markdown, to, *options, nbs=ROOT/'nbs'):
    "Convert `markdown`; any warning is an error: an unknown citation, a dangling reference, a label used twice."
    command = [pypandoc.get_pandoc_path(), '--from=markdown', f'--to={to}', '--wrap=none', '--fail-if-warnings', f'--lua-filter={HERE/"crossref.lua"}',
               '--citeproc', f'--bibliography={nbs/"references.bib"}', '--metadata=link-citations:true', *(options or ['--mathjax'])]
    done = subprocess.run(command, input=markdown, capture_output=True, text=True)
    if done.returncode: raise ValueError(done.stderr.strip())
    return done.stdout


def readme(root=ROOT, target=None):
    "Write README.md and its figures, made from `nbs/index.ipynb`."
    target = target or root
    shutil.rmtree(target/'index_files', ignore_errors=True)
    text = pandoc(to_markdown(root/'nbs'/'index.ipynb', target/'index_files', playthings=False), 'gfm', nbs=root/'nbs')
    (target/'README.md').write_text(re.sub(r'\n', '\n\n<!-- Made from nbs/index.ipynb by `make export`. -->\n', text, count=1))


if __name__ == '__main__': readme()
