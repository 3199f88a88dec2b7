"Kinds of images (their numbers, range, colour, layout) through training, judging, checkpoints and export: one answer, or a ValueError."
import copy
import pickle
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from gcnn_stn.fold import fold
from gcnn_stn.group import CyclicGroup
from gcnn_stn.model import CNN, GCNN, STCNN, Normalized, published_gcnn
from gcnn_stn.stacked import fit_stacked
from gcnn_stn.train import (Speed, TrainConfig, evaluate, fit, load_checkpoint, measure_equivariance, predict,
                            save_checkpoint)


def photos(n=120, channels=3, size=14, seed=0):
    "Bytes and labels: a bright bar that lies or stands, on a ground of a colour cast."
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(150, 200, (n, channels, size, size), generator=g)
    x -= 60*torch.arange(channels)[:, None, None]//max(1, channels - 1)
    y = torch.randint(2, (n,), generator=g)
    for image, label, place in zip(x, y, torch.randint(size - 2, (n,), generator=g)):
        bar = image[:, place:place + 2] if label else image[:, :, place:place + 2]
        bar += 12
    return x.to(torch.uint8), y


def small(channels=3, seed=0):
    "A plain network; `seed` decides its weights."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(channels, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveMaxPool2d(1),
                             nn.Flatten(), nn.Linear(6, 2))


X, Y = photos()
CONFIG = TrainConfig(epochs=6, batch_size=20, lr=.03)
THEIRS = dict(mean=.1307, std=.3081)   # MNIST's


@pytest.fixture(scope='module')
def trained():
    net = small()
    fit(net, (X, Y), config=CONFIG, progress=False)
    return net.eval()


IMAGES = {   # from bytes; how near the logits must be
    'bytes': (lambda x: x, 1e-6),
    'float32': (lambda x: x.float()/255, 1e-6),
    'float64': (lambda x: x.double()/255, 1e-6),
    'float16': (lambda x: x.half()/255, 2e-2),
    'bfloat16': (lambda x: x.bfloat16()/255, 2e-1),
    'channels last': (lambda x: x.contiguous(memory_format=torch.channels_last), 1e-5),
    'a view': (lambda x: torch.stack([x, x], dim=-1)[..., 0], 1e-6),
    'with a gradient': (lambda x: (x.float()/255).requires_grad_(), 1e-6),
    'a little beyond [0, 1]': (lambda x: x.float()/255 + 1e-6, 1e-4),
}
NETS = {     # of the trained network; how near the logits must be
    'itself': (lambda net: net, 1e-6),
    'copied': (copy.deepcopy, 1e-6),
    'pickled': (lambda net: pickle.loads(pickle.dumps(net)), 1e-6),
    'float64': (lambda net: copy.deepcopy(net).double(), 1e-5),
    'float16': (lambda net: copy.deepcopy(net).half(), 2e-2),
    'bfloat16': (lambda net: copy.deepcopy(net).bfloat16(), 2e-1),
    'compiled': (lambda net: torch.compile(net, backend='eager'), 1e-6),
    'parallel': (nn.DataParallel, 1e-6),
    'both': (lambda net: torch.compile(nn.DataParallel(net), backend='eager'), 1e-6),
    'eats pixels': (Normalized, 1e-6),
    'folded': (fold, 1e-4),
}


@contextmanager
def default_dtype(dtype):
    "What a user may have set for all of a program."
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(before)


DEFAULTS = {
    'as they are': nullcontext,
    'default float64': lambda: default_dtype(torch.float64),
    'default float16': lambda: default_dtype(torch.float16),
    'default meta': lambda: torch.device('meta'),   # stands for a graphics card: what forgets a device ends up there
    'no gradients': torch.no_grad,
}


def near(a, b, most): return (a.double() - b.double()).abs().max() <= most*max(1, b.abs().max())


