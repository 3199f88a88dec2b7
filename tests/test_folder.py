"Folders as people have them: every format, name and oddity is read right, or refused with the file and the remedy."
import json, re, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lxml.html
import numpy as np
import pytest
import torch
from PIL import Image

import checks
from browser import CHROMIUM, browser
from gcnn_stn.data import rotate
from gcnn_stn.study.__main__ import main
from gcnn_stn.study.archive import record_fault
from gcnn_stn.study.compare import _how_read, read_picture
from gcnn_stn.study.data import described, load_dataset
from gcnn_stn.study.folder import load_folder
from gcnn_stn.study.grid import run_of
from gcnn_stn.study.train import predict
from gcnn_stn.study.unit import _sets, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))


SHAPE = 6, 8
NOISE = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), np.uint8)
GREY, DEEP = NOISE[..., 0], (NOISE[..., 0].astype(np.uint16)*257)
FLAT = np.uint8([[(200, 40, 90)]*4 + [(60, 160, 30)]*4]*6)  # what lossy formats keep


def image(array, mode=None):
    found = Image.fromarray(array)
    return found.convert(mode) if mode else found


def with_alpha(array, mode):
    found = image(array, mode)
    found.putalpha(Image.fromarray(np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(6, 0)))
    return found


def noted(note):
    exif = Image.Exif()
    exif[0x0112] = note
    return dict(exif=exif)


BLACKENED = NOISE*(np.arange(8) >= 4)[None, :, None].astype(np.uint8)
TURNS = {2: NOISE[:, ::-1], 3: NOISE[::-1, ::-1], 4: NOISE[::-1], 5: NOISE.swapaxes(0, 1), 6: np.rot90(NOISE, -1), 7: np.rot90(NOISE, 2).swapaxes(0, 1),
         8: np.rot90(NOISE)}
READ = { # file: picture, how it is saved, the pixels that are meant, how far off they may be
    'grey.png':          (image(GREY), {}, GREY, 0),
    'colours.png':       (image(NOISE), {}, NOISE, 0),
    'LOUD.PNG':          (image(NOISE), {}, NOISE, 0),
    'with blanks.png':   (image(NOISE), {}, NOISE, 0),
    'größe 数字.png':      (image(NOISE), {}, NOISE, 0),
    "it's; «odd»,.png":  (image(NOISE), {}, NOISE, 0),
    'dots.in.name.png':  (image(NOISE), {}, NOISE, 0),
    'transparent.png':   (with_alpha(NOISE, 'RGB'), {}, BLACKENED, 0),
    'grey alpha.png':    (with_alpha(GREY, 'L'), {}, BLACKENED[..., 0], 0),
    'palette.png':       (image(FLAT).quantize(8), {}, FLAT, 4),
    'one bit.png':       (image(GREY > 127), {}, 255*(GREY > 127).astype(np.uint8), 0),
    '16 bits.png':       (image(DEEP), {}, GREY, 0),
    'grey.jpg':          (image(FLAT[..., 0]), {}, FLAT[..., 0], 1),
    'colours.jpeg':      (image(FLAT), dict(quality=100, subsampling=0), FLAT, 3),
    'cmyk.jpg':          (image(FLAT, 'CMYK'), dict(quality=100), FLAT, 5),
    'colours.tif':       (image(NOISE), {}, NOISE, 0),
    'packed.tiff':       (image(NOISE), dict(compression='tiff_lzw'), NOISE, 0),
    '16 bits.tif':       (image(DEEP), {}, GREY, 0),
    'fractions.tif':     (image(GREY.astype(np.float32)/255), {}, GREY, 0),
    'cmyk.tif':          (image(FLAT, 'CMYK'), {}, FLAT, 1),
    'grey.bmp':          (image(GREY), {}, GREY, 0),
    'colours.bmp':       (image(NOISE), {}, NOISE, 0),
    'colours.webp':      (image(NOISE), dict(lossless=True), NOISE, 0),
    'transparent.webp':  (with_alpha(FLAT, 'RGB'), dict(lossless=True), FLAT*(np.arange(8) >= 4)[None, :, None].astype(np.uint8), 0),
    'still.gif':         (image(GREY), {}, GREY[..., None].repeat(3, 2), 0),
    'grey.pgm':          (image(GREY), {}, GREY, 0),
    'colours.ppm':       (image(NOISE), {}, NOISE, 0),
    **{f'note {note}.png': (image(NOISE), noted(note), meant, 0) for note, meant in TURNS.items()},
    'note 6.jpg':        (image(FLAT), noted(6) | dict(quality=100, subsampling=0), FLAT.swapaxes(0, 1), 3),
}


