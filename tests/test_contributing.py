"What contributors and workflows are told is true: commands and files exist, versions agree, forms and citation are well-formed."
import json, os, re, runpy, shutil, subprocess, sys
from collections import Counter
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest, yaml

ROOT = Path(__file__).parent.parent
TEXTS = ['CONTRIBUTING.md', 'CHANGELOG.md', '.github/pull_request_template.md']
PARTS = ['.github', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff', 'Makefile', 'settings.ini', 'setup.py', '.gitignore']


class Strict(yaml.SafeLoader):
    "YAML in which no key may come twice."
    def construct_mapping(self, node, deep=False):
        twice = [k for k, n in Counter(k.value for k, _ in node.value).items() if n > 1]
        if twice: raise yaml.YAMLError(f'the key {twice[0]} comes twice')
        return super().construct_mapping(node, deep)


def read(path): return yaml.load(path.read_text(), Strict)
def workflows(project): return {p.name: read(p) for p in sorted((project/'.github'/'workflows').glob('*.yml'))}
def forms(project): return {p.name: read(p) for p in sorted((project/'.github'/'ISSUE_TEMPLATE').glob('*.yml')) if p.name != 'config.yml'}
def steps(flow): return [step for job in flow['jobs'].values() for step in job.get('steps', [])]


def settings(project):
    "The section of settings.ini."
    config = ConfigParser(delimiters=['='])
    config.read(project/'settings.ini')
    return config['DEFAULT']


def package(project):
    "What setup.py says to setuptools."
    said = {}
    with patch.dict(sys.modules, setuptools=SimpleNamespace(setup=said.update, find_packages=lambda **_: [])): runpy.run_path(str(project/'setup.py'))
    return said


def check_yaml(project):
    "All of it parses."
    complaints = []
    for path in [project/'CITATION.cff', *sorted((project/'.github').rglob('*.y*ml'))]:
        if path.suffix == '.yaml': complaints.append(f'{path.name}: the others end in .yml')
        try: read(path)
        except yaml.YAMLError as e: complaints.append(f'{path.name}: {e}')
    return complaints


# workflows

RIGHTS = {'contents': 'read'}


def against_job(name, job, flow, key, project):
    "What is wrong with a job."
    where = f'{name}, {key}'
    needs = job.get('needs', [])
    complaints = [f'{where}: needs {n}, which is not there' for n in ([needs] if isinstance(needs, str) else needs) if n not in flow['jobs']]
    allowed = ('pages', 'id-token') if 'environment' in job else ()      # only what publishes may write, and never into the repository
    complaints += [f'{where}: may {right}: {level}' for right, level in job.get('permissions', {}).items() if level == 'write' and right not in allowed]
    if 'uses' in job:
        called = project/job['uses']
        return complaints + [f"{where}: {job['uses']} can't be called"]*(not called.exists() or 'workflow_call' not in read(called)[True])
    if 'runs-on' not in job: complaints.append(f'{where}: runs nowhere')
    return complaints + [f'{where}: a step must either use an action or run a command: {step}' for step in job['steps'] if ('uses' in step) == ('run' in step)]


def check_workflows(project):
    "Triggers, rights, jobs, and one version of each action."
    flows, complaints, used = workflows(project), [], {}
    for name, flow in flows.items():
        missing = [k for k in ('name', True, 'permissions', 'concurrency', 'jobs') if k not in flow]     # YAML 1.1 reads `on` as true
        if missing: complaints.append(f"{name}: no {', '.join('on' if k is True else k for k in missing)}"); continue
        if flow['permissions'] != RIGHTS: complaints.append(f"{name}: may {flow['permissions']} everywhere")
        for key, job in flow['jobs'].items(): complaints += against_job(name, job, flow, key, project)
        for action, version in (step['uses'].split('@') if '@' in step['uses'] else (step['uses'], '') for step in steps(flow) if 'uses' in step):
            if not re.fullmatch(r'(release/)?v\d+', version): complaints.append(f'{name}: {action} has no major version')
            used.setdefault(action, set()).add(version)
    branch = settings(project)['branch']
    complaints += [f'{name} does not follow the branch {branch}' for name in ('test.yml', 'site.yml') if flows[name].get(True, {}).get('push', {}).get('branches') != [branch]]
    return complaints + [f'{action} has several versions: {sorted(v)}' for action, v in used.items() if len(v) > 1]


def check_python(project):
    "The workflow tests what settings.ini and setup.py promise."
    promised = [c.split()[-1] for c in package(project)['classifiers'] if re.search(r':: 3\.\d+$', c)]
    flows, least = workflows(project), settings(project)['min_python']
    tested = flows['test.yml']['jobs']['test']['strategy']['matrix']['python-version']
    complaints = [f'tested are {tested}, promised {promised}']*(tested != promised) + [f'{promised[0]} is promised first, {least} needed']*(promised[0] != least)
    chosen = {(name, step['with']['python-version']) for name, flow in flows.items() for step in steps(flow) if 'setup-python' in step.get('uses', '')}
    complaints += [f'{name}: Python {v!r} is not tested' for name, v in chosen if v not in [*promised, '${{ matrix.python-version }}']]
    said = re.findall(r'Python (3\.\d+) or newer', (project/'CONTRIBUTING.md').read_text())
    return complaints + [f'CONTRIBUTING.md speaks of Python {said}, settings.ini of {least}']*(said != [least])


def check_release(project):
    "The rule that guards releases lets the right tag pass, and no other."
    script = next(step['run'] for step in steps(workflows(project)['release.yml']) if 'GITHUB_REF_NAME' in step.get('run', ''))
    def passes(tag): return subprocess.run(['bash', '-e', '-c', script], cwd=project, env={**os.environ, 'GITHUB_REF_NAME': tag}, capture_output=True).returncode == 0
    version = settings(project)['version']
    return [f'the tag {tag} is {"refused" if right else "let pass"}' for tag, right in ((f'v{version}', True), (f'v{version}0', False), (version, False), ('v9', False)) if passes(tag) != right]


# texts

def told(project):
    "All texts, by name."
    return {name: (project/name).read_text() for name in [*TEXTS, *(str(p.relative_to(project)) for p in sorted((project/'.github').rglob('*.yml')))]}


def code(name, text):
    "What stands in code quotes, blocks of code, and commands of workflows."
    spans = re.findall(r'``` ?\w+\n(.*?)```', text, re.DOTALL) + re.findall(r'(?<!`)`([^`\n]+)`(?!`)', text)
    return spans + ([step['run'] for step in steps(yaml.safe_load(text)) if 'run' in step] if 'workflows' in name else [])


def check_commands(project):
    "Every `make this` is in the Makefile."
    targets = set(re.findall(r'^([a-z]+):(?!=)', (project/'Makefile').read_text(), re.MULTILINE))
    return [f'{name}: make {t} is not in the Makefile' for name, text in told(project).items() for c in code(name, text) for t in re.findall(r'\bmake ([a-z]+)', re.sub('#.*', '', c)) if t not in targets]


def anchors(page):
    "Where a link can lead to in a notebook."
    cells = [''.join(c['source']) for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'markdown']
    return {re.sub(r'[^\w-]', '', h.strip().lower().replace(' ', '-')) for c in cells for h in re.findall(r'^#+ (.+)$', c, re.MULTILINE)}


def check_files(project):
    "Every file that is named exists, or is made by a command."
    made = [line.strip('/') for line in (project/'.gitignore').read_text().split('\n') if re.match(r'[/\w._*]', line)]
    complaints = []
    for name, text in told(project).items():
        words = re.sub(r'\w+://[^\s)]+', '', text)
        links = re.findall(r'\]\(([^)\s]+)\)', words)
        named = re.findall(r'(?<![\w./@-])[\w.-]+(?:/[\w.-]+)*\.(?:md|ini|ipynb|yml|cff|bib|py|toml)\b', words)
        named += [c for c in code(name, text) if re.fullmatch(r'[\w.-]+(/[\w.-]+)*/|[\w.-]+/[\w./-]+|_\w+|LICENSE', c)] + re.findall(r'^ +path: (.+)$', words, re.MULTILINE)
        named += [f'nbs/{chapter}.ipynb' for chapter in re.findall(r'ARGS=(\d\w+)', words)]
        for path, _, anchor in (f.partition('#') for f in {*links, *named}):
            if not ((project/path).exists() or any(fnmatch(path.split('/')[0], m) for m in made)): complaints.append(f'{name}: {path} does not exist')
            elif anchor and anchor not in anchors(project/path): complaints.append(f'{name}: no such anchor in {path}: {anchor}')
    return complaints


def releases(project): return re.findall(r'^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$', (project/'CHANGELOG.md').read_text(), re.MULTILINE)


def check_changelog(project):
    "Unreleased changes first, then the version of settings.ini; each has a date and a link."
    text, found, version = (project/'CHANGELOG.md').read_text(), releases(project), settings(project)['version']
    if len(found) < 2 or len(found) != len(re.findall('^## ', text, re.MULTILINE)): return [f'CHANGELOG.md: its releases are unreadable: {found}']
    dates = [date for _, date in found[1:]]
    return ([f'CHANGELOG.md begins with {found[0]}']*(found[0] != ('Unreleased', '')) + [f'CHANGELOG.md: the newest is {found[1][0]}, the version {version}']*(found[1][0] != version)
            + ['CHANGELOG.md: the dates are out of order, or missing']*(dates != sorted(dates, reverse=True) or '' in dates)
            + [f'CHANGELOG.md: no link for {v}' for v, _ in found if f'\n[{v}]: {settings(project)["git_url"]}/' not in text]
            + [f'CHANGELOG.md: {kind} is no kind of change' for kind in re.findall(r'^### (.+)$', text, re.MULTILINE) if kind not in ('Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security')])


def check_citation(project):
    "The keys that Citation File Format 1.2.0 requires, and what it says agrees with everything else."
    cff, cfg = read(project/'CITATION.cff'), settings(project)
    missing = [k for k in ('cff-version', 'message', 'title', 'authors') if not cff.get(k)]
    want = {'cff-version': '1.2.0', 'type': 'software', 'version': cfg['version'], 'date-released': dict(releases(project)).get(cfg['version']), 'authors': [{'name': cfg['author']}],
            'license': package(project)['license'], 'repository-code': cfg['git_url'], 'url': cfg['doc_host'] + cfg['doc_baseurl'], 'keywords': cfg['keywords'].split()}
    known = {*want, 'message', 'title', 'abstract'}
    return ([f'CITATION.cff: no {k}' for k in missing] + [f'CITATION.cff: {k} is unknown' for k in cff if k not in known]
            + [f'CITATION.cff: {k} is {cff.get(k)!r}, not {v!r}' for k, v in want.items() if cff.get(k) != v])


# issue forms

def against_field(field):
    "What is wrong with an element of a form."
    kind, attributes = field.get('type'), field.get('attributes', {})
    if kind not in ('markdown', 'input', 'textarea', 'dropdown', 'checkboxes'): return [f'{kind} is no type']
    if kind == 'markdown': return ['a text without a value']*(not attributes.get('value'))
    complaints = [f'{kind} without a label']*(not isinstance(attributes.get('label'), str)) + [f"the id {field.get('id')} is not allowed"]*(not re.fullmatch(r'[\w-]+', str(field.get('id', ''))))
    if kind in ('dropdown', 'checkboxes'):
        options = [o.get('label') if kind == 'checkboxes' and isinstance(o, dict) else o for o in attributes.get('options', [])]
        complaints += [f'options {options} must be different texts']*(not options or not all(isinstance(o, str) for o in options) or len(set(options)) < len(options))
    known = {'label', 'description', *{'input': ('placeholder', 'value'), 'textarea': ('placeholder', 'value', 'render'), 'dropdown': ('options', 'multiple', 'default'), 'checkboxes': ('options',)}[kind]}
    return complaints + [f'{k} is unknown in {kind}' for k in attributes if k not in known]


def check_forms(project):
    "Each form as GitHub wants it: name, description, and a body in which every question has a label of its own."
    complaints = []
    for name, form in forms(project).items():
        missing = [k for k in ('name', 'description', 'body', 'labels') if not form.get(k)]
        if missing: complaints.append(f"{name}: no {', '.join(missing)}"); continue
        complaints += [f'{name}: {k} is unknown' for k in form if k not in ('name', 'description', 'title', 'labels', 'body')]
        questions = [f for f in form['body'] if f.get('type') != 'markdown']
        complaints += [f'{name}: {c}' for f in form['body'] for c in against_field(f)] + [f'{name}: asks nothing']*(not questions)
        keys = Counter(x for f in questions for x in (('id', f.get('id')), ('label', f.get('attributes', {}).get('label'))))
        complaints += [f'{name}: the {what} {which!r} comes twice' for (what, which), n in keys.items() if n > 1]
    return complaints


def check_contacts(project):
    "Links beside the forms lead to pages of this book."
    config, site = read(project/'.github'/'ISSUE_TEMPLATE'/'config.yml'), settings(project)['doc_host'] + settings(project)['doc_baseurl']
    pages = {site, *(f"{site}/{re.sub(r'^[0-9]+[a-z]*_', '', p.stem)}.html" for p in (project/'nbs').glob('*.ipynb'))}
    return ([f'config.yml: {link} wants a name, an address and a sentence' for link in config['contact_links'] if sorted(link) != ['about', 'name', 'url']]
            + [f"config.yml: {link['url']} is no page of the book" for link in config['contact_links'] if link['url'] not in pages])


CHECKS = [check_workflows, check_python, check_release, check_commands, check_files, check_changelog, check_citation, check_forms, check_contacts]


def complaints(project): return check_yaml(project) or [c for check in CHECKS for c in check(project)]


@pytest.mark.parametrize('check', [check_yaml, *CHECKS], ids=lambda check: check.__name__)
def test_project(check): assert not check(ROOT)


# Every check can fail: a copy of the project, and one fault at a time.

@pytest.fixture
def project(tmp_path):
    "The project, with copies of what these checks read, and links to the rest."
    for path in ROOT.iterdir():
        if path.name in PARTS: (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path/path.name)
        elif not path.name.startswith('.'): (tmp_path/path.name).symlink_to(path)
    return tmp_path


VERSION, PYTHONS = settings(ROOT)['version'], "['3.10', '3.11', '3.12', '3.13']"
FLOW, FORM = '.github/workflows/', '.github/ISSUE_TEMPLATE/'
FAULTS = {
    'no YAML': (FLOW + 'test.yml', 'jobs:', 'jobs: [', 'test.yml: while parsing'),
    'a key twice': (FLOW + 'site.yml', 'name: site', 'name: site\nname: site', 'name comes twice'),
    'a citation that is no YAML': ('CITATION.cff', 'type: software', 'type: "software', 'CITATION.cff: while'),
    'a form that is no YAML': (FORM + 'claim.yml', 'body:', 'body: {', 'claim.yml: while'),
    'no trigger': (FLOW + 'release.yml', 'on:\n', 'when:\n', 'release.yml: no on'),
    'too many rights': (FLOW + 'test.yml', 'contents: read', 'contents: write', 'everywhere'),
    'a job with too many rights': (FLOW + 'release.yml', 'id-token: write', 'contents: write', 'publish: may contents: write'),
    'a job that waits for nobody': (FLOW + 'site.yml', 'needs: build', 'needs: biuld', 'needs biuld'),
    'a job that writes, and publishes nothing': (FLOW + 'release.yml', 'environment:', 'env:', 'publish: may id-token: write'),
    'a job that runs nowhere': (FLOW + 'test.yml', '    runs-on: ubuntu-latest\n', '', 'runs nowhere'),
    'a step that does nothing': (FLOW + 'test.yml', '- run: make test', '- name: make test', 'a step must'),
    'a workflow that is not there': (FLOW + 'release.yml', './.github/workflows/test.yml', './.github/workflows/tests.yml', "can't be called"),
    'a workflow that nobody may call': (FLOW + 'test.yml', '  workflow_call: ', '  workflow_dispatched: ', "can't be called"),
    'an action of any version': (FLOW + 'test.yml', 'actions/checkout@v', 'actions/checkout@main-', 'no major version'),
    'two versions of an action': (FLOW + 'test.yml', 'actions/checkout@v', 'actions/checkout@v3', 'several versions'),
    'another branch': (FLOW + 'site.yml', '[main]', '[master]', 'does not follow the branch'),
    'a Python too few': (FLOW + 'test.yml', PYTHONS, PYTHONS.replace("'3.10', ", ''), 'promised'),
    'a Python that is a number': (FLOW + 'test.yml', "'3.10'", '3.10', 'promised'),
    'a Python that nobody tests': ('setup.py', ', 13', ', 14', 'promised'),
    'an older Python': ('settings.ini', 'min_python = 3.10', 'min_python = 3.9', 'promised'),
    'a site of another Python': (FLOW + 'site.yml', "python-version: '3.", "python-version: '3.9", 'is not tested'),
    'an older Python in the text': ('CONTRIBUTING.md', 'Python 3.10 or newer', 'Python 3.9 or newer', 'CONTRIBUTING.md speaks'),
    'a release without a rule': (FLOW + 'release.yml', 'test "$GITHUB_REF_NAME" =', 'true "$GITHUB_REF_NAME" =', 'is let pass'),
    'a rule that nothing passes': (FLOW + 'release.yml', '"v$version" ||', '"w$version" ||', 'is refused'),
    'a command that is not there': ('CONTRIBUTING.md', '`make export`', '`make exports`', 'make exports is not'),
    'a command missing in a workflow': (FLOW + 'site.yml', 'run: make docs', 'run: make site', 'make site is not'),
    'a target that is gone': ('Makefile', '\noutputs:', '\nouts:', 'make outputs is not'),
    'a file that is not there': ('CONTRIBUTING.md', '`_quarto.yml`', '`_quatro.yml`', '_quatro.yml does not exist'),
    'a folder that is not there': ('CONTRIBUTING.md', '`nbs/`', '`notebooks/`', 'notebooks/ does not exist'),
    'a file missing in a form': (FORM + 'claim.yml', 'The chapter and', 'See nbs/99_claim.ipynb,', 'nbs/99_claim.ipynb does not exist'),
    'a folder missing for pull requests': ('.github/pull_request_template.md', '`gcnn_stn/`', '`src/`', 'src/ does not exist'),
    'a command missing for pull requests': ('.github/pull_request_template.md', '`make export`', '`make modules`', 'make modules is not'),
    'a folder missing in a workflow': (FLOW + 'site.yml', 'path: _docs', 'path: _site', '_site does not exist'),
    'a chapter that is not there': ('CHANGELOG.md', '(nbs/07_fold.ipynb)', '(nbs/07_unfold.ipynb)', 'nbs/07_unfold.ipynb does not exist'),
    'a chapter that no argument names': ('CONTRIBUTING.md', 'ARGS=03_kernel', 'ARGS=03_colonel', 'nbs/03_colonel.ipynb does not exist'),
    'a heading that is not there': ('CONTRIBUTING.md', '#a-chapter-of-your-own', '#a-chapter-of-mine', 'no such anchor'),
    'another version': ('settings.ini', f'version = {VERSION}', 'version = 9.9.9', 'the version 9.9.9'),
    'an older changelog': ('CHANGELOG.md', f'## [{VERSION}]', '## [0.0.1]', 'the newest is 0.0.1'),
    'nothing unreleased': ('CHANGELOG.md', '## [Unreleased]\n\n', '', 'unreadable'),
    'a release without a date': ('CHANGELOG.md', f'## [{VERSION}] - ', f'## [{VERSION}], ', 'unreadable'),
    'a release without a link': ('CHANGELOG.md', f'\n[{VERSION}]: ', '\n[x]: ', 'no link for'),
    'a kind of change that is not one': ('CHANGELOG.md', '### Added', '### New', 'New is no kind'),
    'a citation of another version': ('CITATION.cff', f'\nversion: {VERSION}', '\nversion: 0.0.1', "version is '0.0.1'"),
    'a citation without authors': ('CITATION.cff', 'authors:', 'writers:', 'no authors'),
    'a citation by somebody else': ('CITATION.cff', 'The gcnn_stn authors', 'Somebody', 'Somebody'),
    'a citation of another day': ('CITATION.cff', 'date-released: "20', 'date-released: "19', 'date-released is'),
    'a key nobody knows': ('CITATION.cff', 'abstract:', 'summary:', 'summary is unknown'),
    'a form without a name': (FORM + 'claim.yml', 'name: ', 'nom: ', 'claim.yml: no name'),
    'a form without a description': (FORM + 'feature.yml', '\ndescription: ', '\nabout: ', 'feature.yml: no description'),
    'a form without labels': (FORM + 'bug_report.yml', 'labels: [bug]', 'labels: []', 'no labels'),
    'a question without a label': (FORM + 'bug_report.yml', '      label: Versions\n', '', 'textarea without a label'),
    'a question of no kind': (FORM + 'claim.yml', 'type: dropdown', 'type: menu', 'menu is no type'),
    'an id twice': (FORM + 'claim.yml', 'id: why', 'id: where', "the id 'where' comes twice"),
    'a question twice': (FORM + 'bug_report.yml', 'label: What it prints', 'label: Versions', 'comes twice'),
    'an answer that is no text': (FORM + 'claim.yml', '- Something else', '- no', 'different texts'),
    'an answer twice': (FORM + 'claim.yml', "- A step doesn't follow", '- Something else', 'different texts'),
    'a line that misses its value': (FORM + 'claim.yml', 'value: |', 'text: |', 'without a value'),
    'an attribute nobody knows': (FORM + 'claim.yml', 'placeholder: ', 'hint: ', 'hint is unknown'),
    'a contact elsewhere': (FORM + 'config.yml', 'url: https://', 'url: https://www.', 'is no page'),
    'a contact without a sentence': (FORM + 'config.yml', '    about: ', '    text: ', 'wants a name'),
}


def test_without_fault(project): assert not complaints(project)


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_seen(name, project):
    path, old, new, complaint = FAULTS[name]
    text = (project/path).read_text()
    assert old in text, old
    (project/path).write_text(text.replace(old, new, 1))
    assert any(complaint in c for c in complaints(project)), complaints(project)
