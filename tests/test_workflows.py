"What GitHub and contributors read: workflows, forms, changelog, citation, and the way to Colab."
import json, re, runpy, subprocess, sys
from configparser import ConfigParser
from types import SimpleNamespace

import pytest, yaml
from IPython.core.inputtransformer2 import TransformerManager

from book import ROOT, chapters, copy_project, name_of
from checks import read_yaml
from colab import LINK, colab, installation, with_colab

FILES = '.github', 'CITATION.cff', 'CHANGELOG.md', 'CONTRIBUTING.md', 'README.md', 'LICENSE', 'Makefile', 'settings.ini', 'setup.py', '_quarto.yml', 'nbs', 'tests/test_site.py'
WORKFLOWS, FORMS = '.github/workflows', '.github/ISSUE_TEMPLATE'
ACTIONS = {   # in these versions, with inputs that they document
    'actions/checkout@v6': (), 'actions/setup-python@v6': ('python-version', 'cache', 'cache-dependency-path'), 'actions/setup-node@v6': ('node-version',),
    'quarto-dev/quarto-actions/setup@v2': ('version',), 'actions/configure-pages@v6': (), 'actions/upload-pages-artifact@v5': ('path',), 'actions/deploy-pages@v5': (),
    'actions/upload-artifact@v7': ('name', 'path', 'if-no-files-found'), 'actions/download-artifact@v8': ('name', 'path'), 'pypa/gh-action-pypi-publish@release/v1': ()}


def read(root, name): return read_yaml((root/name).read_text())
def workflows(root): return {p.name: read(root, p) for p in sorted((root/WORKFLOWS).glob('*.yml'))}
def steps(workflow): return [s for job in workflow['jobs'].values() for s in job.get('steps', ())]


def settings(root):
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def check_yaml(root):
    "Files that don't parse, or have a key twice."
    for path in [*(root/'.github').rglob('*.yml'), root/'CITATION.cff']:
        try: read(root, path)
        except yaml.YAMLError as e: yield f'{path.name}: {e}'


def check_jobs(root):
    "Jobs that could do more than they need, wait for ever, or ask an action for what it doesn't know."
    for name, workflow in workflows(root).items():
        if workflow.get('permissions') != {'contents': 'read'}: yield f'{name}: a workflow may only read; a job asks for more'
        if 'concurrency' not in workflow: yield f'{name}: two runs at once would get in each other\'s way'
        for title, job in workflow['jobs'].items():
            yield from (f'{name}, {title}: {fault}' for fault in check_job(root, workflow, job))


def check_job(root, workflow, job):
    needs = job.get('needs', [])
    yield from (f'needs {n}, which is not there' for n in ([needs] if isinstance(needs, str) else needs) if n not in workflow['jobs'])
    if called := job.get('uses'):
        if not (root/called).exists() or 'workflow_call' not in read(root, called)[True]: yield f'{called} can\'t be called'   # YAML reads `on` as true
        return
    if 'timeout-minutes' not in job: yield 'has no time limit'
    for step in job['steps']:
        if ('run' in step) == ('uses' in step): yield f'a step must either run or use something: {step}'
        if (action := step.get('uses')) is None: continue
        if action not in ACTIONS: yield f'{action} is not among the actions that are known'
        yield from (f'{action} has no input {i}' for i in step.get('with', {}) if i not in ACTIONS.get(action, (i,)))


def commands(text): return re.findall(r'(?<![\w-])make ([a-z]+)', text)
def files(text): return re.findall(r'(?<![\w./*-])(?:\./)?((?:[\w.-]+/)*[\w-]+\.(?:ini|py|md|yml|cff|ipynb|bib))(?![\w/])', text)
def spans(text): return '\n'.join(re.findall(r'```.*?```|`[^`]+`', text, re.DOTALL) + re.findall(r'\]\(([^):]+)\)', text))


def check_names(root):
    "Commands and files that are named, but not there."
    targets = re.findall(r'^([a-z]+):', (root/'Makefile').read_text(), re.MULTILINE)
    texts = {p.name: p.read_text() for p in (root/WORKFLOWS).glob('*.yml')} | {n: spans((root/n).read_text()) for n in ('CONTRIBUTING.md', '.github/pull_request_template.md', 'README.md')}
    for name, text in texts.items():
        yield from (f'{name}: no such command: make {c}' for c in commands(text) if c not in targets)
        yield from (f'{name}: no such file: {f}' for f in files(text) if not (root/f).exists())


def setup_of(root):
    "What setup.py tells setuptools."
    told, kept = {}, sys.modules.get('setuptools')
    sys.modules['setuptools'] = SimpleNamespace(find_packages=lambda **_: [], setup=told.update)
    try: runpy.run_path(str(root/'setup.py'))
    finally: sys.modules.update(setuptools=kept) if kept else sys.modules.pop('setuptools')
    return told