def save(path, picture, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **how)
    return path


def pixels(data):
    "All images of a set (N, H, W, C)."
    return torch.cat([data.train[0], data.test[0]]).movedim(1, -1).numpy().astype(int)


@pytest.fixture
def folder(tmp_path):
    "Two classes of two pictures each."
    for name in 'a/1', 'a/2', 'b/1', 'b/2': save(tmp_path/'tiles'/f'{name}.png', image(NOISE))
    return tmp_path/'tiles'


@pytest.mark.parametrize('name', READ)
def test_read(name, tmp_path):
    picture, how, meant, off = READ[name]
    for where in 'a', 'a/below', 'b', 'b/below': save(tmp_path/'tiles'/where/name, picture, **how)
    found = pixels(load_folder(tmp_path/'tiles'))
    meant = meant.reshape(*meant.shape[:2], -1).astype(int)
    assert found.shape == (4, *meant.shape) and abs(found - meant).max() <= off


@pytest.mark.parametrize('name', READ)
def test_read_alone(name, tmp_path):
    "The file that goes along with a network reads what the folder reads; compressed files are unpacked in two ways."
    picture, how, _, off = READ[name]
    for where in 'a', 'a/below', 'b', 'b/below': path = save(tmp_path/'tiles'/where/name, picture, **how)
    data = load_folder(tmp_path/'tiles')
    channels, h, w = data.shape
    found = read_picture(path, 'L' if channels == 1 else 'RGB', (w, h), 'cut', 'border', False)
    assert found.dtype == np.uint8 and abs(found.astype(int) - data.train[0][:1].numpy()).max() <= max(off, 1)


FITTED = dict(cut=dict(fit='cut'), pad=dict(fit='pad'), white=dict(fit='pad', fill=255), disc=dict(fit='cut', disc=True), both=dict(fit='pad', fill=9, disc=True))

@pytest.mark.parametrize('size', [(12, 12), (9, 20), (40, 32)], ids=str)
@pytest.mark.parametrize('fitted', FITTED)
def test_fit_alone(fitted, size, tmp_path):
    "Cut or padded, on any ground."
    how = FITTED[fitted]
    smooth = np.hypot(*np.mgrid[-9:9:30j, -3:20:24j]).astype(np.float32)*9
    for name in 'a/1', 'a/2', 'b/1', 'b/2': path = save(tmp_path/'tiles'/f'{name}.png', image(smooth.astype(np.uint8)))
    data = load_folder(tmp_path/'tiles', size, **how)
    run = SimpleNamespace(dataset=described(str(tmp_path/'tiles'), size=size, **how))
    data = SimpleNamespace(train=data.train, fill=data.fill if data.fill == 'border' else data.fill/255)      # as load_data has it
    found = read_picture(path, **_how_read(run, data))
    off = abs(found.astype(int) - data.train[0][:1].numpy())
    assert off.mean() < .6 and off.max() <= 1


def text(path): path.write_text('no picture')
def cut(path): path.write_bytes(path.read_bytes()[:-60])
def empty(path): path.write_bytes(b'')
def gone(path):
    path.unlink()
    path.symlink_to('nowhere.png')
def pages(path): Image.fromarray(NOISE).save(path, 'TIFF', save_all=True, append_images=[Image.fromarray(FLAT)])
def moving(path): Image.fromarray(GREY).save(path, 'GIF', save_all=True, append_images=[Image.fromarray(GREY.T[:6, :6])])
def bright(path): Image.fromarray(np.float32(GREY)).save(path, 'TIFF')
DAMAGES = text, cut, empty, gone, pages, moving, bright


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda d: d.__name__)
def test_damaged(damage, folder):
    damage(folder/'b'/'2.png')
    with pytest.raises(ValueError, match=r'b.2\.png must be a whole picture.*skip_corrupt=True'): load_folder(folder)
    save(folder/'b'/'3.png', image(NOISE))
    for _ in range(2):                                         # the second time from the cache
        with pytest.warns(UserWarning, match=r'left out as damaged: 1 .*2\.png'): found = load_folder(folder, skip_corrupt=True)
        assert len(pixels(found)) == 4 and (pixels(found) == NOISE).all()
    with pytest.raises(ValueError, match=r'b.2\.png'): load_folder(folder)


