"""proto"""
# %% b0124f82
import copy, functools, heapq, itertools, math, random, sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
import numpy as np
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from gcnn_stn.equivariance import disc, smooth_images
from gcnn_stn.group import FiniteGroup, act

# %% b9c9f012
def map_tensors(tree, f):
    "The same tree of tuples, lists, dicts and dataclasses, `f` applied to its floating point tensors."
    if isinstance(tree, Tensor):
        return f(tree) if tree.is_floating_point() else tree
    old = _branches(tree)
    new = {k: map_tensors(t, f) for k, t in old.items()}
    same = all(new[k] is old[k] for k in old)
    return tree if same else _regrown(tree, new)

def _branches(tree):
    "What a container holds, by index, key or field."
    if isinstance(tree, (tuple, list)):
        return dict(enumerate(tree))
    if isinstance(tree, dict):
        return dict(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return {k.name: getattr(tree, k.name) for k in fields(tree) if hasattr(tree, k.name)}
    return {}

def _regrown(tree, new):
    "A container like `tree`, that holds other things."
    if isinstance(tree, (tuple, list)):
        make = getattr(tree, '_make', type(tree))        # namedtuples have their own
        return make(list(new.values()))
    twin = copy.copy(tree)
    for k, t in new.items():
        if isinstance(tree, dict):
            twin[k] = t
        else:
            object.__setattr__(twin, k, t)               # frozen ones, too
    return twin

def _as_it_is(tree):
    "A copy of the containers: somebody may go on filling them."
    new = {k: _as_it_is(t) for k, t in _branches(tree).items()}
    return _regrown(tree, new) if new else tree

# %% b0e715ff
@contextmanager
def hooked(
    model:nn.Module,
    enter, # (name, module, (args, kwargs)) → the same, or others
    leave, # (name, module, answer) → the same, or another
):
    "While this lasts, `enter` and `leave` see what goes into and comes out of every module, and may replace it."
    _check_model(model)
    def before(name, m, args, kwargs):
        return enter(name, m, (args, kwargs))
    def after(name, m, args, out):
        return leave(name, m, out)
    with ExitStack() as stack:
        for name, m in model.named_modules():
            hook = m.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            stack.callback(hook.remove)
            hook = m.register_forward_hook(partial(after, name))
            stack.callback(hook.remove)
        yield

def _check_model(model):
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}; wrap a function in one")

# %% settled
_SETTLED = []

@contextmanager
def settled():
    "While this lasts models run as they are written: not compiled, not fused, and with random numbers of their own."
    if _SETTLED:                                         # it lasts already
        yield
        return
    fused = torch.backends.mha.get_fastpath_enabled()
    python, numbers = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        stack.callback(random.setstate, python)
        stack.callback(np.random.set_state, numbers)
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if 'torch._dynamo' in sys.modules:               # else nothing was compiled
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        stack.callback(_SETTLED.clear)
        _SETTLED.append(True)
        torch.backends.mha.set_fastpath_enabled(False)
        yield

def _seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)

# %% flow
class _Flow(TorchDispatchMode):
    "Remembers which points each tensor was made from, and which tensors were written into."
    def __init__(self):
        super().__init__()
        self.made, self.written = {}, set()              # by storage, so that views belong together

    def address(self, t):
        return t.untyped_storage()._cdata if t.layout == torch.strided else id(t)

    def sources(self, t):
        "Indices of the points that `t` was made from."
        return self.made.get(self.address(t), (None, frozenset()))[1]

    def mark(self, t, points):
        "From now on `t` counts as made from these points."
        keep = t.untyped_storage() if t.layout == torch.strided else t    # its address is never used again
        self.made[self.address(t)] = keep, points

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = all_tensors((args, kwargs))
        points = frozenset().union(*map(self.sources, given))
        written = all_tensors([v for a, v in _arguments(func, args, kwargs)
                            if a.alias_info is not None and a.alias_info.is_write])
        self.written |= {self.address(t) for t in written}
        if points:
            for t in (*all_tensors(out), *written):
                self.mark(t, points | self.sources(t))
        return out

def all_tensors(tree):
    "All tensors of a tree, whatever they hold."
    if isinstance(tree, Tensor):
        return [tree]
    return [t for branch in _branches(tree).values() for t in all_tensors(branch)]

def _arguments(func, args, kwargs):
    "What an operation was given, beside what it says about each argument."
    for i, a in enumerate(func._schema.arguments):
        if i < len(args):
            yield a, args[i]
        elif a.name in kwargs:
            yield a, kwargs[a.name]

# %% 467f2e33
@dataclass(eq=False)
class Point:
    "A tensor on its way through a model."
    name:str           # of the module whose code made it
    value:Tensor       # as recorded
    sources:tuple      # indices of the points it was computed from
    inside:tuple=()    # names of the modules that were running
    run:object=None    # (*values of the sources) → what is made of them
    part:bool=False    # made by a module that can be run by itself, and not by code between modules
    reading:object=None

