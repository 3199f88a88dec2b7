"Notebooks are clean, and the package is exactly what they export."
import ast, filecmp, json, re

import pytest

from book import ROOT, chapters, copy_project, python


def files(project):
    found = [p.relative_to(project) for folder in ('nbs', 'gcnn_stn') for p in (project/folder).rglob('*')]
    return {p for p in found if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts}


def same(a, b): return a.exists() and b.exists() and filecmp.cmp(a, b, shallow=False)


def drift(project, scratch):
    "Files of `project` that would change, come or go if its notebooks were cleaned and exported anew."
    fresh = copy_project(scratch, 'settings.ini', 'pyproject.toml', 'nbs', root=project)
    python('from nbdev.clean import nbdev_clean; nbdev_clean(); from nbdev.doclinks import nbdev_export; nbdev_export()', fresh)
    return {str(f) for f in files(project) | files(fresh) if not same(project/f, fresh/f)}


def test_in_step(tmp_path):
    assert not drift(ROOT, tmp_path), 'run `make export`'


def stain(project):
    notebook = project/'nbs'/'foundations/data.ipynb'
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 7', 1))


def edit_module(project): (project/'gcnn_stn'/'data.py').open('a').write('\n')
def add_module(project): (project/'gcnn_stn'/'orphan.py').touch()
def lose_module(project): (project/'gcnn_stn'/'data.py').unlink()


@pytest.mark.parametrize('fault, named', [
    (stain, 'nbs/foundations/data.ipynb'), (edit_module, 'gcnn_stn/data.py'), (add_module, 'gcnn_stn/orphan.py'), (lose_module, 'gcnn_stn/data.py')])
def test_drift_is_seen(fault, named, tmp_path):
    project, scratch = tmp_path/'project', tmp_path/'scratch'
    for folder in (project, scratch): folder.mkdir()
    copy_project(project, 'settings.ini', 'pyproject.toml', 'nbs', 'gcnn_stn')
    fault(project)
    assert named in drift(project, scratch)


def mixed(notebook):
    "Cells with imports and something else, which nbdev runs whenever it makes a page; `exec_doc` says that it may."
    for cell in json.loads(notebook.read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.search(r'#\| (eval: false|exec_doc)', source): continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        if len(kinds) == 2: yield f"{notebook.name}: {cell['id']}"


def test_imports_have_cells_of_their_own(tmp_path):
    assert not [c for notebook in chapters(ROOT/'nbs') for c in mixed(notebook)]
    cell = dict(cell_type='code', id='faulty', source='import os\nprint(os.sep)')
    (tmp_path/'one.ipynb').write_text(json.dumps(dict(cells=[cell])))
    assert [*mixed(tmp_path/'one.ipynb')] == ['one.ipynb: faulty']


def shared(index):
    "Public names that several modules have: pages link a name, and show a dataclass, by its name alone. (Commands may all be `main`.)"
    homes = {}
    for module, names in index.items():
        for name in names:
            short = name.removeprefix(f'{module}.')
            if '.' not in short and not short.startswith('_') and short != 'main': homes.setdefault(short, []).append(module)
    return {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_names_are_unique():
    from gcnn_stn._modidx import d
    assert not shared(d['syms'])
    assert shared({'a': {'a.Run': (), 'a._of': (), 'a.main': ()}, 'b': {'b.Run': (), 'b._of': (), 'b.main': (), 'b.Run.go': ()}}) == {'Run': ['a', 'b']}