def hide(folder): text(folder/'a'/'.hidden.png')
def clutter(folder): (folder/'__MACOSX').mkdir(); text(folder/'a'/'Thumbs.db')
def notes(folder): text(folder/'a'/'readme.txt'); text(folder/'about.md')
def linked(folder): shutil.move(folder/'b', folder.parent/'elsewhere'); (folder/'b').symlink_to(folder.parent/'elsewhere')
def linked_file(folder): shutil.move(folder/'a'/'1.png', folder.parent/'x.png'); (folder/'a'/'1.png').symlink_to(folder.parent/'x.png')
def read_only(folder): folder.chmod(0o500)


@pytest.mark.parametrize('change', [hide, clutter, notes, linked, linked_file, read_only], ids=lambda c: c.__name__)
def test_passed_over(change, folder):
    change(folder)
    found = load_folder(folder)
    assert found.names == ('a', 'b') and len(pixels(found)) == 4 and (pixels(found) == NOISE).all()


def circle(folder): (folder/'a'/'up').symlink_to(folder)
def one_class(folder): shutil.rmtree(folder/'b')
def empty_class(folder): (folder/'c').mkdir()
def lonely(folder): save(folder/'c'/'1.png', image(NOISE))
def loose(folder): [shutil.move(p, folder) for p in (folder/'a').iterdir()]; shutil.rmtree(folder/'a'); shutil.rmtree(folder/'b')
def two_sizes(folder): save(folder/'a'/'3.png', image(NOISE[:5]))
def strangers(folder):
    for part in 'train', 'test':
        for p in 'a', 'b': shutil.copytree(folder/p, folder/part/p)
    shutil.copytree(folder/'a', folder/'test'/'c')
REFUSED = {
    circle: 'must not lead in a circle', one_class: 'at least two classes', empty_class: 'each class must have pictures, got none', lonely: 'at least two pictures',
    loose: 'a folder for each class', two_sizes: 'of one size, got 2 .*pass a size', strangers: r"got \['c'\] besides",
}


@pytest.mark.parametrize('change', REFUSED, ids=lambda c: c.__name__)
def test_refused(change, folder):
    change(folder)
    with pytest.raises(ValueError, match=REFUSED[change]): load_folder(folder)


TABLES = { # text, or what is said
    'plain':      ('path,label\n{0},x\n{1},x\n{2},y\n{3},y', None),
    'semicolons': ('path;label\n{0};x\n{1};x\n{2};y\n{3};y', None),
    'mark':       ('\ufefffile,class\n{0},x\n{1},x\n{2},y\n{3},y', None),
    'parts':      ('path,label,split\n{0},x,train\n{1},x,test\n{2},y,train\n{3},y,val', None),
    'no label':   ('path,label\n{0},x\n{1},', 'line 3 .*must name a file, a label'),
    'no file':    ('path,label\n{0},x\nnone.png,y', "line 3 .*none.png, which isn't there"),
    'no columns': ('{0},x\n{1},y', 'must have the columns path and label'),
    'no lines':   ('path,label\n', 'must name pictures, got none'),
    'odd part':   ('path,label,part\n{0},x,train\n{1},y,third', "line 3 .*'third'"),
    'some parts': ('path,label,part\n{0},x,train\n{1},y,', 'line 3'),
}


@pytest.mark.parametrize('name', TABLES)
def test_table(name, folder):
    content, said = TABLES[name]
    path = folder.parent/'table.csv'
    path.write_text(content.format(*(f'tiles/{f}.png' for f in ('a/1', 'a/2', 'b/1', 'b/2'))), encoding='utf-8')
    if said:
        with pytest.raises(ValueError, match=said): load_folder(path)
    else:
        found = load_dataset(path)
        assert found.names == ('x', 'y') and len(pixels(found)) + (len(found.valid[0]) if found.valid else 0) == 4