def check_pythons(root):
    "The same Pythons are tested as are promised, beginning with the oldest."
    promised = [c.rpartition(' ')[2] for c in setup_of(root)['classifiers'] if re.search(r'Python :: 3\.\d+$', c)]
    tested = read(root, f'{WORKFLOWS}/test.yml')['jobs']['test']['strategy']['matrix']['python-version']
    if tested != promised: yield f'tested: {tested}, promised: {promised}'
    if promised[0] != settings(root)['min_python']: yield f'promised: {promised}, but settings.ini begins with {settings(root)["min_python"]}'
    used = [s['with']['python-version'] for w in workflows(root).values() for s in steps(w) if 'setup-python' in s.get('uses', '')]
    yield from (f'Python {v} is used, but not promised' for v in used if v not in promised and 'matrix' not in v)


def check_forms(root):
    "Forms that GitHub would refuse."
    for path in sorted((root/FORMS).glob('*.yml')):
        form = read(root, path)
        if path.name == 'config.yml': faults = [f'a link without {k}' for link in form['contact_links'] for k in ('name', 'url', 'about') if not link.get(k)]
        else: faults = check_form(form)
        yield from (f'{path.name}: {f}' for f in faults)


def check_form(form):
    yield from (f'{k} is missing' for k in ('name', 'description', 'body') if not form.get(k))
    yield from (f'unknown key {k}' for k in form if k not in ('name', 'description', 'title', 'labels', 'body'))
    fields, allowed = form.get('body', []), dict(markdown={'value'}, input=set(), textarea={'render'}, dropdown={'options'}, checkboxes={'options'})
    ids = [f['id'] for f in fields if 'id' in f]
    yield from (f'the id {i} comes twice' for i in set(ids) if ids.count(i) > 1)
    for field in fields:
        kind, has = field.get('type'), set(field.get('attributes', {}))
        if kind not in allowed: yield f'unknown type {kind}'; continue
        wanted = {'value'} if kind == 'markdown' else {'label'} | allowed[kind] - {'render'}
        yield from (f'{kind} without {w}' for w in wanted - has)
        yield from (f'{kind} can\'t have {h}' for h in has - wanted - allowed[kind] - {'description', 'placeholder'})


def check_version(root):
    "One version everywhere; the newest one of the changelog."
    version, author = settings(root)['version'], settings(root)['author']
    heads = re.findall(r'^## \[(\d[\w.]*)\] - (?:unreleased|\d{4}-\d\d-\d\d)$', (root/'CHANGELOG.md').read_text(), re.MULTILINE)
    if heads[:1] != [version]: yield f'CHANGELOG.md begins with {heads[:1]}, settings.ini says {version}'
    if f'version = {{{version}}}' not in (root/'README.md').read_text(): yield f'README.md cites another version than {version}'
    cited = read(root, 'CITATION.cff')
    yield from (f'CITATION.cff: no {k}' for k in ('cff-version', 'message', 'title', 'authors') if not cited.get(k))
    facts = dict(version=version, authors=[dict(name=author)], license=setup_of(root)['license'], **{'repository-code': settings(root)['git_url']})
    yield from (f'CITATION.cff: {k} is {cited.get(k)}, not {v}' for k, v in facts.items() if cited.get(k) != v)


def check_release(root):
    "The step that compares tag, version and changelog: it must let the right tag pass, once the changelog has a date, and no other."
    guard = next(s['run'] for s in steps(workflows(root)['release.yml']) if 'GITHUB_REF_NAME' in s.get('run', ''))
    version, changelog = settings(root)['version'], root/'CHANGELOG.md'
    passes = lambda tag: not subprocess.run(['bash', '-e', '-c', guard], cwd=root, env=dict(GITHUB_REF_NAME=tag, PATH='/usr/bin:/bin'), capture_output=True).returncode
    text = changelog.read_text()
    for heading, tag, right in (('2030-01-31', f'v{version}', True), ('2030-01-31', 'v99.0', False), ('2030-01-31', version, False), ('unreleased', f'v{version}', False)):
        changelog.write_text(re.sub(rf'^(## \[{re.escape(version)}\] - ).*', rf'\g<1>{heading}', text, flags=re.MULTILINE))
        if passes(tag) != right: yield f'release.yml: the tag {tag} {"does not pass" if right else "passes"}, {heading}'
    changelog.write_text(text)


CHECKS = check_yaml, check_jobs, check_names, check_pythons, check_forms, check_version, check_release


@pytest.fixture
def project(tmp_path): return copy_project(tmp_path, *FILES)


@pytest.mark.parametrize('check', CHECKS)
def test_project(check, project): assert not [*check(project)]