@pytest.mark.parametrize('images', IMAGES)
@pytest.mark.parametrize('net', NETS)
def test_one_answer(trained, images, net):
    "Each kind of image, each precision and wrapper of the network: the logits that it was trained to give."
    (image, loose), (make, tight) = IMAGES[images], NETS[net]
    other, x = make(trained), image(X)
    wanted = predict(trained, X)
    most = max(loose, tight)
    assert near(predict(other, x), wanted, most)
    assert evaluate(trained, X, Y) > .9 and abs(evaluate(other, x, Y) - evaluate(trained, X, Y)) < .05
    assert abs(measure_equivariance(other, x, 4) - measure_equivariance(trained, X, 4)) < max(1e-4, 2*most)


def off(ours, right):
    "The largest difference between statistics."
    return max(abs(a - b) for us, they in zip(ours, right) for a, b in zip(us, they))


@pytest.fixture(scope='module')
def usual():
    "A run on bytes, in float32, under torch's own defaults."
    net = small()
    return fit(net, (X, Y), (X, Y), CONFIG, progress=False), net


@pytest.mark.parametrize('default', DEFAULTS)
@pytest.mark.parametrize('images', IMAGES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_training(usual, images, default, dtype):
    "The loss goes the same way whatever the kind of the images, and whatever torch's defaults are."
    history, wanted = usual
    image, loose = IMAGES[images]
    x, net = image(X), small().to(dtype)
    with DEFAULTS[default]():
        losses = [record['loss'] for record in fit(net, (x, Y), (x, Y), CONFIG, progress=False)]
        accuracy = evaluate(net, x, Y)
    assert abs(losses[0] - history[0]['loss']) < max(1e-4, loose)
    assert accuracy > .9 and evaluate(wanted, X, Y) > .9
    assert off(net.pixel_statistics, wanted.pixel_statistics) < max(2e-4, loose/50)
    assert {p.dtype for p in net.parameters()} == {dtype}


@pytest.mark.parametrize('default', DEFAULTS)
def test_defaults(trained, default):
    "Judging under whatever defaults."
    wanted = predict(trained, X), evaluate(trained, X, Y), measure_equivariance(trained, X, 4)
    with DEFAULTS[default]():
        found = predict(trained, X), evaluate(trained, X, Y), measure_equivariance(trained, X, 4)
        eaten = Normalized(trained)(X)
    assert torch.equal(found[0], wanted[0]) and found[1:] == wanted[1:]
    assert near(eaten, wanted[0], 1e-6)


MAKERS = {
    'plain': small,
    'GCNN': lambda: GCNN(CyclicGroup(4), (2, 3), (5, 3), in_channels=3, classes=2),
    'CNN': lambda: CNN((3, 4), (5, 3), in_channels=3, classes=2),
    'STCNN': lambda: STCNN((3, 4), (5, 3), in_channels=3, classes=2),
}


def spread(x):
    "Mean and standard deviation of each channel of bytes."
    x = x.double()/255
    return x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3), correction=0).tolist()


GIVEN = (.6, .5, .4), (.1, .2, .3)


@pytest.mark.parametrize('given', [None, GIVEN])
@pytest.mark.parametrize('make', MAKERS)
def test_statistics_travel(make, given, tmp_path):
    "They are the training images', or those given; used without being asked; and come back from a checkpoint."
    net, other, path = MAKERS[make](), MAKERS[make](), tmp_path/'net.s0'
    mean, std = given or (None, None)
    config = TrainConfig(epochs=1, lr=1e-3, mean=mean, std=std)
    fit(net, (X, Y), config=config, progress=False, checkpoint=path)
    assert off(net.pixel_statistics, given or spread(X)) < 1e-4

    mean, std = net.pixel_statistics
    wanted = predict(net, X)
    assert torch.equal(wanted, predict(net, X, mean=mean, std=std))
    assert not near(wanted, predict(net, X, **THEIRS), 1e-3)   # the check can fail

    for write in (lambda: None), (lambda: save_checkpoint(path, net)):   # by `fit`, and by hand
        write()
        load_checkpoint(path, other)
        assert other.pixel_statistics == net.pixel_statistics
        assert torch.equal(predict(other, X), wanted)