def test_kept(folder, tmp_path, monkeypatch):
    first = load_folder(folder)
    monkeypatch.setattr('gcnn_stn.study.folder._read', lambda *a: pytest.fail('read again'))
    assert load_folder(folder).hash == first.hash == load_folder(str(folder), split=0).hash
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    save(folder/'a'/'1.png', image(FLAT))
    assert load_folder(folder).hash != first.hash
    for p in (tmp_path/'cache').rglob('*.bytes'): p.write_bytes(p.read_bytes()[:100])   # damaged
    assert not load_folder(folder).hash == first.hash
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))                        # can't be written
    assert len(pixels(load_folder(folder))) == 4


def test_home(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder.parent))
    monkeypatch.chdir(folder.parent)
    there = {load_dataset(p).hash for p in ('~/tiles', 'tiles', './tiles', folder)}
    assert len(there) == 1


def test_statistics(tmp_path):
    "Trained on like any other set: the classes, the mean and the spread are those of the training images."
    for name, level in ('dark', 20), ('light', 220):
        for i in range(10): save(tmp_path/'tiles'/name/f'{i}.png', Image.fromarray(np.full((28, 28), level + i, np.uint8)))
    load_data.cache_clear()
    data = load_data(str(tmp_path/'tiles'))
    assert data.classes == 2 and abs(data.mean - load_folder(tmp_path/'tiles').train[0].double().mean()/255) < 1e-3


@pytest.fixture
def coloured(tmp_path):
    "Two classes of ten coloured pictures each."
    g = np.random.default_rng(0)
    for name, high in ('Dark Ones', 60), ('light', 256):
        for i in range(10): save(tmp_path/'My Tiles'/name/f'{i}.png', Image.fromarray(g.integers(0, high, (32, 30, 3), np.uint8)))
    return tmp_path/'My Tiles'


def test_study(coloured, tmp_path, monkeypatch, capsys):
    "A grid runs what it can, says what it leaves out, and finds its runs again; from wherever the folder is named."
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    how = ['--epochs', '1', '--jobs', '1', '--out', str(tmp_path/'out'), '--only', 'regime=upright,contender!=gcnn-c8,contender!=stcnn']
    for name in str(coloured), '~/My Tiles', 'My Tiles', './My Tiles':
        assert main(['--dataset', name, *how]) == 0
        said = capsys.readouterr()
        assert 'stcnn-published is left out: the published networks read grey images of ten classes, got 3 channels and 2 classes' in said.err
    runs = sorted(p.name for p in (tmp_path/'out'/'quick'/'runs').glob('*.json'))
    assert len(runs) == 2 and all(re.fullmatch(r'(cnn|gcnn-c4)-quick-my-tiles-[0-9a-f]{4}-n16-e1-upright-s0\.json', run) for run in runs)


