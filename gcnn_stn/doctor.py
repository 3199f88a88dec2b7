"""proto"""
# %% f37e9e45
import copy, inspect, itertools, math
from dataclasses import dataclass, replace
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import Tensor, nn
from gcnn_stn.group import FiniteGroup, act
from gcnn_stn.model import unwrapped
from gcnn_stn.sizes import check_sizes
from gcnn_stn.trace import FAILURES, all_tensors, Point, Reading, Step, attempt, between_turns, border_mean, move_maps, relative, settled, trace, vector_readings

# %% 9d022bc6
@patch
def breaks(self:Step, z, run=None, out=None):
    "Does it fail where nothing is interpolated? (In a group without such elements: above its floor?)"
    elements = self.exact or self.between
    allowed = [self.rounding(z, run)]*len(elements) if self.exact else self.floor(z, elements, run)
    return not all(e <= a for e, a in zip(self.errors(z, elements, run, out), allowed))

@patch
def own(self:Step):
    "Its worst error, on noise or where nothing is exact on smooth sources."
    if 'own' not in self.answers:
        z = self.noise()
        self.answers['own'] = max(self.errors(z, self.exact or self.between)), self.rounding(z)
    return self.answers['own']

@patch
def respects(self:Step, violation):
    "Is a rule kept so well that breaking it can't be the fault: to a twentieth of the step's own error?"
    own, rounding = self.own()
    return violation <= max(rounding, own/20)

# %% offset
@patch
def without_offset(self:Step):
    "f − f(0): what it makes of something, without what it says about nothing."
    def run(*z):
        return self.run(*z) - self.run(*[torch.zeros_like(t) for t in z])
    return run

@patch
def only_offset(self:Step):
    "Does only what it says about nothing break the rule?"
    z = self.noise()
    nothing = [torch.zeros_like(t) for t in z]
    return self.breaks(nothing) and not self.breaks(z, self.without_offset())

# %% 5d83e0ea
@patch
def other_size(self:Step, most=4):
    "The smallest change of size that makes it exact, or None."
    if not self.size():
        return None
    def works(d):
        return min(self.size()) + d > 1 and attempt(lambda: not self.breaks(self.noise(d)))
    changes = [d for n in range(1, most + 1) for d in (n, -n)]
    return next((d for d in changes if works(d)), None)

# %% 077b9ecd
@patch
def additive(self:Step):
    "Is f(a + b) − f(0) = f(a) − f(0) + f(b) − f(0)?"
    f, a, b = self.without_offset(), self.noise(seed=1), self.noise(seed=2)
    return self.respects(self.compare(f(*a) + f(*b), f(*[s + t for s, t in zip(a, b)])))

@patch
def scale_free(self:Step):
    "Do large sources, ten times larger, give the same answer, or the same times much less than ten?"
    f, z = self.without_offset(), self.noise()
    small, large = f(*[1e3*t for t in z]), f(*[1e4*t for t in z])
    factor = ((small*large).sum()/small.square().sum()).item()
    return 0 < factor < 5 and self.respects(self.compare(large, factor*small))

@patch
def _on_places(self:Step, z, f): # f applied to every source that has places
    return [p.reading.pack(f(p.reading.unpack(t))) if p.spatial else t for p, t in zip(self.sources, z)]

@patch
def rate(self:Step, more=16):
    "How many pixels of the answer there are to one of the source."
    if not self.point.spatial or not self.size():
        return 1
    now = self.point.maps.shape[-1]
    grown = attempt(lambda: self.reading.unpack(self.run(*self.noise(more))).shape[-1] - now)
    return grown/more if grown else now/self.size()[-1]

@patch
def stride(self:Step):
    "How many pixels of the source there are to one of the answer, at least one."
    return max(1, round(1/self.rate()))

@patch
def zoom(self:Step):
    "How many pixels of the answer there are to one of the source, at least one."
    return max(1, round(self.rate()))