def test_training_goes_on(trained):
    "With the statistics that a network knows, although the images are others; unless others are given."
    net, before = copy.deepcopy(trained), trained.pixel_statistics
    fit(net, (255 - X, Y), config=TrainConfig(epochs=1), progress=False)
    assert net.pixel_statistics == before
    fit(net, (255 - X, Y), config=TrainConfig(epochs=1, mean=.5), progress=False)
    assert net.pixel_statistics == (.5, before[1])


def test_known_before():
    "The published networks know MNIST's numbers; weights from elsewhere are told theirs."
    x, y = photos(20, channels=1, size=28)
    net = published_gcnn(4, 2, 2)
    assert torch.equal(predict(net, x), predict(net, x, **THEIRS))
    net = small()
    net.pixel_statistics = (.485, .456, .406), (.229, .224, .225)
    assert predict(net, X).shape == (len(X), 2)


def test_stacked():
    "Each run of a stack has the statistics of its own images, as if it were alone."
    sets = [(X[i::2], Y[i::2]) for i in range(2)]
    sets[1] = sets[1][0]//2, sets[1][1]
    configs = [TrainConfig(epochs=2, batch_size=20, lr=1e-3, rotate=True, seed=s) for s in range(2)]
    stacked, alone = ([small(seed=s).double() for s in range(2)] for _ in range(2))
    fit_stacked(stacked, sets, sets, configs, progress=False)
    for one, two, data, config in zip(stacked, alone, sets, configs):
        fit(two, data, data, config, progress=False)
        assert one.pixel_statistics == two.pixel_statistics
        for a, b in zip(one.state_dict().values(), two.state_dict().values()): assert near(a.double(), b.double(), 1e-8)
    assert stacked[0].pixel_statistics != stacked[1].pixel_statistics
    for image, _ in IMAGES.values():
        x = image(X)
        fit_stacked([small(), small()], [(x, Y)]*2, [(x, Y)]*2, configs, progress=False)


@pytest.mark.parametrize('kind', ['bytes', 'float32'])
@pytest.mark.parametrize('how', ['torch.export', 'ONNX'])
@pytest.mark.parametrize('make', ['plain', 'GCNN'])
def test_export(make, how, kind, tmp_path):
    "The exported network eats pixels, and gives the logits of `predict`."
    net = MAKERS[make]()
    fit(net, (X, Y), config=TrainConfig(epochs=1), progress=False)
    wanted, x = predict(net, X), IMAGES[kind][0](X)
    eats = Normalized(fold(net), *net.pixel_statistics).eval()
    if how == 'torch.export': out = torch.export.export(eats, (x,)).module()(x)
    else:
        onnxruntime = pytest.importorskip('onnxruntime')
        torch.onnx.export(eats, (x,), tmp_path/'net.onnx', dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path/'net.onnx', providers=['CPUExecutionProvider'])
        out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert near(out, wanted, 1e-4)


def broken(value):
    "Images with one bad pixel."
    x = X.float()/255
    x[3, 1, 2, 2] = value
    return x


BAD_IMAGES = {   # what is wrong → images, and what is said
    'nan': (broken(torch.nan), 'must hold finite numbers'),
    'infinity': (broken(torch.inf), 'must hold finite numbers'),
    'float bytes': (X.float(), 'must be images in [0, 1], or bytes, got numbers from'),
    'float16 bytes': (X.half(), 'must be images in [0, 1], or bytes, got numbers from'),
    'normalised': ((X.float()/255 - .6)/.1, 'if they are normalised already, say so by mean=0 and std=1'),
    'negative': (-X.float()/255, 'must be images in [0, 1]'),
    'int64': (X.long(), 'uint8 in [0, 255] or floating in [0, 1], got torch.int64'),
    'int8': (X.to(torch.int8), 'uint8 in [0, 255] or floating in [0, 1], got torch.int8'),
    'bool': (X > 128, 'uint8 in [0, 255] or floating in [0, 1], got torch.bool'),
    'complex': (X.to(torch.complex64), 'uint8 in [0, 255] or floating in [0, 1], got torch.complex64'),
    'grey': (X[:, :1], ''),
    'four channels': (torch.cat([X, X[:, :1]], dim=1), ''),
    'channels at the end': (X.movedim(1, -1), ''),
    'too small': (X[..., :3, :3], 'torch says'),
    'no channels': (X[:, 0], 'images (N, C, H, W)'),
    'a single image': (X[0], 'images (N, C, H, W)'),
    'an array': (X.numpy(), 'tensor'),
    'a list': (X.tolist(), 'tensor'),
}


