"The playthings do in a real browser what Python says they do: Chromium, driven over a pipe."
import re
from collections import Counter

import pytest
import torch

from book import ROOT, pandoc, to_markdown
from browser import browser, needs_chromium
from gcnn_stn.data import mnist, normalize, rotate
from gcnn_stn.evidence.figure import Evidence
from gcnn_stn.group import CyclicGroup
from gcnn_stn.kernel import basis_operator
from gcnn_stn.evidence.play import (copy_errors, edge_kernel, kernel_explorer,
                                    orientation_dial)
from gcnn_stn.evidence.flip import write_page
from gcnn_stn.study.grid import GRIDS, select
from gcnn_stn.study.unit import load_run

pytestmark = needs_chromium
LIMIT = 300_000   # bytes


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    "Both playthings, each as a page of its own."
    folder = tmp_path_factory.mktemp('pages')
    things = {'dial': orientation_dial(Evidence(ROOT/'results')), 'explorer': kernel_explorer()}
    return {name: write_page(thing, folder/f'{name}.html', name) for name, thing in things.items()}


@pytest.fixture(scope='module')
def chapter(tmp_path_factory):
    "The chapter as a page, the committed outputs in it, under the class that Quarto gives to its dark theme."
    folder = tmp_path_factory.mktemp('chapter')
    html = pandoc(to_markdown(ROOT/'nbs'/'play.ipynb', folder/'figures'), 'html')
    path = folder/'play.html'
    path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
                    f'<title>play</title><style>body{{background:#222;color:#fff}} pre{{overflow:auto}} table,code{{overflow-wrap:anywhere}}</style><body class="quarto-dark">{html}')
    return path


def text(browser, selector): return browser.js(f'document.querySelector({selector!r}).textContent')
def focused(browser): return browser.js('document.activeElement.closest("label")?.textContent.trim().split(/\\s/)[0]')


def tab_to(browser, name):
    "Go to a control as a keyboard does."
    for _ in range(200):
        browser.press('Tab')
        if focused(browser) == name: return
    raise AssertionError(f'{name} is not to be reached by keyboard')


def said_by_nets(index, degrees):
    "What the dial should say of a test digit, from the weights, by hand."
    images, found = mnist(train=False)[0][[index, index]], []
    x = normalize(rotate(images, torch.tensor([0., degrees])))
    for contender, regime in (('gcnn-c8', 'upright'), ('stcnn', 'upright'), ('stcnn', 'rotated')):
        net = load_run(select(GRIDS['small'].runs(), f'contender={contender},regime={regime},seed=0')[0], ROOT/'results')
        with torch.no_grad(): p, e = net(x).softmax(1)[1], net.embed(x)
        found.append((f'{p.argmax().item()} ({p.max().item():.0%})', f'{((e[1] - e[0]).norm()/e[0].norm()).item():.0%}'))
    return found


def test_dial(browser, pages):
    "Turned by keyboard, it says what the networks say."
    browser.open(pages['dial'])
    for presses, degrees in ((0, 45), (2, 75), (7, 180)):                       # one more step of 15° with each press
        tab_to(browser, 'Angle')
        browser.press('ArrowRight', presses)
        assert browser.js('document.activeElement.value') == str(degrees)
        said = text(browser, 'output')
        assert said.startswith(f'Digit 4, turned by {degrees}°.')
        assert re.findall(r'reads (\d \(\d+%\)); its embedding has moved by (\d+%)', said) == said_by_nets(4, degrees)    # test digit 4 is a 4
        browser.js('document.activeElement.blur()')
    before = browser.js('getComputedStyle(document.querySelector(".map")).backgroundPosition')
    tab_to(browser, 'Digit')
    browser.press('ArrowDown')
    assert text(browser, 'output').startswith('Digit 6, turned by 180°.')       # the first 6 is test digit 11
    assert re.findall(r'reads (\d \(\d+%\)); its embedding has moved by (\d+%)', text(browser, 'output')) == said_by_nets(11, 180)
    assert browser.js('getComputedStyle(document.querySelector(".map")).backgroundPosition') != before
    assert not browser.complaints()