# %% d4638be0
@patch
def shifts(self:Step):
    "Does a patch of noise, moved away from the centre on an empty ground, give an answer moved along?"
    wide = -8*(min(0, min(self.size()) - 40)//8)         # on a wide ground, if it can be
    violation = attempt(lambda: self._shifted(wide))
    return self.respects(self._shifted(0) if violation is None else violation)

@patch
def _shifted(self:Step, extra):
    def patch_of(u):
        m, (H, W) = torch.zeros_like(u), u.shape[-2:]
        m[..., 3*H//8:H - 3*H//8, 3*W//8:W - 3*W//8] = 1
        return u*m
    def slide(u, n):
        return u.roll((n, n), (-2, -1))
    z, s, r = self._on_places(self.noise(extra), patch_of), self.stride(), self.zoom()
    n = max(1, (min(self.size()) + extra)//6//s)
    y, there = self.run(*z), self.run(*self._on_places(z, lambda u: slide(u, s*n)))
    back = self.reading.pack(slide(self.reading.unpack(y), r*n)) if self.point.spatial else y
    return self.compare(there, back)

# %% b89cbd14
@patch
def pointwise(self:Step):
    "Does a number of the source reach only the numbers in the same place of the answer?"
    if not self.point.spatial or self.stride() > 1:
        return False
    def poke(u):
        u, (H, W) = u.clone(), u.shape[-2:]
        u[..., H//2, W//2] += 1 + u.abs().max()
        return u
    z = self.noise()
    change = self.reading.unpack(self.run(*self._on_places(z, poke)) - self.run(*z)).abs().flatten(0, -3).amax(0)
    H, W = change.shape
    hit = change[H//2, W//2].item()
    change[H//2, W//2] = 0
    return change.max().item() <= 1e-5*hit

# %% norms
@patch
def flips(self:Step):
    "Numbers change signs so that no mean and no variance notices: does the answer change there only?"
    i = next((i for i, p in enumerate(self.sources) if p.spatial and min(p.maps.shape[-2:]) > 1), None)
    if i is None or not self.point.spatial or self.point.maps.shape != self.sources[i].maps.shape:
        return False
    maps = self.sources[i].maps.shape[1:-2]
    ends = itertools.product(*[sorted({0, n - 1}) for n in maps])
    return any(self._flipped(i, {(0,)*len(maps), other}) for other in ends)

@patch
def _flipped(self:Step, i, maps):
    "Four neighbours in these maps of source i, of opposite signs in place and from map to map, change them all."
    z, r = self.noise(), self.sources[i].reading
    h, w = (n//2 - 1 for n in self.sources[i].maps.shape[-2:])
    block = torch.tensor([[1., -1.], [-1., 1.]]).to(z[i])*z[i].abs().mean()
    def probe(sign):
        u = r.unpack(z[i]).clone()
        for n, m in enumerate(sorted(maps)):
            u[(0, *m)][h:h + 2, w:w + 2] = sign*(-1)**n*block
        return [*z[:i], r.pack(u), *z[i + 1:]]
    change = self.reading.unpack(self.run(*probe(1)) - self.run(*probe(-1))).abs()
    hit = 0
    for m in maps:
        there = change[(0, *m)][h:h + 2, w:w + 2]
        hit = max(hit, there.max().item())
        there.zero_()
    return change.max().item() <= 1e-5*hit

@patch
def by_number(self:Step):
    "Does a number of the source reach one number of the answer only?"
    z = self.noise()
    more = z[0].clone()
    place = tuple(n//2 for n in more.shape)
    more[place] += 1 + more.abs().max()
    change = (self.run(more, *z[1:]) - self.run(*z)).abs().flatten().sort(descending=True)[0]
    return len(change) == 1 or change[1].item() <= 1e-5*change[0].item()

@patch
def rearranges(self:Step):
    "Does the answer hold the numbers of its source in other places?"
    z = self.noise()
    y = self.run(*z)
    return len(z) == 1 and y.numel() == z[0].numel() and relative(y.flatten().sort()[0], z[0].flatten().sort()[0]) < 1e-6

# %% 3e100cee
@patch
def lopsided(self:Step):
    "Is it exact once the first, or the last, row and column of the answer are left out?"
    if not self.size() or not self.point.spatial or min(self.point.maps.shape[-2:]) < 4:
        return False
    return any(attempt(lambda: not self.breaks(self.noise(), self.cut(*sides))) for sides in ((0, 1), (1, 0)))

@patch
def cut(self:Step, first, last):
    "The step, with so many rows and columns of its answer left out."
    def run(*z):
        u = self.reading.unpack(self.run(*z))
        return self.reading.pack(F.pad(u, (-first, -last)*2) if u.ndim > 3 else u)
    return run

# %% 70b16435
@patch
def edge_only(self:Step, margin=8):
    "Is it exact far from the border, `margin` pixels and more?"
    if not self.size() or not self.point.spatial or not self.exact:
        return False
    z = self.noise(2*margin)
    grown = self.reading.unpack(self.run(*z)).shape[-1] - self.point.maps.shape[-1]
    return grown % 2 == 0 and max(self.errors(z, self.exact, crop=grown//2)) <= self.rounding(z)

@patch
def off_centre(self:Step, margin=8):
    "By how many pixels must a turned source be moved for the answer to be exact far from the border? None if that doesn't help."
    if not self.size() or not self.point.spatial or not self.exact:
        return None
    z = self.noise(2*margin)
    y, allowed = self.run(*z), self.rounding(z)
    grown = self.reading.unpack(y).shape[-1] - self.point.maps.shape[-1]
    def exact(g, move):
        there = self.run(*self._on_places(self.moved(g, z), lambda u: u.roll(move, (-2, -1))))
        return self.compare(there, self.turned(g, y), g, crop=grown//2) <= allowed
    moves = [(a, b) for a in range(-2, 3) for b in range(-2, 3)]
    found = []
    for g in self.exact:
        found.append(next((m for m in moves if exact(g, m)), None))
        if found[-1] is None:
            return None
    return max(found) if any(map(any, found)) else None

# %% 17e73a68
@patch
def posed(self:Step):
    "Which sources have poses."
    return [i for i, p in enumerate(self.sources) if p.maps.ndim in (3, 5) and p.reading.frequency is None]

@patch
def without_places(self:Step):
    "Sources of which every map is a constant."
    return self._on_places(self.noise(), lambda u: u[..., :1, :1].expand(u.shape).clone())

@patch
def prefers_poses(self:Step):
    "Given maps that are one constant each, does the middle of its answer, far from any border, break the rule?"
    z, r = self.without_places(), self.reading
    def mean(t):
        u = r.unpack(t)
        H, W = u.shape[-2:]
        return u[..., H//3:H - H//3, W//3:W - W//3].mean((-2, -1)) if u.ndim > 3 else u
    y = self.run(*z)
    def error(g):
        return relative(mean(self.run(*self.moved(g, z))), mean(self.turned(g, y)))
    return max(map(error, self.exact or self.between)) > self.rounding(z)

# %% 0f12c872
@patch
def without_poses(self:Step):
    "Sources with all poses alike."
    def alike(u):
        return u[:, :, :1].expand(u.shape).clone() if u.ndim in (3, 5) else u
    return [p.reading.pack(alike(p.reading.unpack(t))) for p, t in zip(self.sources, self.noise())]

@patch
def influence(self:Step):
    "How strongly each pose of the source (rows) reaches each pose of the answer (columns; one if it has none)."
    i, z, r, rows = self.posed()[0], self.noise(), self.reading, []
    y, source = r.unpack(self.run(*z)), self.sources[i].reading
    for h in self.group.elements():
        u = source.unpack(z[i]).clone()
        u[:, :, h] = .5 - u[:, :, h]
        d = (r.unpack(self.run(*z[:i], source.pack(u), *z[i + 1:])) - y).abs()
        by_pose = d.transpose(0, 2) if d.ndim in (3, 5) and r.frequency is None else d[None]
        rows.append(by_pose.flatten(1).amax(1))
    return torch.stack(rows)

# %% 2bff4fcf
@patch
def backwards(self:Step):
    "For sources alike in all poses: is it exact if the answer's poses are counted the other way round?"
    G, r = self.group, self.reading
    def out(g, y):
        u = r.unpack(y)[:, :, G.table[:, g]]
        return r.pack(act(G, g, u.flatten(1, 2)).unflatten(1, u.shape[1:3]))
    return self.places and self.point.maps.ndim == 5 and not self.breaks(self.without_poses(), out=out)

@patch
def shelved(self:Step):
    "Is it exact if the answer's poses and channels are taken out in the other order?"
    r, G = self.reading, self.group
    if self.point.maps.ndim not in (3, 5):
        return False
    plain = Reading('')
    def moved(unpack, pack):
        return lambda g, y: r.pack(pack(plain.move(G, g, unpack(r.unpack(y)), self.places)))
    def into(u):
        return u.flatten(1, 2).unflatten(1, (G.order, -1)).transpose(1, 2)
    def out_of(u):
        return u.transpose(1, 2).flatten(1, 2).unflatten(1, (-1, G.order))
    return not all(self.breaks(self.noise(), out=moved(*f)) for f in ((into, out_of), (out_of, into)))

# %% c0b8ba8c
@patch
def right_sided(self:Step):
    "For sources without places: does it commute with poses multiplied from the right?"
    z, G = self.without_places(), self.group
    def times(p, t, g):
        u = p.reading.unpack(t)
        return p.reading.pack(u[:, :, G.table[:, g]] if u.ndim in (3, 5) else u)
    def error(g):
        there = self.run(*[times(p, t, g) for p, t in zip(self.sources, z)])
        return self.compare(there, times(self.point, self.run(*z), g))
    return max(map(error, G.elements())) <= self.rounding(z)

# %% spark
@patch
def spark(self:Step, extra=0, pose=0):
    "What one faint pixel in the middle of an even ground, alike in all poses, adds to the answer (unpacked)."
    ground = []
    for p in self.sources:
        u = p.maps
        mean = u.mean((*range(2, u.ndim),), keepdim=True).expand(*u.shape[:-2], *(n + extra for n in u.shape[-2:])).clone() if p.spatial else u.clone()
        if u.ndim == 3:
            mean = u.mean(2, keepdim=True).expand(u.shape).clone()
        ground.append(mean)
    i = next(i for i, p in enumerate(self.sources) if p.spatial)
    lit = [u.clone() for u in ground]
    H, W = lit[i].shape[-2:]
    place = lit[i][:, :, pose] if i in self.posed() else lit[i]
    size = torch.linspace(1, 2, place.shape[1]).to(place)*max(1e-3, self.sources[i].maps.std(correction=0).item())*1e-2
    place[..., H//2, W//2] += size
    def answer(us):
        return self.reading.unpack(self.run(*[p.reading.pack(u) for p, u in zip(self.sources, us)]))
    return answer(lit) - answer(ground)

@patch
def sparks_differ(self:Step):
    "Where nothing is interpolated: does what one faint pixel adds break the rule?"
    d, G, r, posed = self.odd_canvas(), self.group, self.reading, bool(self.posed())
    first = r.pack(self.spark(d, G.identity))
    return any(self.compare(r.pack(self.spark(d, g)) if posed else first, self.turned(g, first)) > 1e-4 for g in self.exact)

@patch
def odd_canvas(self:Step, least=9):
    "How many pixels to add for a square of odd side on which its answer has a middle, too; None if there is none."
    if not self.size() or not self.point.spatial or self.size()[0] != self.size()[1]:
        return None
    first = max(0, least - self.size()[0])
    def odd(d):
        y = attempt(lambda: self.reading.unpack(self.run(*self.noise(d))))
        return (self.size()[0] + d) % 2 == 1 and y is not None and y.shape[-1] % 2 == 1
    return next((d for d in range(first, first + 6) if odd(d)), None)

# %% copies
def _waves(size, most=4):
    "Waves round the middle of a square, e^{-imφ}, in rings about a pixel wide (rings, 2·most + 1, size, size)."
    p = torch.arange(size, dtype=torch.float64, device='cpu') - (size - 1)/2
    r, phi = torch.hypot(p, -p[:, None]), torch.atan2(-p[:, None], p)
    rings = torch.exp(-(r - torch.arange(size//2 + 1.)[:, None, None])**2)
    m = torch.arange(-most, most + 1)[:, None, None]
    return rings[:, None]*torch.exp(-1j*m*phi)

def _likeness(group, filters, others):
    "How alike filters (…, k, k) are to others that are turned by each element, through their waves: 1 if they are the same (G,)."
    waves = _waves(filters.shape[-1])
    a, b = (torch.einsum('nij,rmij->nrm', t.flatten(0, -3).cpu().to(waves), waves) for t in (filters, others))
    m = torch.arange(a.shape[-1]) - a.shape[-1]//2
    def turned(g):
        M = group.matrix(g)
        mirror, angle = torch.det(M) < 0, torch.atan2(M[1, 0], M[0, 0])
        return torch.exp(-1j*m*angle)*(b.flip(-1) if mirror else b)
    return torch.stack([(a*turned(g).conj()).sum().real/(a.norm()*b.norm()) for g in group.elements()])

@patch
def copies(self:Step):
    "Is each of its filters most like the turned copy that it should be, nearly always? None if that can't be asked."
    d, G = self.odd_canvas(), self.group
    arrows = any(p.reading.frequency is not None for p in (self.point, *self.sources))
    if d is None or arrows:
        return None
    first, posed = self.spark(d, G.identity), bool(self.posed())
    answers, right = G.elements() if first.ndim == 5 else [None], []
    def of_pose(u, p):
        return u if p is None else u[:, :, p]
    for g in [*self.exact, *self.between]:
        there = self.spark(d, g) if posed else first
        for p in answers:
            filters = of_pose(first, p)
            if filters.norm() < 1e-6*first.norm():
                continue
            like = _likeness(G, of_pose(there, p if p is None else G.product(g, p)), filters).tolist()
            best = max(like) if posed or p is not None else 0
            right.append(like[g] > max(.9*best, .4))
    return sum(right) > .75*len(right)

@patch
def blocks(self:Step):
    "Does one pixel become a block of equal pixels?"
    d = self.odd_canvas()
    y = attempt(lambda: self.spark(d or 0, self.group.identity))
    if y is None or self.zoom() < 2:
        return False
    m = y.flatten(0, -3)
    m = m[m.flatten(1).abs().amax(1).argmax()]
    values = m[m.abs() > 1e-6*m.abs().max()]
    return len(values) > 1 and (values.max() - values.min()).item() <= 1e-5*m.abs().max().item()

# %% 53bb09a4
@dataclass
class Finding:
    "Which layer, which cause, and the evidence."
    layer:str
    cause:str      # a key of REMEDIES
    evidence:str
    def __str__(self):
        return f'{self.layer}: {self.cause} ({self.evidence}). {REMEDIES[self.cause]}'

REMEDIES = {
    'randomness': 'Switch it off in evaluation.',
    'bias': 'One bias per channel, shared by all poses.',
    'position': 'Pool over places first, or use the same weights everywhere.',
    'stride and size': 'Use a size at which the windows end flush: see check_sizes.',
    'pose order': 'Keep (C, G) in this order, and look up the relative pose g⁻¹h.',
    'read-out': 'Pool over all poses, by mean or maximum.',
    'norm': 'Share statistics and scales over all poses and places: GroupBatchNorm, GroupLayerNorm.',
    'border': 'Pad with the background, or not at all.',
    'non-linearity': 'Apply it to features with poses, or to the lengths of vectors.',
    'kernel': 'Use GroupConv2d: every kernel in every pose.',
    'kernel sampling': 'Use the harmonic basis.',
    'resampling': 'Enlarge by a smooth interpolation, such as Upsample2d, and convolve afterwards.',
    'input interpolation': 'Probe with smoother or larger images, as smooth_images makes them.',
    'unknown': 'Split it into modules, so that each can be asked.',
}

# %% 5210a979
def _offset(s):
    return _added(s) if s.only_offset() else None

def _added(s):
    u = s.reading.unpack(s.run(*[torch.zeros_like(t) for t in s.fed]))
    c = u[..., 1:-1, 1:-1] if u.ndim > 3 and min(u.shape[-2:]) > 2 else u[..., None, None]
    varies = (c.amax((-2, -1)) - c.amin((-2, -1))).max() > 1e-5*u.abs().max()
    place = 'position', "something is added that differs from place to place"
    return place if varies else ('bias', "something is added that differs from pose to pose")

def _arrow(s):
    vectors = None if s.point.spatial else next(_arrows(s), None)
    if vectors:
        return 'read-out', "an arrow that turns with the picture; if it should, say output='vector'"

def _arrows(s):
    "Readings as arrows under which it is exact."
    for r in vector_readings(s.group, s.point.value):
        point = replace(s.point, reading=r)
        if not attempt(lambda: Step(s.group, point, s.sources, s.places).breaks(s.noise())):
            yield r

def _size(s):
    if (d := s.other_size()) is not None:
        H, W = s.size()
        return 'stride and size', f"exact at {H + d}×{W + d} pixels, not at {H}×{W}"

def _norm(s):
    asked = s.flips() if s.size() or s.point.spatial else True
    if asked and not s.by_number() and s.scale_free() and not s.additive():
        return 'norm', "it divides by something that depends on direction, place or pose"

def _poses(s):
    if not s.posed() or not s.prefers_poses():
        return None
    if s.rearranges():
        return 'pose order', "the same numbers come out in another order"
    if attempt(s.shelved):
        return 'pose order', "exact if its answer is read as (G, C)"
    M = s.influence()
    if M.shape[1] == 1:
        used = (M > 1e-6*M.max()).sum()
        some = f"only {used} of {len(M)} poses reach the answer"
        return 'read-out', some if used < len(M) else "it answers otherwise when poses change places"
    if (M - M.diag().diag()).max() <= 1e-6*M.max():
        return _pose_by_pose(s)
    if (M > 1e-6*M.max()).sum(0).eq(1).all():
        return 'pose order', "each pose of its answer comes from one other"
    if attempt(s.right_sided):
        return 'pose order', "it commutes with poses multiplied from the right: hg⁻¹ for g⁻¹h"
    return 'kernel', "it mixes poses, but not by their relative pose, as in a convolution over folded channels"

def _pose_by_pose(s):
    "No pose reaches another, and yet they aren't treated alike."
    if not s.additive():
        return 'non-linearity', "each pose has a curve of its own"
    if s.places and not s.pointwise():
        return 'kernel', "each pose has a filter of its own"
    return 'norm', "each pose is scaled in its own way"

def _place(s):
    if s.size() and not s.shifts():
        return 'position', "a patch at another place is treated differently"

def _moved(s):
    if s.size() and s.rearranges():
        return 'position', "the same numbers come out at other places"

def _border(s):
    if s.lopsided():
        return 'border', "exact without one row and column: more is added or cut on one side"
    if attempt(s.edge_only):
        return 'border', "exact far from the border, but not beside it"
    if move := attempt(s.off_centre):
        off = f"exact if a turned picture is moved by {move} pixels: its windows aren't centred"
        return 'stride and size' if s.stride() > 1 else 'border', off

def _curve(s):
    if s.pointwise() and not s.additive():
        return 'non-linearity', f"a curve, applied to each number of {s.sources[0].reading.name}"

def _filters(s):
    if attempt(s.backwards):
        return 'kernel', "it turns the wrong way: transposed, or its poses are counted backwards"
    if s.additive():
        return 'kernel', "its filters aren't turned copies of one another, as in a plain convolution"
    if attempt(s.sparks_differ):
        return 'kernel', "turned, it answers otherwise to one faint pixel: its filters aren't turned copies of one another"

QUESTIONS = _offset, _arrow, _size, _norm, _poses, _moved, _border, _place, _curve, _filters

def _why_exact(s):
    "Cause and evidence for a step that fails where nothing is interpolated."
    answers = (question(s) for question in QUESTIONS)
    return next((why for why in answers if why), ('unknown', "no experiment decides"))

# %% 144db266
def _excess(s, probes, crop=0, run=None):
    "Error/floor, error and floor between the lattice turns: root mean squares over elements and probes."
    def mean(f):
        values = [v for z in probes for v in f(z, s.between, crop=crop, run=run)]
        return math.sqrt(sum(v*v for v in values)/len(values))
    e, f = mean(s.errors), mean(s.floor)
    return e/(f + 1e-9), e, f

def _canvas(s, least=33):
    "How many pixels to add for a canvas of at least `least` on which it is exact at lattice turns."
    first = max(0, least - min(s.size()))
    if not s.exact:
        return -16*(-first//16)                          # what fits stays so, what doesn't, too
    sizes = range(first, first + 9)
    return next((d for d in sizes if attempt(lambda: not s.breaks(s.noise(d)))), 0)

def _away(s, probes, margin=8):
    "The same as `_excess`, for sources in the middle of a wide ground of their background."
    def widened(u):
        b = border_mean(u)
        return F.pad(u - b, (margin,)*4) + b
    wide = [s._on_places(z, widened) for z in probes]
    grown = s.reading.unpack(s.run(*wide[0])).shape[-1] - s.reading.unpack(s.run(*probes[0])).shape[-1]
    return _excess(s, wide, grown//2) if grown % 2 == 0 else None

# %% e9a606fa
def _smooth_excess(s, extra, run=None):
    return _excess(s, [s.smooth(extra, seed=i) for i in range(2)], run=run)

def _why_between(s):
    "Cause and evidence for a step above its floor between the lattice turns, or None."
    if not s.between or not s.size():
        return None
    extra = _canvas(s)
    if extra and attempt(lambda: s.run(*s.smooth(extra))) is None:
        extra = 0
    r, e, f = _smooth_excess(s, extra)
    if r > 1:
        return _why_coarse(s, extra, f"{e:.0%} on smooth images, of which interpolation explains {f:.1%}")
    probes = [s.smooth(background=True)]
    r, e, f = _excess(s, probes)
    away = attempt(lambda: _away(s, probes)) if r > 1 else None
    if away and away[0] <= 1:
        return 'border', f"{e:.0%} beside the border, {away[1]:.1%} far from it"

def _why_coarse(s, extra, evidence):
    "The cause of an error between the lattice turns, on smooth images."
    def better(d):
        return attempt(lambda: _smooth_excess(s, extra + d)[0] <= 1)
    if _smooth_excess(s, extra, s.without_offset())[0] <= 1:
        return _added(s)
    if s.stride() > 1 and (d := next((d for d in (1, -1, 2, -2) if better(d)), None)):
        H, W = (n + extra for n in s.size())
        return 'stride and size', f"{evidence}, but not at {H + d}×{W + d} pixels"
    if any(attempt(lambda: _smooth_excess(s, extra, s.cut(*sides))[0] <= 1) for sides in ((0, 1), (1, 0))):
        return 'border', f"{evidence}, but not without one row and column"
    for question in (_norm, _moved, _place, _curve):
        if why := question(s):
            return why[0], f"{evidence}; {why[1]}"
    if s.blocks():
        return 'resampling', f"{evidence}; a pixel becomes a block of equal pixels"
    looks = attempt(s.copies)
    if looks is False:
        return 'kernel', f"{evidence}; its filters aren't turned copies of one another"
    if looks:
        return 'kernel sampling', f"{evidence}; its filters are turned copies, roughly"
    return 'unknown', f"{evidence}; no experiment decides"

# %% fcf7ebe8
def _exact(s, z):
    "Is it exact where nothing is interpolated? None if it can't be run like that."
    e = attempt(lambda: max(s.errors(z, s.exact))) if s.exact else None
    return None if e is None or math.isnan(e) else e <= s.rounding(z)

def _examine(s):
    "A finding or None, and whether it is certain."
    free = attempt(s.without_its_places)
    t = free or s
    sure = False in (_exact(t, t.fed), _exact(t, t.noise()))
    why = _why_exact(t) if sure else None if free else _why_between(s)
    return why and Finding(s.point.name, *why), sure

# %% 13de3a8f
def _sound(s):
    "Exact as a whole, for what it was fed and for noise, in an answer that has places and so says enough."
    return s.point.spatial and all(_exact(s, z) for z in (s.fed, s.noise(), s.noise(seed=1)))

def _judge(t, steps):
    "Every step with its finding, after modules that are sound as a whole were acquitted with their parts."
    restless = t.at_random()
    found = {s: _examine(s) for s in steps if s.point.name not in restless}
    for block in t.block_steps():
        parts = [s for s in found if found[s][1] and block.point.name in s.point.inside]
        if not parts or not _sound(block):
            continue
        for s in parts:
            found[s] = None, False
    causes = {s: f for s, (f, _) in found.items() if f}
    chance = 'randomness', "the same input gives another answer"
    for s in steps:
        if s.point.name in restless:
            causes[s] = Finding(s.point.name, *chance)
    named = {f.layer for f in causes.values()}
    return causes, [Finding(name, *chance) for name in restless if name not in named]

# %% 42a20a81
@dataclass(eq=False)
class Diagnosis:
    "Which layers of a model break equivariance, and why."
    group:FiniteGroup
    findings:list    # of Finding: the guilty, in order
    layers:list      # name of each step, in order
    reads:list       # how its answer is read
    own:Tensor       # own error of each step at each element (layers, G)
    total:Tensor     # with all it inherits (layers, G)
    floor:Tensor     # what interpolation explains (layers, G)
    causes:list      # of each step, '' if it is innocent
    note:str         # on the input

    @property
    def healthy(self)->bool:
        return not self.findings
    @property
    def guilty(self)->dict: # layer → cause
        return {f.layer: f.cause for f in self.findings}
    def __repr__(self):
        return '\n'.join([*map(str, self.findings), self.note])

# %% 6471f45c
def _check(model, group, x):
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}; wrap a function in one")
    if not isinstance(group, FiniteGroup) or group.order < 2:
        raise ValueError(f"group must have elements that move something, such as CyclicGroup(8), got {group!r}")
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be a tensor of float32 or float64, got {getattr(x, 'dtype', type(x).__name__)}; "
                         "half precision hides what is sought: x.float(), whatever the model's own precision")
    if x.ndim not in (4, 5) or (x.ndim == 5 and x.shape[2] != group.order) or len(x) == 0:
        raise ValueError(f"x must be images (B, C, H, W) or features (B, C, {group.order}, H, W) of {group}, "
                         f"got {tuple(x.shape)}")
    if not x.isfinite().all() or (x == x.flatten(1)[:, :1].unflatten(1, (1,)*(x.ndim - 1))).all():
        raise ValueError("x must be finite and show something, got constant or infinite images; "
                         "take smooth_images(4, size)")

def _copied(model):
    "A copy in evaluation mode, without what `torch.compile` and data parallelism wrap around it and its parts."
    copies = {id(t): t.detach().clone() for m in model.modules() for t in all_tensors(vars(m)) if not t.is_leaf}
    try:
        for m in reversed(list(model.modules())):        # parts before the whole
            if (inner := unwrapped(m)) is not m:
                copies[id(m)] = copy.deepcopy(inner, copies)
        twin = copy.deepcopy(model, copies)
    except Exception as e:
        raise ValueError(f"the model can't be copied, and diagnose won't touch the original: {e}") from e
    for m in twin.modules():
        written = getattr(m.__dict__.get('forward'), '_torchdynamo_orig_callable', type)
        if getattr(inspect.unwrap(written), '__func__', None) is type(m).forward:
            del m.forward                                # compiled, it belongs to the original
    return twin.eval().requires_grad_(False)

def _cast(model, dtype):
    "Parameters and buffers in another precision; not by `to`, for a module may make them anew when it is moved."
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    cast = {}                                            # shared buffers stay shared
    for m in model.modules():
        for name, b in m._buffers.items():
            if b is not None and b.is_floating_point():
                m._buffers[name] = cast.setdefault(id(b), b.to(dtype))
    return model

def _in_double(twin, x):
    "Both in double precision, where rounding hides nothing, if the model can be; else in single."
    for dtype in (torch.float64, torch.float32):
        try:
            _cast(twin, dtype)(x.to(dtype))
            return x.to(dtype)
        except FAILURES as e:
            last = e
    raise ValueError(f"the model can't take x, {tuple(x.shape)}: {last}") from last

# %% 429085d8
def diagnose(
    model:nn.Module,   # any; a copy of it is examined, in evaluation mode
    group:FiniteGroup, # whose elements it should commute with
    x:Tensor,          # what it is fed: images (B, C, H, W), or features (B, C, G, H, W) for a part of a network
    shake:float=0.,    # disturb each parameter by this fraction first: finds faults that sleep in a fresh model
    output:str|None=None, # 'vector': the answer is an arrow that turns with the picture, or a field of them; else what it looks like
)->Diagnosis:
    "Measure every layer of `model` by itself, name those that break equivariance, and find out why."
    _check(model, group, x)
    with settled():
        twin = _copied(model)
        x = _in_double(twin, x.detach())
        _shake(twin, shake)
        t = trace(twin, x)
        if len(t.points) < 2:
            raise ValueError("the model's answer doesn't depend on x: there is nothing to examine")
        t.read(group, output)
        steps = t.steps()
        return _report(t, steps, *_judge(t, steps))

def _shake(model, by):
    gen = torch.Generator().manual_seed(0)
    for p in model.parameters() if by else ():
        spread = p.std(correction=0)
        noise = torch.randn(p.shape, generator=gen, dtype=p.dtype, device='cpu').to(p)
        p.add_(by*noise*(spread if spread > 0 else 1))

# %% a57ecde4
def _report(t, steps, causes, others):
    "Measure everything once more, element by element."
    group, G = t.group, t.group.elements()
    own = torch.tensor([_errors(s, G) for s in steps])
    floor = torch.tensor([_floors(s) for s in steps])
    moved = [attempt(lambda: t.along(t.points[0].reading.move(group, g, t.x))) for g in G]
    index = {id(p): i for i, p in enumerate(t.points)}
    def gathered(s, g):
        i = index[id(s.point)]
        return s.compare(moved[g][i], s.turned(g, s.point.value), g) if moved[g] and i in moved[g] else math.inf
    total = torch.tensor([[gathered(s, g) for g in G] for s in steps])
    findings = {(f.layer, f.cause): f for f in [*causes.values(), *others]}
    return Diagnosis(group, list(findings.values()), [s.point.name for s in steps], [s.reading.name for s in steps],
                     own, total, floor, [causes[s].cause if s in causes else '' for s in steps],
                     _input_note(t, group, total, bool(findings)))

def _errors(s, elements):
    return attempt(lambda: s.errors(s.fed, elements)) or [math.inf]*len(elements)

def _floors(s):
    "The floor at every element; lattice turns of an element share its own."
    G, floor = s.group, dict.fromkeys(s.group.elements(), 0.)
    for b, f in zip(s.between, attempt(lambda: s.floor(s.fed, s.between)) or []):
        floor |= {G.product(l, b): f for l in G.elements() if G.lattice[l]}
    return list(floor.values())

# %% 65d557a1
def _input_note(t, group, total, guilty):
    "What turning x there and back does to x, and to the answer."
    r, between, lattice = t.points[0].reading, between_turns(group), [g for g in group.elements() if group.lattice[g]]
    whole = "On these images the answer is exact on the lattice nonetheless. " if guilty and total[-1, lattice].max() < 1e-5 else ""
    if not between:
        return whole + f"The elements of {group} map the pixel grid to itself: nothing is interpolated."
    s = Step(group, Point('', t.points[-1].value, (0,), run=t.model, reading=t.points[-1].reading), [t.points[0]])
    back = {g: s.moved(group.inverse(g), s.moved(g, [t.x]))[0] for g in between}
    lost = max(relative(b, t.x, False) for b in back.values())
    by_input, moves = max(s.compare(s.run(b), s.run(t.x), g) for g, b in back.items()), total[-1, between].max().item()
    text = whole + f"Between the lattice turns the answer moves by up to {moves:.1%}. Turning x there and back loses {lost:.1%} of x and moves the answer by {by_input:.1%}"
    share = min(1, by_input/moves) if moves > 0 else 1
    text += f": input interpolation explains {share:.0%}."
    return text if guilty or share < .5 else f"{text} {REMEDIES['input interpolation']}"

# %% ../nbs/08_doctor.ipynb #0ba23953
@patch
def table(self:Diagnosis): # a pandas DataFrame, one row per layer
    "Each layer's own error on the lattice and between, its floor, what had gathered there, and the verdict."
    import pandas as pd
    lattice = [g for g in self.group.elements() if self.group.lattice[g]]
    between = between_turns(self.group)
    worst = lambda t, elements: t[:, elements].amax(1).tolist() if elements else [0.]*len(t)
    columns = dict(layer=self.layers, reads=self.reads, lattice=worst(self.own, lattice), between=worst(self.own, between),
                   floor=worst(self.floor, between), gathered=worst(self.total, list(self.group.elements())))
    return pd.DataFrame(columns | dict(cause=self.causes))

@patch
def _repr_markdown_(self:Diagnosis):
    rows = [f"| {'**' + r.layer + '**' if r.cause else r.layer} | {r.reads} | {r.lattice:.0e} | {r.between:.1%} | {r.floor:.1%} | {r.gathered:.1%} | {r.cause} |"
            for r in self.table().itertuples()]
    head = ['| layer | reads as | lattice | between | floor | gathered | cause |', '|:--|:--|--:|--:|--:|--:|:--|']
    verdict = [f'- **{f.layer}: {f.cause}.** {f.evidence[0].upper() + f.evidence[1:]}. {REMEDIES[f.cause]}' for f in self.findings] or ['- Nothing is wrong.']
    return '\n'.join([*head, *rows, '', *verdict, f'- {self.note}'])

# %% ../nbs/08_doctor.ipynb #815efc9b
def _angles(group):
    "Degrees of each element, those of mirrors with a bar."
    turn = lambda M: round(math.degrees(math.atan2(M[1, 0], M[0, 0]))) % 360
    return [f"{turn(group.matrix(g))}°" + ('' if torch.det(group.matrix(g)) > 0 else '|') for g in group.elements()]

@patch
def plot(self:Diagnosis, axs=None):
    "Own error of each layer against the angle, and its worst against its floor."
    import matplotlib.pyplot as plt
    n, d = len(self.layers), self.table()
    if axs is None: _, axs = plt.subplots(1, 2, figsize=(7, .9 + .22*n), layout='constrained', sharey=True, width_ratios=(3, 2))
    axs[0].imshow(self.own.clamp(1e-8, 1).log10(), cmap='Greys', vmin=-8, vmax=0, aspect='auto')
    step = -(-self.group.order//8)
    axs[0].set(xticks=range(0, self.group.order, step), yticks=range(n), title='own error (white 1e-8, black 1)')
    axs[0].set_xticklabels(_angles(self.group)[::step]); axs[0].set_yticklabels([f'▸ {r.layer}' if r.cause else r.layer for r in d.itertuples()])
    for label, column, style in (('lattice', d.lattice, 'o'), ('between', d.between, 's'), ('floor', d.floor, '|')):
        axs[1].semilogx(column.clip(1e-8), range(n), style, ms=9 if style == '|' else 4, color='black', mfc='white' if style == 's' else 'black', label=label)
    for i, r in enumerate(d.itertuples()): axs[1].annotate(r.cause, (1.3e-8, i), va='center', fontsize=8, weight='bold')
    axs[1].set(title='worst of each'); axs[1].grid(alpha=.3); axs[1].legend(fontsize=7, ncols=3, loc='upper center', bbox_to_anchor=(.5, -.12))
    return axs
