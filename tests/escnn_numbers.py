"""What escnn's own layers measure, for the chapters to quote where it isn't installed.

`python tests/escnn_numbers.py` writes results/published/escnn_lifting.csv (seconds), `… construction` escnn_construction.csv (minutes).
escnn needs a Fortran compiler to be installed (its dependency py3nj is built from source)."""
import csv, functools, math, resource, sys, time
from datetime import date
from pathlib import Path

import torch, torch.nn.functional as F

from gcnn_stn.equivariance import equivariance_error, smooth_images
from gcnn_stn.group import CyclicGroup
from gcnn_stn.kernel import basis_operator

PUBLISHED = Path(__file__).parent.parent/'results'/'published'
KERNEL_SIZES, ORDERS = (3, 5, 7, 9), (8, 16)   # the first element of C8 turns by 45°, of C16 by 22.5°


def escnn_operator(order, k):
    "The copies (G, P, k²) of each basis function of escnn's R2Conv from images to C_n features, of norm 1 on average over the group, as ours."
    from escnn import gspaces, nn
    space = gspaces.rot2dOnR2(order)
    image, regular = nn.FieldType(space, [space.trivial_repr]), nn.FieldType(space, [space.regular_repr])
    conv, copies = nn.R2Conv(image, regular, k, padding=k//2, bias=False), []
    for unit in torch.eye(conv.weights.numel()):
        conv.weights.data = unit
        copies.append(conv.expand_parameters()[0].detach().double().flatten(1))   # (G, k²)
    R = torch.stack(copies, 1)
    return R/R.square().sum(-1, keepdim=True).mean(0, keepdim=True).sqrt()


def our_operator(order, k, basis='harmonic'): return basis_operator(CyclicGroup(order), k, basis)


# The two probes of chapter 03, for any operator R (G, P, k²).

def random_kernels_error(R, n=32, seed=0):
    "Of random kernels on smooth images, at the first element of C_G; the interpolation of the images adds a floor."
    k, weight = math.isqrt(R.shape[2]), torch.randn(n, R.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bank = (weight @ R).transpose(0, 1).reshape(-1, 1, k, k)                       # (G, n, k²) → (n·G, 1, k, k)
    lift = lambda x: F.conv2d(x, bank, padding=k//2).unflatten(1, (n, len(R)))
    return equivariance_error(lift, CyclicGroup(len(R)), smooth_images(dtype=torch.float64), [1]).item()


def waves(n=60, detail=.05, width=9., seed=0):
    "A smooth function of the plane: random slow plane waves under a Gaussian."
    g = torch.Generator().manual_seed(seed)
    k, phase, height = torch.randn(n, 2, generator=g).double()*2*math.pi*detail, 2*math.pi*torch.rand(n, generator=g).double(), torch.randn(n, generator=g).double()
    return lambda x: (height*torch.cos(x @ k.T + phase)).sum(-1)*torch.exp(-x.square().sum(-1)/(2*width**2))


def offsets(k):
    "The points of a k × k window (k², 2), x right and y up."
    p = torch.arange(k).double() - k//2
    return torch.stack(torch.meshgrid(p, -p, indexing='xy'), -1).flatten(0, 1)


def function_errors(R, f=waves()):
    "Of each basis function by itself (P,), at the first element of C_G, on a function known everywhere: free of interpolation."
    group, k = CyclicGroup(len(R)), math.isqrt(R.shape[2])
    back, u, x = group.matrix(1), offsets(k), offsets(55)
    there = torch.einsum('pu,ux->px', R[1], f((x + u[:, None]) @ back))
    here = torch.einsum('pu,ux->px', R[0], f(x @ back + u[:, None]))
    return (there - here).norm(dim=1)/here.norm(dim=1)


@functools.cache
def measure(operator, order, k):
    "One row of the table."
    R = operator(order, k)
    each = function_errors(R)
    return dict(kernel_size=k, degrees=360/order, weights=R.shape[1], random_kernels=random_kernels_error(R), mean_function=each.mean().item(), worst_function=each.max().item())


def about():
    "Which escnn, on which torch, and when."
    import escnn
    return dict(escnn=escnn.__version__, torch=torch.__version__, date=date.today().isoformat())


def write(path, rows):
    "The rows as CSV, numbers with five digits."
    rows = [{k: f'{v:.5g}' if isinstance(v, float) else v for k, v in (row | about()).items()} for row in rows]
    with open(path, 'w', newline='') as f:
        out = csv.DictWriter(f, rows[0], lineterminator='\n')
        out.writeheader(); out.writerows(rows)
    for row in rows: print(row)


def construct(initialize, channels=128, order=16, layers=5, k=5):
    "Seconds to make a network of lifting and group convolutions with norms, and the peak of memory in MiB."
    from escnn import gspaces, nn
    start, space = time.perf_counter(), gspaces.rot2dOnR2(order)
    image, regular = nn.FieldType(space, [space.trivial_repr]), nn.FieldType(space, [space.regular_repr]*channels)
    parts = [[nn.R2Conv(regular if i else image, regular, k, padding=k//2, bias=False, initialize=initialize), nn.InnerBatchNorm(regular), nn.ReLU(regular)]
             for i in range(layers)]
    net = nn.SequentialModule(*sum(parts, []), nn.GroupPooling(regular))
    seconds, weights = time.perf_counter() - start, sum(p.numel() for p in net.parameters())
    return dict(channels=channels, order=order, layers=layers, kernel_size=k, initialized=initialize, parameters=weights, seconds=seconds,
                peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, threads=torch.get_num_threads())


if __name__ == '__main__':
    if sys.argv[1:] == ['construction']: write(PUBLISHED/'escnn_construction.csv', [construct(initialize) for initialize in (False, True)])
    else: write(PUBLISHED/'escnn_lifting.csv', [measure(escnn_operator, order, k) for order in ORDERS for k in KERNEL_SIZES])