class Trace:
    "Records every new tensor that enters or leaves a module."
    def __init__(self, model, x):
        self.model, self.x, self.flow = model, x, _Flow()
        self.points, self.visits, self.seen, self.frames, self.blocks = [], [], {}, [], []

    def index(self, t):
        "Which point a tensor is, unless it was written into since."
        i, twin = self.seen.get(id(t), (None, None))
        return i if twin is t and self.flow.address(t) not in self.flow.written else None

# %% 8a3e63eb
@patch
def enter(self:Trace, name, module, tree):
    "Called with what a module is given; what it is to be given instead."
    tree = map_tensors(tree, partial(self.see, f'into {name}'))
    self.frames.append(dict(name=name, module=module, part=True, tree=_as_it_is(tree)))
    return tree

@patch
def leave(self:Trace, name, module, out):
    "Called with what a module answers; what goes on instead."
    places = itertools.count()
    out = map_tensors(out, lambda t: self.see(f'out of {name}', t, next(places)))
    frame = self.frames.pop()
    if not frame['part'] and isinstance(out, Tensor) and self.index(out) is not None:
        self.blocks.append((name, frame, self.index(out)))
    return out

# %% 6e65e290
@patch
def see(self:Trace, where, t, place=None):
    "Called with every tensor that enters (`place` None) or leaves a module; its twin goes on instead."
    i, new = None, self.index(t) is None and not t.requires_grad     # gradients are the model's own business
    if new and (not self.points or self.flow.sources(t)):
        i, t = self.add(t, place)
    self.visits.append((where, i))
    return t

@patch
def add(self:Trace, t, place):
    "A new point for the tensor `t`: its index, and the twin that goes on."
    value, sources, i = t.detach().clone(), tuple(sorted(self.flow.sources(t))), len(self.points)
    for f in self.frames if place is None else self.frames[:-1]:
        f['part'] = False                                # something happens inside
    frame = self.frames[-1] if self.frames else dict(name='input', part=False)
    p = Point(frame['name'] or '(model)', value, sources, tuple(f['name'] for f in self.frames))
    p.part = frame['part'] and set(sources) <= set(self.fed(frame))
    p.run = self.alone(frame, sources, place) if p.part else self.within(i, sources)
    twin = value.clone()
    self.flow.mark(twin, frozenset([i]))
    self.seen[id(twin)] = i, twin
    self.points.append(p)
    return i, twin

# %% a025d980
@patch
def fed(self:Trace, frame):
    "The points among what a module was given."
    ids = []
    map_tensors(frame['tree'], lambda t: ids.append(self.seen.get(id(t), (None,))[0]) or t)
    return [i for i in ids if i is not None]

@patch
def alone(self:Trace, frame, sources, place=0):
    "Run one module by itself, with other tensors in the place of `sources`."
    def run(*values):
        given, found = dict(zip(sources, values)), []
        def put(t):
            i = self.seen.get(id(t), (None,))[0]
            return t if i is None else self.value(i, given)
        args, kwargs = map_tensors(frame['tree'], put)
        with settled():
            _seed(0)
            map_tensors(frame['module'](*args, **kwargs), lambda t: found.append(t) or t)
        return found[place]
    return run

# %% 772afe9a
@patch
def value(self:Trace, i, given):
    "What is put in the place of point `i`: a copy of what is `given` for it, or else of what was recorded."
    recorded = self.points[i].value
    t = given.get(i, recorded).detach()
    order = sorted(range(t.ndim), key=lambda d: -recorded.stride(d))     # laid out as it was
    back = [order.index(d) for d in range(t.ndim)]
    return t.permute(order).clone(memory_format=torch.contiguous_format).permute(back)

# %% bf2471f7
class _Reached(BaseException):                           # not to be caught by the model's own code
    pass

class AnotherPath(RuntimeError):
    "The model, run again, took another path than before."
    def __init__(self, where):
        super().__init__(f"{where} took another path than before")
        self.where = where

@patch
def replay(self:Trace, x, see, seed=0):
    "Run the model on x; `see(i, t)` is asked what goes on where point i is made."
    visits, running = iter(self.visits), []
    def at(where, t):
        expected, i = next(visits, (None, None))
        if expected != where:
            raise AnotherPath(running[-1] if running else '(model)')
        return t if i is None else see(i, t)
    def enter(name, m, tree):
        tree = map_tensors(tree, partial(at, f'into {name}'))
        running.append(name or '(model)')
        return tree
    def leave(name, m, out):
        out = map_tensors(out, partial(at, f'out of {name}'))
        running.pop()
        return out
    with settled(), hooked(self.model, enter, leave):
        _seed(seed)
        return self.model(x)