FAULTS = {
    'no YAML': (f'{WORKFLOWS}/test.yml', 'permissions:', 'permissions: :', check_yaml, 'test.yml'),
    'a key twice': (f'{WORKFLOWS}/site.yml', 'jobs:', 'permissions: {}\njobs:', check_yaml, 'comes twice'),
    'a citation that is no YAML': ('CITATION.cff', 'title: "', 'title: ', check_yaml, 'CITATION.cff'),
    'too many rights': (f'{WORKFLOWS}/test.yml', 'contents: read', 'contents: write', check_jobs, 'may only read'),
    'no time limit': (f'{WORKFLOWS}/test.yml', '    timeout-minutes: 60\n', '', check_jobs, 'no time limit'),
    'runs in each other\'s way': (f'{WORKFLOWS}/release.yml', 'concurrency:\n  group: release\n', '', check_jobs, 'at once'),
    'an unknown action': (f'{WORKFLOWS}/site.yml', 'deploy-pages@v5', 'deploy-pages@v55', check_jobs, 'v55 is not among'),
    'an unknown input': (f'{WORKFLOWS}/test.yml', 'cache-dependency-path', 'cache-path', check_jobs, 'no input cache-path'),
    'a job that waits for nobody': (f'{WORKFLOWS}/release.yml', 'needs: [test, build]', 'needs: [tests, build]', check_jobs, 'needs tests'),
    'a call into the void': (f'{WORKFLOWS}/release.yml', 'workflows/test.yml', 'workflows/site.yml', check_jobs, "can't be called"),
    'a command that is gone': ('Makefile', '\ndocs:', '\nsite:', check_names, 'make docs'),
    'a file that is gone': (f'{WORKFLOWS}/test.yml', 'settings.ini', 'requirements.ini', check_names, 'requirements.ini'),
    'a chapter that is gone': ('CONTRIBUTING.md', 'book/making.ipynb', '99_making.ipynb', check_names, '99_making.ipynb'),
    'a Python untested': (f'{WORKFLOWS}/test.yml', "'3.10', ", '', check_pythons, 'promised'),
    'a Python too old': ('settings.ini', 'min_python = 3.10', 'min_python = 3.9', check_pythons, "'3.9'"),
    'a form without description': (f'{FORMS}/claim.yml', 'description: A proof', 'about: A proof', check_forms, 'description is missing'),
    'a field without label': (f'{FORMS}/feature.yml', '      label: What are', '      title: What are', check_forms, 'textarea without label'),
    'an unknown field': (f'{FORMS}/bug_report.yml', 'type: checkboxes', 'type: tickboxes', check_forms, 'unknown type'),
    'an id twice': (f'{FORMS}/bug_report.yml', 'id: code', 'id: what', check_forms, 'the id what comes twice'),
    'a link to nowhere': (f'{FORMS}/config.yml', '    url: ', '    uri: ', check_forms, 'a link without url'),
    'a version that nobody described': ('settings.ini', 'version = 0.', 'version = 7.', check_version, 'CHANGELOG.md begins'),
    'another version cited': ('CITATION.cff', 'version: 0.', 'version: 7.', check_version, 'CITATION.cff: version'),
    'authors unnamed': ('CITATION.cff', 'authors:', 'people:', check_version, 'no authors'),
    'a tag that nobody compares': (f'{WORKFLOWS}/release.yml', 'test "$GITHUB_REF_NAME" = "v$version"', 'true', check_release, 'v99.0 passes'),
    'a release without date': (f'{WORKFLOWS}/release.yml', '[0-9]{4}-[0-9]{2}-[0-9]{2}$', '', check_release, 'unreleased'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_seen(name, project):
    path, old, new, check, complaint = FAULTS[name]
    text = (project/path).read_text()
    assert old in text
    (project/path).write_text(text.replace(old, new, 1))
    assert any(complaint in c for c in check(project)), [*check(project)]


# Colab

def cells(path): return json.loads(path.read_text())['cells']
def test_colab():
    names = {name_of(p, ROOT/'nbs'): cells(p) for p in chapters(ROOT/'nbs')}
    assert not [name for name, own in names.items() if with_colab(own, name) != own], 'run `make export`'


def test_titles():
    "nbdev takes a page's title and summary from their cell, and drops what else is in it."
    assert not [p.name for p in chapters(ROOT/'nbs') if not re.fullmatch(r'# .+\n\n> .+', ''.join(cells(p)[0]['source']).strip())], 'title and summary need a cell of their own'


def test_colab_comes_once(tmp_path):
    folder = copy_project(tmp_path, 'nbs')/'nbs'
    colab(folder)
    assert not colab(folder)                                                  # nothing to do the second time
    path = folder/'foundations/group.ipynb'
    good = path.read_text()
    for change in ((LINK, LINK.replace('/blob/main/', '/blob/old/')), ('fetch the book', 'get it'), ('foundations/group.ipynb)', '99_group.ipynb)')):   # cells of an earlier version, or of another chapter
        assert change[0] in good
        path.write_text(good.replace(*change, 1))
        assert colab(folder) == ['foundations/group.ipynb'] and len(cells(path)) == len(json.loads(good)['cells']) and path.read_text() == good


@pytest.mark.parametrize('there', [True, False])
def test_colab_only(there, monkeypatch):
    "The cell does its work on Colab, and nothing anywhere else."
    done = []
    shell = SimpleNamespace(system=done.append, run_line_magic=lambda name, rest: done.append(f'{name} {rest}'))
    if there: monkeypatch.setitem(sys.modules, 'google.colab', SimpleNamespace())
    exec(TransformerManager().transform_cell(installation('layers/layer.ipynb')), dict(get_ipython=lambda: shell))
    assert [d.split()[0] for d in done] == ['test', 'pip', 'cd']*there
