"The wheel builds in isolation and works in a clean environment with the newest fastcore."
import ast, os, subprocess, sys, sysconfig, venv, zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest

from book import ROOT, copy_project

SOURCES = 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'gcnn_stn'
PACKAGE = ROOT/'gcnn_stn'
MODULES = sorted(p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob('*.py'))

settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
COMMANDS = [command.split('=')[0] for command in settings['console_scripts'].split()]


def run(*command, cwd):
    "Run `command` away from the project; its output."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(project):
    "Build the sdist of `project`, then the wheel from the sdist, each in an environment of its own."
    run(sys.executable, '-m', 'build', str(project), cwd=project)
    return next((project/'dist').glob('*.whl'))


def missing(wheel):
    "What a user would miss in `wheel`."
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        entry_points = ''.join(z.read(n).decode() for n in names if n.endswith('.dist-info/entry_points.txt'))
    return ([n for n in MODULES if n not in names] + [c for c in [*COMMANDS, '[nbdev]'] if c not in entry_points]
            + ['LICENSE']*(not any(n.endswith('LICENSE') for n in names)))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory): return build(copy_project(tmp_path_factory.mktemp('source'), *SOURCES))


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    "A clean environment with the wheel and the newest fastcore; torch and the rest are borrowed from this one."
    home = tmp_path_factory.mktemp('clean')
    venv.create(home, with_pip=True)
    python = home/'bin'/'python'
    run(python, '-m', 'pip', 'install', 'fastcore', cwd=home)
    run(python, '-m', 'pip', 'install', '--no-deps', wheel, cwd=home)
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=home).strip()
    open(f'{site}/borrowed.pth', 'w').write(sysconfig.get_path('purelib'))
    return python


def test_contents(wheel): assert not missing(wheel)


def test_missing_command_is_seen(tmp_path):
    "A `pyproject.toml` that doesn't list the scripts as dynamic loses the commands without a word."
    project = copy_project(tmp_path, *SOURCES)
    table = project/'pyproject.toml'
    table.write_text(table.read_text().replace(', "scripts", "entry-points"', ''))
    assert set(COMMANDS) <= set(missing(build(project)))


@pytest.mark.parametrize('module', MODULES)
def test_import(module, python, tmp_path):
    name = module.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    where = run(python, '-c', f'import {name} as m, fastcore; print(m.__file__, fastcore.__file__)', cwd=tmp_path)
    assert where.count(str(python.parent.parent)) == 2


@pytest.mark.parametrize('command', COMMANDS)
def test_command(command, python, tmp_path):
    assert 'usage' in run(python.with_name(command), '--help', cwd=tmp_path)


def test_study_as_a_module(python, tmp_path):
    said = run(python, '-m', 'gcnn_stn.study', '--help', cwd=tmp_path)
    assert said.startswith('usage: gcnn_stn_study')


def imports(module):
    "Top-level names that `module` imports, wherever it does."
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import): yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


def test_requirements():
    "settings.ini requires whatever the package imports, or offers it as an extra."
    used = {name for p in PACKAGE.rglob('*.py') for name in imports(p)} - sys.stdlib_module_names - {'gcnn_stn'}
    owners = packages_distributions()
    required = {r.split('>')[0] for key in settings if key.endswith('requirements') and key != 'dev_requirements' for r in settings[key].split()}
    assert {owners[name][0].lower() for name in used} <= required