@pytest.mark.parametrize('wrong', BAD_IMAGES)
def test_images_refused(trained, wrong):
    "In words, wherever they come in; and the network is left as it was."
    x, said = BAD_IMAGES[wrong]
    good, state = (X, Y), copy.deepcopy(trained.state_dict())
    short = TrainConfig(epochs=1)
    for f in (lambda: fit(trained, (x, Y), config=short, progress=False),
              lambda: fit(trained, good, (x, Y), short, progress=False),
              lambda: fit_stacked([copy.deepcopy(trained)], [(x, Y)], [None], [short], progress=False),
              lambda: fit_stacked([copy.deepcopy(trained)], [good], [(x, Y)], [short], progress=False),
              lambda: predict(trained, x), lambda: evaluate(trained, x, Y), lambda: measure_equivariance(trained, x, 4)):
        with pytest.raises(ValueError) as e: f()
        assert said in str(e.value), str(e.value)
    assert all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())


BAD_LABELS = {
    'too large': (Y + 1, 'labels from 1 to 2'),
    'negative': (Y - 1, 'labels from -1 to 0'),
    'int32': (Y.int(), 'y.long()'),
    'uint8': (Y.byte(), 'y.long()'),
    'float': (Y.float(), 'y.long()'),
    'bool': (Y.bool(), 'y.long()'),
    'one-hot': (nn.functional.one_hot(Y), 'y.argmax(dim=1)'),
    'shares': (nn.functional.one_hot(Y).float(), 'y.argmax(dim=1)'),
    'a column': (Y[:, None], 'y[:, 0]'),
    'too few': (Y[:-1], 'must be images (N, C, H, W) and int64 labels (N,)'),
    'none': (Y[:0], 'must be images (N, C, H, W) and int64 labels (N,)'),
    'an array': (Y.numpy(), 'labels of'),
    'a list': (Y.tolist(), 'labels of'),
}


@pytest.mark.parametrize('wrong', BAD_LABELS)
def test_labels_refused(trained, wrong):
    "For training and for validation alike."
    y, said = BAD_LABELS[wrong]
    good, short = (X, Y), TrainConfig(epochs=1)
    for f in (lambda: fit(trained, (X, y), config=short, progress=False),
              lambda: fit(trained, good, (X, y), short, progress=False),
              lambda: fit_stacked([copy.deepcopy(trained)], [(X, y)], [None], [short], progress=False),
              lambda: fit_stacked([copy.deepcopy(trained)], [good], [(X, y)], [short], progress=False),
              lambda: evaluate(trained, X, y)):
        with pytest.raises(ValueError) as e: f()
        assert said in str(e.value), str(e.value)


def net_of(**kwargs):
    net = small()
    for k, v in kwargs.items(): setattr(net, k, v)
    return net