# %% caa80bec
@patch
def within(self:Trace, target, sources, free=()):
    "Run the model with all points before `target` given but those that are `free`, as far as `target`."
    def run(*values):
        given = dict(zip(sources, values))
        def see(i, t):
            if i == target:
                raise _Reached(t)
            return t if i in free else self.value(i, given)
        try:
            self.replay(self.x, see)
        except _Reached as reached:
            return reached.args[0]
        raise AnotherPath('(model)')
    return run

# %% 949811af
@patch
def along(
    self:Trace,
    x:Tensor, # of the same shape as the recorded one
)->dict:      # index of a point → its value
    "The points of the model on another input."
    if not isinstance(x, Tensor) or x.ndim != self.x.ndim:
        raise ValueError(f"x must be a tensor like the recorded one, {tuple(self.x.shape)}, "
                         f"got {tuple(x.shape) if isinstance(x, Tensor) else x!r}")
    values = {}
    def see(i, t):
        values[i] = t.detach().clone()
        return t
    out = self.replay(x, see)
    return values | {len(self.points) - 1: out.detach()}

# %% random
@patch
def at_random(self:Trace, seeds=(1, 2, 3)):
    "Names of what answers the same differently with other random numbers."
    found = {}
    def see(i, t):
        if relative(t, self.points[i].value) > 100*torch.finfo(t.dtype).eps:
            found[self.points[i].name] = None
        return self.value(i, {})
    for seed in seeds:
        try:
            self.replay(self.x, see, seed)
        except AnotherPath as path:
            found[path.where] = None
    return list(found)

# %% 96ced60a
def trace(
    model:nn.Module, # in evaluation mode
    x:Tensor,        # what it is fed
)->Trace:            # with points, and blocks: what modules with parts were given and gave
    "Every tensor on the way of `x` through `model`, and how each is made from earlier ones."
    _check_model(model)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x must be a tensor of floating point numbers (B, …), got "
                         f"{f'{tuple(x.shape)} of {x.dtype}' if isinstance(x, Tensor) else x!r}")
    t = Trace(model, x)
    with settled(), t.flow, hooked(model, t.enter, t.leave):
        _seed(0)
        out = model(x)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise ValueError(f"the model must answer with one tensor of floating point numbers, got "
                         f"{out.dtype if isinstance(out, Tensor) else type(out).__name__}; "
                         "wrap it in a module that picks one")
    if t.index(out) is None:                             # nothing leads from x to the answer
        t.points[1:], t.blocks = [Point('(model)', out.detach().clone(), (0,), run=model)], []
        t.visits = [(where, i if i == 0 else None) for where, i in t.visits]
    return t
# %% e74ce0f1
def _same(t):
    return t

@dataclass(eq=False)
class Reading:
    "How a tensor holds what it holds."
    name:str
    unpack:object=_same      # → (B,), (B, C), (B, C, G), (B, C, H, W), (B, C, G, H, W) or (B, C, 2, H, W)
    pack:object=_same        # and back
    frequency:int|None=None  # of a vector field
    odd:int=0                # how unusual it is: settles ties
    poses:bool=False         # or arrows

    def move(self, group, g, t, places=True): # L_g t; without `places` only poses and arrows are moved
        u = self.unpack(t)
        u = _move_poses(group, g, u) if self.frequency is None else _move_arrows(group, g, u, self.frequency)
        return self.pack(_move_places(group, g, u) if places and u.ndim > 3 else u)

@patch(as_prop=True)
def maps(self:Point)->Tensor: # (B, C, H, W) or (B, C, G, H, W); without places (B, C) or (B, C, G)
    "Its tensor, unpacked by its reading."
    return self.reading.unpack(self.value)

@patch(as_prop=True)
def spatial(self:Point)->bool:
    "Does it have places?"
    return self.maps.ndim > 3

# %% 4add7d81
def border_mean(
    u:Tensor, # maps (…, H, W)
)->Tensor:    # (…, 1, 1)
    "The background: the mean along the border of each map."
    if u.ndim < 2:
        raise ValueError(f"maps (…, H, W) have a border, got {tuple(u.shape)}")
    edge = torch.ones(u.shape[-2:], dtype=u.dtype, device=u.device)
    edge[1:-1, 1:-1] = 0
    return (u*edge).sum((-2, -1), keepdim=True)/edge.sum()

def _move_poses(group, g, u):
    if u.ndim not in (3, 5):
        return u
    return u[:, :, group.table[group.inverse(g)].to(u.device)]

def _move_places(group, g, u):
    flat = u.flatten(1, -3)                              # (B, maps, H, W)
    if group.lattice[g]:
        return act(group, g, flat).unflatten(1, u.shape[1:-2])
    b = border_mean(flat)
    return (act(group, g, flat - b) + b).unflatten(1, u.shape[1:-2])