def test_grid_and_bars(browser, pages):
    "What is drawn is what is said."
    browser.open(pages['dial'], still=True)
    browser.js('''const dial = document.querySelector('input'); dial.value = 120; dial.dispatchEvent(new Event('input', {bubbles: true}))''')
    for i, key in enumerate('ur'):
        angle, way = re.match(r'(\d+)° (.+)', text(browser, f'[data-bind="text={key}turn"]')).groups()
        matrix = browser.js(f'(m => [m.a, m.b])(new DOMMatrix(getComputedStyle(document.querySelectorAll(".pair svg")[{i}]).transform))')
        turned = torch.rad2deg(torch.atan2(torch.tensor(matrix[1]), torch.tensor(matrix[0]))).item()          # clockwise on the screen
        assert abs(turned - (int(angle) if way == 'counter-clockwise' else -int(angle))) < .01                  # the grid turns against the image
    heights = browser.js('[...document.querySelectorAll(".bars")].map(bars => [...bars.children].map(bar => parseFloat(getComputedStyle(bar, "::before").height)))')
    labels = browser.js('[...document.querySelectorAll(".bars")].map(bars => bars.getAttribute("aria-label"))')
    for bars, label in zip(heights, labels):
        shares = {int(k): int(p) for p, k in re.findall(r'(\d+)% for (\d)', label)}
        assert max(range(10), key=bars.__getitem__) == max(shares, key=shares.get)
    assert not browser.complaints()


def test_explorer(browser, pages):
    "Chosen by keyboard, it says the error of that kernel."
    browser.open(pages['explorer'])
    def shown(): return text(browser, 'output'), browser.js('document.querySelector(".chart").getAttribute("aria-label")')
    for presses, (basis, order, k) in (({}, ('bilinear', 8, 5)), ({'Basis': ('ArrowUp', 2)}, ('harmonic', 8, 5)), ({'Size': ('ArrowDown', 1), 'Group': ('ArrowDown', 1)}, ('harmonic', 12, 7))):
        for name, (key, times) in presses.items(): tab_to(browser, name); browser.press(key, times); browser.js('document.activeElement.blur()')
        R = basis_operator(CyclicGroup(order), k, basis)
        said, errors = shown()
        assert said.startswith(f'{basis.capitalize()} basis, {order} copies, {k} × {k} pixels: {R.shape[1]} weights')
        percent = [0. if e == 'exact' else float(e[:-1])/100 for e in re.findall(r'° ([\d.]+%|exact)', errors)]
        assert percent == pytest.approx(copy_errors(R, edge_kernel(R)), abs=6e-4)
        assert browser.js('[...document.querySelectorAll(".copy")].filter(copy => copy.offsetWidth).length') == order
    assert not browser.complaints()


@pytest.mark.parametrize('name', ['dial', 'explorer'])
@pytest.mark.parametrize('width', [360, 1000])
@pytest.mark.parametrize('dark', [False, True])
def test_layout(browser, pages, name, width, dark, tmp_path):
    "Nothing is cut off, and day and night differ."
    browser.open(pages[name], width, dark)
    assert browser.js('document.documentElement.scrollWidth') <= width
    assert browser.js('document.querySelector(".controls").offsetHeight > 0 && document.querySelector(".still").offsetHeight == 0')
    ink = browser.js('getComputedStyle(document.body).color')
    assert browser.js('getComputedStyle(document.querySelector(".flip")).colorScheme') == 'light dark' and ink == ('rgb(255, 255, 255)' if dark else 'rgb(0, 0, 0)')
    assert browser.picture(tmp_path/'page.png').stat().st_size > 10_000
    assert not browser.complaints()


@pytest.mark.parametrize('name', ['dial', 'explorer'])
def test_still(browser, pages, name, tmp_path):
    "Without JavaScript: no dead controls, but the picture and its sentence."
    browser.open(pages[name])
    said = text(browser, 'output')
    controls = browser.js('document.querySelector(".controls").offsetHeight')
    live = browser.picture(tmp_path/'live.png')
    browser.open(pages[name], script=False)
    tree = {(n['role']['value'], n.get('name', {}).get('value', '')) for n in browser('Accessibility.getFullAXTree')['nodes'] if not n['ignored']}
    assert controls and not {role for role, _ in tree} & {'slider', 'combobox'}
    assert any(said in n for _, n in tree) and any('A still' in n for _, n in tree)
    assert abs(browser.picture(tmp_path/'still.png').stat().st_size/live.stat().st_size - 1) < .25     # as much to see
    assert not browser.complaints()