BAD_CALLS = {   # a call, and what is said
    'unknown statistics': (lambda: predict(small(), X), 'mean and std of the pixels must be known'),
    'only a part knows': (lambda: predict(nn.Sequential(net_of(pixel_statistics=(.5, .5)), nn.Softmax(1)), X), 'whose 0 has (0.5, 0.5)'),
    'only a part knows, training': (lambda: fit(nn.Sequential(net_of(pixel_statistics=(.5, .5)), nn.ReLU()), (X, Y)), 'whose 0 has (0.5, 0.5)'),
    'two channels known': (lambda: predict(net_of(pixel_statistics=((.5, .5), .1)), X), 'mean must be one number or one for each channel'),
    'nonsense known': (lambda: predict(net_of(pixel_statistics=.5), X), 'pixel_statistics must be a pair'),
    'mean': (lambda: predict(small(), X, mean='0', std=1), 'mean must be a number'),
    'std': (lambda: evaluate(small(), X, Y, mean=0, std=0), 'std must be a positive number'),
    'std of one': (lambda: measure_equivariance(small(), X, mean=0, std=(1, -1, 1)), 'std must be a positive number'),
    'batches of none': (lambda: predict(small(), X, batch_size=0, **THEIRS), 'batch_size must be a positive integer'),
    'batches of a half': (lambda: measure_equivariance(small(), X, batch_size=.5), 'batch_size must be a positive integer'),
    'degrees': (lambda: predict(small(), X, degrees=90, **THEIRS), 'one angle for each image, got 90'),
    'speed': (lambda: predict(small(), X, speed='bfloat16', **THEIRS), 'speed must be of class Speed'),
    'no module': (lambda: predict(abs, X, **THEIRS), 'model must be of class Module'),
    'no module to train': (lambda: fit(abs, (X, Y)), 'model must be of class Module'),
    'no images': (lambda: measure_equivariance(small(), X[:0]), 'at least one image'),
    'an order of words': (lambda: measure_equivariance(small(), X, 'eight'), 'order must be'),
    'orders': (lambda: measure_equivariance(small(), X, [4]), 'order must be'),
    'no such layer': (lambda: measure_equivariance(small(), X, 4, 'body'), "layer must be None or a module of the model, got 'body'"),
    'no layer': (lambda: measure_equivariance(small(), X, 4, 3), 'layer must be None or a module of the model, got 3'),
    'two tensors': (lambda: predict(nn.AdaptiveMaxPool2d(1, return_indices=True), X, **THEIRS), 'one tensor'),
    'half-precision weights': (lambda: fit(small().half(), (X, Y), progress=False), 'must be float32 or float64, got 0.weight of torch.float16'),
    'a loader': (lambda: fit(small(), torch.utils.data.DataLoader(list(zip(X, Y))), progress=False), 'must be a pair, images and labels, got a DataLoader'),
    'stacked, no lists': (lambda: fit_stacked(iter([small()]), [(X, Y)], [None], [CONFIG]), 'models must be a list'),
    'stacked, no configuration': (lambda: fit_stacked([small()], [(X, Y)], [None], [None]), 'config must be of class TrainConfig'),
    'stacked, no speed': (lambda: fit_stacked([small()], [(X, Y)], [None], [CONFIG], speed='compile'), 'speed must be of class Speed'),
    'stacked, no bar': (lambda: fit_stacked([small()], [(X, Y)], [None], [CONFIG], progress=3), 'progress must be'),
}


@pytest.mark.parametrize('wrong', BAD_CALLS)
def test_calls_refused(wrong):
    call, said = BAD_CALLS[wrong]
    with pytest.raises(ValueError) as e: call()
    assert said in str(e.value), str(e.value)


@pytest.mark.parametrize('last', ['contiguous', 'channels_last'])
def test_batches_of_one(last):
    "One image a step, through the norms, is what the loop written out does, in both layouts."
    config, x, y = TrainConfig(epochs=1, batch_size=1, lr=1e-3, schedule='constant', mean=.5, std=.2), X[:12], Y[:12]
    ours, theirs = (GCNN(CyclicGroup(4), (2, 3), (5, 3), in_channels=3, classes=2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fit(ours, (x, y), config=config, progress=False, speed=Speed(channels_last=last == 'channels_last'))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=config.weight_decay)
    for i in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist():
        optimizer.zero_grad()
        logits = theirs((x[i:i + 1].double()/255 - .5)/.2)
        nn.functional.cross_entropy(logits, y[i:i + 1]).backward()
        optimizer.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()): assert near(a, b, 1e-6)