def move_maps(
    group:FiniteGroup,
    g:int,    # one of its elements
    u:Tensor, # (B,), (B, C), (B, C, G), (B, C, H, W) or (B, C, G, H, W)
)->Tensor:
    "L_g u, where beyond the border lies more of the background."
    if g not in group.elements():
        raise ValueError(f"the elements of {group} are 0 … {group.order - 1}, got {g!r}")
    if u.ndim not in (1, 2, 3, 4, 5) or (u.ndim in (3, 5) and u.shape[2] != group.order):
        raise ValueError(f"{group} moves (B,), (B, C), (B, C, {group.order}), (B, C, H, W) or "
                         f"(B, C, {group.order}, H, W), got {tuple(u.shape)}; reshape it")
    return Reading('').move(group, g, u)

# %% 9bf86dd3
def _move_arrows(group, g, u, m): # (B, C, 2, …)
    M = group.matrix(g)
    angle, mirror = m*math.atan2(M[1, 0], M[0, 0]), torch.det(M).sign().item()
    c, s = math.cos(angle), math.sin(angle)
    rho = torch.tensor([[c, -s*mirror], [s, c*mirror]], device=u.device, dtype=u.dtype)
    return torch.einsum('ij,bcj...->bci...', rho, u)

# %% a8f1f245
NATURAL = {1: 'invariant', 2: 'invariant', 3: 'poses', 4: 'image', 5: 'feature'}

def _natural(group, t, batch):
    "What a tensor looks like: read from its number of dimensions, or None."
    fits = t.ndim in NATURAL and len(t) == batch and (t.ndim not in (3, 5) or t.shape[2] == group.order)
    return Reading(NATURAL[t.ndim]) if fits else None

def _folded(name, dim, n, swap, to=None, odd=1):
    "An axis that holds two: (C, n), or (n, C) if `swap`; the poses of a batch are moved to where they belong."
    to = dim + 1 if to is None else to
    def unpack(t):
        return t.unflatten(dim, (n, -1) if swap else (-1, n)).movedim(dim if swap else dim + 1, to)
    def pack(u):
        return u.movedim(to, dim if swap else dim + 1).flatten(dim, dim + 1)
    return Reading(name, unpack, pack, odd=odd + swap)

def _laid(reading, there, back, name=None):
    "A reading of what `there` makes of a tensor, and `back` undoes."
    def unpack(t):
        return reading.unpack(there(t))
    def pack(u):
        return back(reading.pack(u))
    return Reading(name or reading.name, unpack, pack, reading.frequency, max(1, reading.odd))

# %% 2fc1a1c8
def _reshaped(p, shape):
    "As point p is read, laid out in another shape."
    old = p.value.shape[1:]
    return _laid(p.reading, lambda t: t.reshape(len(t), *old), lambda t: t.reshape(len(t), *shape))

def _tokens(reading, H, W):
    "Places in a row before the channels, (B, HW, C), laid out as (B, C, H, W)."
    return _laid(reading, lambda t: t.mT.unflatten(2, (H, W)), lambda t: t.flatten(2).mT, 'tokens')

def _channels_in(group, n, odd=0):
    "Readings of (B, n, H, W)."
    yield Reading('image', odd=odd)
    for swap in (False, True) if n % group.order == 0 else ():
        yield _folded('feature in the channels', 1, group.order, swap, odd=odd + 1)

def _permuted(order, shape):
    "Readings of five dimensions with poses and places in other positions."
    for h, pose in itertools.product((3, 2, 1), (1, 2, 3, 4)):
        if shape[pose] == order and pose not in (h, h + 1) and (pose, h) != (2, 3):
            [channel] = {1, 2, 3, 4} - {h, h + 1, pose}
            there = 0, channel, pose, h, h + 1
            back = [there.index(d) for d in range(5)]
            yield Reading('feature, permuted', partial(torch.permute, dims=there), partial(torch.permute, dims=back), odd=3)

def _from_sources(group, t, sources):
    for p in sources:
        if p.reading.frequency is None or p.value.shape == t.shape:
            yield p.reading
        if p.value.numel() == t.numel() and len(p.value) == len(t):
            yield _reshaped(p, t.shape[1:])
        H, W = p.maps.shape[-2:] if p.spatial else (0, 0)
        if t.ndim == 3 and t.shape[1] == H*W:
            for r in _channels_in(group, t.shape[2]):
                yield _tokens(r, H, W)
        if t.ndim == 3 and t.shape[1] == group.order*H*W:
            yield _laid(Reading('tokens'), lambda t: t.mT.unflatten(2, (-1, H, W)), lambda t: t.flatten(2).mT)