@pytest.mark.parametrize('name, controls', [('dial', {('combobox', 'Digit'), ('slider', 'Angle')}), ('explorer', {('combobox', 'Basis'), ('combobox', 'Group'), ('combobox', 'Size')})])
def test_heard(browser, pages, name, controls):
    "What a screen reader gets to know: names of controls, of all pictures, and news."
    browser.open(pages[name])
    nodes = [n for n in browser('Accessibility.getFullAXTree')['nodes'] if not n['ignored']]
    def named(*roles): return {(n['role']['value'], n['name']['value']) for n in nodes if n['role']['value'] in roles}
    assert named('combobox', 'slider') == controls
    assert all(label for _, label in named('image')) and named('image')
    assert browser.js('document.querySelector("output").getAttribute("aria-live")') == 'polite'
    if name == 'dial':
        assert browser.js('document.querySelector("input").getAttribute("aria-valuetext")') == '45 degrees counter-clockwise'
        heard = named('image')
        browser.js('document.querySelector("input").focus()'); browser.press('End')
        nodes = [n for n in browser('Accessibility.getFullAXTree')['nodes'] if not n['ignored']]
        assert named('image') != heard and browser.js('document.querySelector("input").getAttribute("aria-valuetext")') == '345 degrees counter-clockwise'


def test_manners(browser, pages):
    "A focus that is seen, and no motion for those who want none."
    for still in (False, True):
        browser.open(pages['dial'], still=still)
        assert browser.js('parseFloat(getComputedStyle(document.querySelector(".pair svg")).transitionDuration) == 0') == still
    tab_to(browser, 'Angle')
    assert browser.js('parseFloat(getComputedStyle(document.activeElement).outlineWidth)') >= 2
    for path in pages.values():
        assert path.stat().st_size <= LIMIT
        assert not re.search(r'https?:|@import|\bsrc=', path.read_text())


@pytest.mark.parametrize('width', [360, 1000])
def test_chapter(browser, chapter, width):
    "In the chapter both work side by side, in Quarto's dark theme by day; no id is used twice."
    browser.open(chapter, width)
    assert browser.js('document.querySelectorAll(".flip[data-live]").length') == 2
    assert browser.js('[...document.querySelectorAll(".flip")].every(f => getComputedStyle(f).colorScheme == "dark" && f.scrollWidth <= innerWidth)')
    ids = browser.js('[...document.querySelectorAll("[id]")].map(node => node.id)')
    assert not [i for i, n in Counter(ids).items() if n > 1]
    assert browser.js('[".wheel", ".pair", ".chart", ".copies"].every(part => document.querySelector(part).getBoundingClientRect().height > 100)')   # neither spoils the other's style
    assert browser.js('[...document.querySelectorAll(".flip")].every(f => !f.querySelector("[id], .math, mjx-container"))')
    for name in ('Angle', 'Size'):
        said = browser.js('[...document.querySelectorAll("output")].map(o => o.textContent)')
        tab_to(browser, name); browser.press('ArrowRight' if name == 'Angle' else 'ArrowDown')
        changed = [a != b for a, b in zip(said, browser.js('[...document.querySelectorAll("output")].map(o => o.textContent)'))]
        assert changed == [name == 'Angle', name == 'Size']                     # each moves its own
    assert not browser.complaints()
    assert (ROOT/'nbs'/'play.ipynb').stat().st_size < 1e6


def test_faults_are_seen(browser, pages, tmp_path):
    "The checks can fail."
    for fault in ('<script>throw Error("no")</script>', '<script>console.error("no")</script>', '<img alt="no" src="nowhere.png">'):
        path = tmp_path/'faulty.html'
        path.write_text(pages['explorer'].read_text() + fault)
        browser.open(path)
        assert browser.complaints(), fault