def test_study_of_nothing(coloured, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for bad in './nowhere', str(coloured/'light'):
        assert main(['--dataset', bad, '--list']) == 2
        assert str(bad).lstrip('./') in capsys.readouterr().err


WHITE = np.full((28, 28), 255, np.uint8)
READINGS = { # how a folder of white squares of 28 × 40 pixels is read: shape, the pixels of a corner, of the middle, and of a turned corner
    '':                            ((28, 40), 255, 255, 255),
    'size=28':                     ((28, 28), 255, 255, 255),
    'size=28&fill=0':              ((28, 28), 255, 255, 0),
    'size=40&fit=pad&fill=7':      ((40, 40), 7, 255, 7),
    'size=40&fit=pad':             ((40, 40), 255, 255, 255),
    'size=28&disc=True':           ((28, 28), 0, 255, 0),
    'size=28&disc=True&fill=90':   ((28, 28), 90, 255, 90),
    'size=30x20':                  ((30, 20), 255, 255, 255),
}


@pytest.mark.parametrize('how', READINGS)
def test_how_it_is_read(how, tmp_path):
    for name in 'ab':
        for i in range(5): save(tmp_path/'tiles'/name/f'{i}.png', image(np.full((28, 40), 255 - (name == 'b') - i//4, np.uint8)))
    shape, corner, middle, turned = READINGS[how]
    name = f"{tmp_path/'tiles'}{'?' if how else ''}{how}"
    found = load_dataset(name)
    for x in found.train[0], found.test[0]:
        assert x.shape[2:] == shape and abs(x[..., 0, 0].int() - corner).max() <= 2 and abs(x[..., shape[0]//2, shape[1]//2].int() - middle).max() <= 2
    if min(shape) >= 28:
        data = load_data(name)
        eighth = rotate(data.train[0][:1], torch.tensor([45.]), found.fill)
        assert abs(eighth[..., 0, 0].int() - turned).max() <= 2 and data.fill == (found.fill if found.fill == 'border' else found.fill/255)
        assert predict(torch.nn.Flatten(), found.train[0][:1], degrees=torch.tensor([45.]), mean=0, std=1, fill=data.fill)[0, 0] == pytest.approx(turned/255, abs=.01)


@pytest.mark.parametrize('options, said', {
    '--size 0': 'size must be', '--size big': 'size must be', '--fit crop': "fit must be one of", '--fill 300': 'fill must be', '--fill grey': 'fill must be',
    '--disc --fill border': 'fill must be', '--digits 99': 'digits must be at most', '--quick': 'quick is for the grid compare'}.items())
def test_options_refused(options, said, coloured, tmp_path, capsys):
    assert main(['--dataset', str(coloured), *options.split(), '--out', str(tmp_path/'out')]) == 2
    assert said in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_parts(tmp_path, capsys):
    "What is set aside for validation is validated on, and what was turned in the originals is tested on."
    g = np.random.default_rng(0)
    for part, n in dict(train=12, valid=4, test=5).items():
        for name, high in ('dark', 90), ('light', 256):
            for i in range(n): save(tmp_path/'tiles'/part/name/f'{i}.png', image(g.integers(0, high, SHAPE, np.uint8)))
    shutil.copytree(tmp_path/'tiles/test', tmp_path/'tiles/test-turned')
    (tmp_path/'tiles/test-turned/dark/0.png').unlink()                      # not all need be there
    how = ['--dataset', str(tmp_path/'tiles'), '--epochs', '2', '--jobs', '1', '--out', str(tmp_path/'out'), '--only']
    assert main([*how, 'regime=upright,contender=cnn']) == 0
    record, = map(json.loads, map(Path.read_text, (tmp_path/'out/quick/runs').glob('*.json')))
    assert sum(map(sum, record['metrics']['confusion']['turned'])) == 9 and record['digits'] == 24 and record['config']['fill'] == 'border'
    assert 'turned in the originals' in capsys.readouterr().out and record_fault(record) is None
    data = load_data(record['dataset'])
    run = replace(run_of(record), valid=3)
    assert torch.equal(_sets(run)[1][1], data.valid[1]) and len(_sets(run)[0][1]) == 24


def test_report(coloured, tmp_path, capsys, request):
    "One command, one page: complete, with nothing from elsewhere, and a network that can be used."
    how = ['--dataset', str(coloured), '--grid', 'compare', '--quick', '--epochs', '1', '--jobs', '1', '--out', str(tmp_path/'out'), '--title', 'My <tiles>']
    assert main([*how, '--only', 'order!=8,model!=mixture']) == 0
    out, = (tmp_path/'out').iterdir()
    assert f"report: {out/'report.html'}" in capsys.readouterr().out
    page = lxml.html.fromstring((out/'report.html').read_bytes())
    assert page.xpath('//h1')[0].text == 'My <tiles>' and {'Dark Ones', 'light', 'GCNN C4', 'CNN, trained turned'} <= {*page.itertext()}
    assert not page.xpath('//script') and all(src.startswith('data:') for src in page.xpath('//@src')) and not page.xpath('//link')
    assert all(image.get('alt') for image in page.xpath('//img')) and len(page.xpath('//tr[@class="choice"]')) == 1
    if CHROMIUM:
        window = request.getfixturevalue('browser')
        for width in 1280, 390:
            window.open(out/'report.html', width=width)
            assert not checks.check_width(window, out/'report.html') + (checks.check_access(window, out/'report.html') if checks.AXE.exists() else [])
    picture = next(coloured.glob('light/*.png'))
    said = subprocess.run([sys.executable, out/'best/read.py', picture], capture_output=True, text=True, check=True).stdout
    assert said.startswith(str(picture)) and said.split()[-1] in ('Ones', 'light')
    (out/'report.html').unlink()
    assert main([*how, '--only', 'order!=8,model!=mixture']) == 0 and (out/'report.html').exists()    # from the records