def _by_shape(group, t, batch):
    G = group.order
    if t.ndim == 4:
        yield from _channels_in(group, t.shape[1])
        for r in _channels_in(group, t.shape[3], odd=3):
            yield _laid(r, lambda t: t.movedim(-1, 1), lambda t: t.movedim(1, -1), f'{r.name}, at the end')
    for swap in (False, True) if t.ndim == 2 and t.shape[1] % G == 0 else ():
        yield _folded('feature in the channels', 1, G, swap)
    if t.ndim == 5 and len(t) == batch:
        yield from _permuted(G, t.shape)
    if t.ndim == 3 and t.shape[1] == G:
        yield Reading('poses first', lambda t: t.mT, lambda u: u.mT, odd=3)
    for swap in (False, True) if len(t) == batch*G else ():
        yield _folded('feature in the batch', 0, G, swap, 2)
    if t.ndim == 3 and len(t) == batch:
        yield Reading('invariant', lambda u: u.flatten(1), lambda u, shape=t.shape[1:]: u.unflatten(1, shape), odd=3)

# %% vectors
def vector_reading(
    shape,       # of a tensor: (B, 2), (B, C, 2), (B, 2C), or with places (B, 2, H, W), (B, C, 2, H, W), (B, 2C, H, W)
    frequency=1, # how often it turns when the picture does once
    swap=False,  # (2, C) in one axis, for (C, 2)
):
    "How a tensor of that shape holds arrows in the plane, x to the right and y up; None if it can't."
    if len(shape) in (3, 5) and shape[2] == 2:
        return Reading('vectors', frequency=frequency)
    if len(shape) in (2, 4) and shape[1] % 2 == 0:
        return replace(_folded('vectors', 1, 2, swap), frequency=frequency)

def vector_readings(group, t):
    "Every frequency, in both directions."
    for m in range(1, group.order//2 + 1):
        for sign, swap in itertools.product((1, -1), (False, True)):
            if r := vector_reading(t.shape, sign*m, swap):
                yield r

# %% 05e8dd98
def relative(there, back, lattice=True):
    "‖there − back‖/‖back‖; off the lattice on the disc that every turn keeps."
    if there.shape != back.shape:
        return math.inf
    if back.ndim > 3 and not lattice:
        mask = disc(*back.shape[-2:]).to(back)
        there, back = there*mask, back*mask
    return ((there - back).norm()/back.norm().clamp_min(torch.finfo(back.dtype).tiny)).item()

def _others(group):
    return [g for g in group.elements() if g != group.identity]

def between_turns(group):
    "One element for each family of lattice turns, the lattice's own left out."
    if not isinstance(group, FiniteGroup):
        raise ValueError(f"group must be a FiniteGroup, such as CyclicGroup(8), got {group!r}")
    done, out = set(), []
    for g in group.elements():
        if g not in done and not group.lattice[g]:
            out.append(g)
        done |= {group.product(l, g) for l in group.elements() if group.lattice[l]}
    return out

# %% 97ab9279
class Step:
    "One piece of a model on the bench: what it was fed, what it answered, and how both are read."
    def __init__(self, group, point, sources, places=True):
        self.group, self.point, self.sources, self.reading = group, point, sources, point.reading
        self.fed = [p.value for p in sources]
        self.places = places and any(p.spatial for p in (point, *sources))     # are they turned, too?
        self.exact = [g for g in _others(group) if group.lattice[g] or not self.places]  # nothing is interpolated
        self.between = between_turns(group) if self.places else []
        self.answers = {}                                # to questions that were asked before

    def run(self, *z):
        return self.point.run(*z).detach()

    def moved(self, g, z):
        return [p.reading.move(self.group, g, t, self.places) for p, t in zip(self.sources, z)]

    def turned(self, g, y):
        return self.reading.move(self.group, g, y, self.places)

    def compare(self, there, back, g=None, crop=0):
        "Relative difference of two answers; g says whether a disc is needed, `crop` leaves out pixels at the border."
        there, back = (self.reading.unpack(t) for t in (there, back))
        if crop:
            there, back = (F.pad(t, (-crop,)*4) for t in (there, back))
        return relative(there, back, g is None or not self.places or self.group.lattice[g])

# %% 8a8e081b
@patch
def errors(self:Step, z, elements, run=None, out=None, crop=0):
    "The step's own error at each element, for the sources z."
    run, out = run or self.run, out or self.turned
    y = run(*z)
    return [self.compare(run(*self.moved(g, z)), out(g, y), g, crop) for g in elements]

@patch
def floor(self:Step, z, elements, run=None, crop=0):
    "What interpolation there and back, of sources and answer, explains."
    run, G = run or self.run, self.group
    y = run(*z)
    def cost(g):
        if not self.places or G.lattice[g]:
            return 0.
        h, turned = G.inverse(g), self.turned(g, y)
        by_source = self.compare(run(*self.moved(h, self.moved(g, z))), y, g, crop)
        by_answer = self.compare(self.turned(h, turned), y, g, crop) if self.point.spatial else by_source
        return by_source + by_answer
    return [cost(g) for g in elements]

# %% 5b43b25b
@patch
def rounding(self:Step, z, run=None):
    "A hundred last digits for the arithmetic, and ten for what the step makes of a disturbance of its sources."
    run, gen = run or self.run, torch.Generator().manual_seed(1)
    shake = torch.finfo(torch.float32).eps*1e3
    shaken = [t*(1 + shake*_normal(t.shape, gen, t)) for t in z]
    return torch.finfo(torch.float32).eps*(100 + 10*self.compare(run(*shaken), run(*z))/shake)

def _normal(shape, gen, like):
    return torch.randn(shape, generator=gen, dtype=like.dtype, device='cpu').to(like)

# %% 1559dcdc
@patch
def size(self:Step):
    "Height and width of the first source that has them, if they are turned."
    sizes = (tuple(p.maps.shape[-2:]) for p in self.sources if p.spatial and self.places)
    return next(sizes, None)

@patch
def noise(self:Step, extra=0, seed=0):
    "Random sources of the recorded strength and sign; smooth ones where nothing is exact."
    if not self.exact:
        return self.smooth(extra, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    def like(p):
        u = p.maps
        wide = [n + extra for n in u.shape[-2:]] if p.spatial else u.shape[-2:]
        n = _normal((*u.shape[:-2], *wide), gen, u)*(u.std(correction=0) if u.std(correction=0) > 0 else 1)
        return p.reading.pack(n.abs() if u.min() >= 0 and u.max() > 0 else n)
    return [like(p) for p in self.sources]

# %% 61f8a439
@patch
def smooth(self:Step, extra=0, background=False, seed=0):
    "Smooth sources that fade out before the border, into zero or into the recorded background."
    def like(p):
        u = p.maps
        H, W = (n + extra for n in u.shape[-2:])
        n = min(H, W)
        s = smooth_images(len(u), n, math.prod(u.shape[1:-2]), seed=seed, dtype=u.dtype).to(u)*u.std(correction=0)
        s = F.pad(s, ((W - n)//2, (W - n + 1)//2, (H - n)//2, (H - n + 1)//2)).unflatten(1, u.shape[1:-2])
        if background:
            s = s + border_mean(u).mean((0, 2) if u.ndim == 5 else 0, keepdim=True)
        return p.reading.pack(s)
    return [like(p) if p.spatial else p.value for p in self.sources]

# %% 86f25841
FAILURES = ArithmeticError, AssertionError, LookupError, RuntimeError, StopIteration, TypeError, ValueError

def attempt(f):
    "The outcome of an experiment, or None where the step can't be run like that."
    try:
        return f()
    except FAILURES:
        return None

# %% shuffle
def _shuffled(reading, t, order):
    "The places of a tensor in another order; None if it hasn't got as many."
    u = reading.unpack(t)
    if u.ndim < 4:
        return t
    if u.shape[-2:].numel() != len(order):
        return None
    return reading.pack(u.flatten(-2)[..., order.to(u.device)].unflatten(-1, u.shape[-2:]))

def _blindness(s, z, y):
    "Tells of a reading of the answer y whether shuffling the pixels of z does no more than shuffle those of y."
    sizes = [p.maps.shape[-2:].numel() for p in (*s.sources, s.point) if p.spatial]
    order = torch.randperm(sizes[0] if sizes else 1, generator=torch.Generator().manual_seed(0), device='cpu')
    other = [_shuffled(p.reading, t, order) for p, t in zip(s.sources, z)]
    there = attempt(lambda: s.run(*other)) if all(t is not None for t in other) else None
    allowed = s.rounding(z)
    def blind(r):
        back = attempt(lambda: _shuffled(r, y, order))
        return there is not None and back is not None and relative(there, back) <= allowed
    return blind

@patch
def without_its_places(self:Step):
    "The same step where only poses and arrows are moved, if it is blind to places; else None."
    z = self.noise()
    y = attempt(lambda: self.run(*z))
    blind = self.places and y is not None and _blindness(self, z, y)(self.reading)
    return Step(self.group, self.point, self.sources, places=False) if blind else None

# %% fitting
def _generators(group, elements):
    "A few of these elements, of which the others are products."
    few, span = [], {group.identity}
    for g in elements:
        if g not in span:
            few.append(g)
        while (grown := span | {group.product(a, b) for a in span for b in few}) != span:
            span = grown
    return few

def _fitting(s):
    "How badly a reading of the answer fits, and how badly it may."
    probes = [(z, attempt(lambda: s.run(*z))) for z in (s.fed, s.noise())]
    probes = [(z, y) for z, y in probes if y is not None and y.isfinite().all()]
    def answers(elements, places):
        def there(g, z):
            return s.run(*[p.reading.move(s.group, g, t, places) for p, t in zip(s.sources, z)])
        return [(g, y, attempt(lambda: there(g, z))) for z, y in probes for g in elements]
    def worst(answers, r, places):
        return max((relative(there, r.move(s.group, g, y, places), not places or s.group.lattice[g])
                    for g, y, there in answers if there is not None), default=math.inf)
    rounding = s.rounding(s.fed)
    turning = answers(_generators(s.group, s.exact) or s.between, True)
    posing = functools.cache(lambda: answers(_generators(s.group, _others(s.group)), False))
    blind = _blindness(s, *probes[-1]) if probes else lambda r: False
    def misfit(r):
        if attempt(lambda: blind(r)):
            e, allowed = attempt(lambda: worst(posing(), r, False)), rounding
        else:
            e, allowed = attempt(lambda: worst(turning, r, True)), rounding if s.exact else .1
        return math.inf if e is None or math.isnan(e) else e, allowed
    return misfit

# %% search
class _Reader:
    "Looks for the readings of all points under which the fewest steps break."
    def __init__(self, trace, group, output):
        self.trace, self.group, self.output = trace, group, output
        self.points, self.batch = trace.points, len(trace.x)
        self.known, self.found, self.probes = [[] for _ in self.points], {}, {}
        self.last = {i: max((k for k, p in enumerate(self.points) if i in p.sources), default=i)
                     for i in range(len(self.points))}

    def same(self, k, reading):
        "The reading of point k that unpacks it to the same, if there was one; None if it can't be unpacked."
        t = self.probes.get(k)
        if t is None:
            t = self.probes[k] = torch.arange(self.points[k].value.numel(), device='cpu').reshape(self.points[k].value.shape)
        u = attempt(lambda: reading.unpack(t))
        back = u is not None and attempt(lambda: reading.pack(u))
        if u is None or back is None or back.shape != t.shape or u.ndim > 5:
            return None
        if u.ndim in (3, 5) and u.shape[2] != (self.group.order if reading.frequency is None else 2):
            return None
        reading = replace(reading, poses=u.ndim in (3, 5))
        for r, seen in self.known[k]:
            if r.frequency == reading.frequency and seen.shape == u.shape and torch.equal(seen, u):
                return r
        self.known[k].append((reading, u))
        return reading

    def candidates(self, k, sources):
        "Readings worth trying, the natural one first."
        t, last = self.points[k].value, k == len(self.points) - 1
        if last and self.output == 'vector':
            return [self.same(k, vector_reading(t.shape))]
        natural = _natural(self.group, t, self.batch)
        if last and t.ndim < 3:
            return [] if natural is None else [self.same(k, natural)]
        options = [*[natural]*(natural is not None), *_by_shape(self.group, t, self.batch),
                   *_from_sources(self.group, t, sources)]
        return _distinct(self.same(k, r) for r in options if not last or r.name != 'invariant')

    def through(self, k, labels):
        "The sources of point k that can be read, how it is made of them, and its name."
        p = self.points[k]
        unread = [i for i in p.sources if labels[i] is None]
        if not unread:
            return p.sources, p.run, p.name
        before = [self.through(i, labels) for i in unread]
        read = {i for i in p.sources if i not in unread}
        sources = tuple(sorted(read.union(*(inner for inner, *_ in before))))
        free = {i for i in range(k) if labels[i] is None}
        first = before[0][2].split(' … ')[0]
        name = p.name if first in (p.name, '(model)') else f'{first} … {p.name}'
        return sources, self.trace.within(k, sources, free), name

    def step(self, k, labels, reading=None):
        "Point k on the bench, its sources read as the labels say."
        sources, run, name = self.through(k, labels)
        point = replace(self.points[k], sources=sources, run=run, name=name, reading=reading or Reading(''))
        return Step(self.group, point, [replace(self.points[i], reading=labels[i]) for i in sources])

    def fits(self, k, labels):
        "Each candidate for point k with its cost: 0 if it fits, 1 if not; something between where nothing is exact."
        key = k, tuple(id(labels[i]) for i in self.through(k, labels)[0]), tuple(labels[i] is None for i in self.points[k].sources)
        if key not in self.found:
            s = self.step(k, labels)
            candidates = self.candidates(k, s.sources)
            inherited = {self.same(k, r) for p in s.sources for r in (p.reading, _reshaped(p, s.point.value.shape[1:]))}
            if None in (labels[i] for i in self.points[k].sources) and all(r.odd > 2 for r in candidates):
                return {}, inherited                     # no more than before
            misfit, costs = _fitting(s), {}
            for r in candidates:
                costs[r] = self.cost(s, *misfit(r))
            if min(costs.values(), default=1) > 0:
                for r in _distinct(self.same(k, r) for r in self.vectors(k)):
                    cost = self.cost(s, *misfit(r))
                    if cost == 0:
                        costs[r] = cost
            self.found[key] = costs, inherited
        return self.found[key]

    def cost(self, s, e, allowed):
        return 0 if e <= allowed else 1 if s.exact else min(1, e)

    def vectors(self, k):
        last = k == len(self.points) - 1
        return () if last and self.points[k].value.ndim < 4 else vector_readings(self.group, self.points[k].value)

    def options(self, k, labels):
        "Labels for point k, with how many steps they make guilty, and how odd they are."
        costs, inherited = self.fits(k, labels)
        best = min(costs.values(), default=1)
        if best > 0 and not any(r.odd < 2 or r in inherited for r in costs):
            return [(0, 0, None)]                        # can't be read
        posed = any(labels[i].poses for i in self.through(k, labels)[0])
        def odd(r, c):
            return r.odd + (c > best) + 2*(c > 0 and posed and not r.poses)
        return [(c, odd(r, c), r) for r, c in costs.items() if c == 0 or r.odd < 3 or r in inherited]

    def live(self, k, labels):
        "Which of the first k points are still needed."
        need = {i for i in range(k) if self.last[i] >= k}
        for i in sorted(need, reverse=True):
            if labels[i] is None:
                need |= set(self.through(i, labels)[0])
        return need

    def search(self):
        "Best first: guilty steps, then oddness; where they tie, who has come furthest goes on."
        n, ties, seen = len(self.points), itertools.count(), set()
        heap = [(0, 0, -1, next(ties), (self.points[0].reading,))]
        while heap:
            guilty, odd, depth, _, labels = heapq.heappop(heap)
            k = -depth
            if k == n:
                return labels
            key = k, tuple((i, id(labels[i])) for i in sorted(self.live(k, labels)))
            if key in seen:
                continue
            seen.add(key)
            for c, o, r in self.options(k, labels):
                heapq.heappush(heap, (guilty + c, odd + o, -(k + 1), next(ties), (*labels, r)))
            if len(seen) > 50*n:                         # enough: only whoever has come furthest goes on
                heap = [min(heap, key=lambda h: (h[2], h[:2]))]

def _distinct(items):
    return list(dict.fromkeys(i for i in items if i is not None))

# %% 52881cd5
@patch
def read(self:Trace,
    group:FiniteGroup,
    output:str|None=None, # 'vector': the answer is an arrow in the plane, or a field of them
)->Trace:
    "Find a reading for every point: those under which the fewest steps break. Where there is none, the step is taken together with the next."
    if not isinstance(group, FiniteGroup):
        raise ValueError(f"group must be a FiniteGroup, such as CyclicGroup(8), got {group!r}")
    if output not in (None, 'vector'):
        raise ValueError(f"output must be None (what it looks like) or 'vector', got {output!r}")
    first, last, batch = self.points[0], self.points[-1], len(self.x)
    first.reading = _natural(group, first.value, batch)
    if first.reading: first.reading.poses = first.value.ndim in (3, 5)
    if first.reading is None:
        raise ValueError(f"x must be (B, C), (B, C, {group.order}), (B, C, H, W) or (B, C, {group.order}, H, W) "
                         f"for {group}, got {tuple(first.value.shape)}")
    reader = _Reader(self, group, output)
    shape = tuple(last.value.shape)
    if output == 'vector' and (len(shape) < 2 or vector_reading(shape) is None):
        raise ValueError(f"vectors are (B, 2), (B, C, 2), (B, 2C), (B, C, 2, H, W) or (B, 2C, H, W), got {shape}; reshape them")
    labels = reader.search()
    if labels[-1] is None:
        raise ValueError(f"the answer must be (B,), (B, C), (B, C, H, W) or (B, C, {group.order}, H, W), got {shape}; pool or reshape it")
    ways = [reader.through(k, labels) for k in range(len(self.points))]
    for p, reading, way in zip(self.points, labels, ways):
        p.reading = reading
        p.sources, p.run, p.name = way
    self.group = group
    return self

# %% b720fde9
@patch
def steps(self:Trace)->list: # of Step
    "Every point that was read, on the bench."
    return [Step(self.group, p, [self.points[i] for i in p.sources]) for p in self.points[1:] if p.reading is not None]

@patch
def block_steps(self:Trace):
    "Modules with parts, each taken as one piece; the innermost first."
    for name, frame, out in self.blocks:
        answer, sources = self.points[out], tuple(sorted(set(self.fed(frame))))
        if answer.reading and all(self.points[i].reading for i in sources):
            p = replace(answer, name=name, sources=sources, run=self.alone(frame, sources))
            yield Step(self.group, p, [self.points[i] for i in sources])
