"Networks that others wrote: converted, exact, trained, folded, exported; or refused by name."
import copy, warnings
from functools import partial

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import resnet, segmentation

from gcnn_stn.convert import Converted, convert
from gcnn_stn.fold import fold
from gcnn_stn.group import CyclicGroup, DihedralGroup, act
from gcnn_stn.layer import GroupConv2d
from gcnn_stn.manners import check_module
from gcnn_stn.posed import Posed

C4, D4 = CyclicGroup(4), DihedralGroup(4)


class UNet(nn.Module):
    "Down, up, and across."
    def __init__(self, num_classes=3):
        super().__init__()
        def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
        self.one, self.two, self.three = block(3, 8), block(8, 16), block(16, 16)
        self.back, self.out, self.drop = block(32, 8), nn.Conv2d(16, num_classes, 1), nn.Dropout2d(.2)

    def forward(self, x):
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.drop(self.three(F.avg_pool2d(two, 2)))
        up = F.interpolate(three, two.shape[-2:], mode='bilinear')
        up = F.interpolate(self.back(torch.cat([two, up], 1)), one.shape[-2:], mode='nearest')
        return self.out(torch.cat([one, up], 1))


class Decoder(nn.Module):
    "Strided down, by transposed convolutions up: with a kernel as large as its stride, with one twice as large, depthwise, and in mirrored surroundings."
    def __init__(self, num_classes=3):
        super().__init__()
        self.patch, self.down = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 16, 4, 2, 1, padding_mode='reflect')
        self.up, self.norm = nn.ConvTranspose2d(16, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.last, self.each = nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2), nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8)
        self.out = nn.Conv2d(8, num_classes, 3, padding='same', padding_mode='circular')

    def forward(self, x):
        one = self.patch(x).relu()
        two = self.norm(self.up(self.down(one).relu())).relu()
        return self.out(self.each(self.last(torch.cat([one, two], 1)).relu()))


class Attentive(nn.Module):
    "Squeeze and excitation by linear layers, dense blocks of tokens, channels last, a head of several layers."
    def __init__(self, num_classes=3):
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), nn.Linear(4, 8)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.PReLU(), nn.Linear(12, num_classes))

    def forward(self, x):
        x = self.stem(x)
        gate = self.excite(self.squeeze(x.mean((-2, -1))).relu()).sigmoid()
        x = x*gate[:, :, None, None]
        x = x + self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(F.adaptive_max_pool2d(x, 1))


lraspp = partial(segmentation.lraspp_mobilenet_v3_large, weights_backbone=None)
NETS = { # made how, pixels that fit
    'resnet': (partial(resnet.ResNet, resnet.BasicBlock, [1, 1, 1, 1]), 33), 'bottlenecks': (partial(resnet.ResNet, resnet.Bottleneck, [1]*4), 33),
    'resnext': (partial(resnet.ResNet, resnet.Bottleneck, [1]*4, groups=8, width_per_group=8), 33),
    'densenet': (partial(models.DenseNet, 8, (2, 2, 2, 2), 16), 61), 'mobilenet_v2': (models.mobilenet_v2, 33),
    'efficientnet_b0': (models.efficientnet_b0, 33), 'squeezenet1_1': (models.squeezenet1_1, 63), 'mnasnet0_5': (models.mnasnet0_5, 33),
    'lraspp': (lraspp, 65), 'unet': (UNet, 32), 'decoder': (Decoder, 32), 'attentive': (Attentive, 16),
}


def made(name, seed=0):
    "A network whose norms have statistics of their own, and an example."
    make, n = NETS[name]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = make(num_classes=3).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = .3
    with torch.no_grad():
        for _ in range(20): net.train()(torch.randn(4, 3, n, n))       # so that a signal gets through
    return net.eval(), torch.randn(2, 3, n, n)


def answer(net, x):
    y = net(x)
    return y['out'] if isinstance(y, dict) else y
def off(a, b): return ((a - b).norm()/b.norm()).item()


@pytest.mark.parametrize('name', NETS)
@torch.no_grad()
def test_exact(name):
    "Equivariant with new weights, the old network's average with its own, and the same when folded; the old one isn't touched."
    net, x = made(name)
    before = copy.deepcopy(net.state_dict())
    for pretrained in False, True:
        new = convert(net, C4, x, pretrained=pretrained)
        assert isinstance(new, Converted) and not new.training and not new.misfits
        y = answer(new, x)
        assert max(off(answer(new, act(C4, g, x)), act(C4, g, y)) for g in (1, 2, 3)) < 1e-4
        plain = fold(new)
        assert off(answer(plain, x), y) < 1e-4 and not any(type(m).__module__.startswith('gcnn_stn') for m in plain.modules())
        if pretrained:
            each = torch.stack([act(C4, g, answer(net, act(C4, C4.inverse(g), x))) for g in range(4)])
            assert off(y, each.mean(0)) < 1e-5 and off(each[0], y) > 1e-3     # they differ, and it is their mean
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


@pytest.mark.parametrize('name', ['unet', 'decoder', 'attentive'])
def test_trained(name):
    "A few steps of training: finite, less loss, and still equivariant; the state goes through a file's dictionary."
    net, x = made(name)
    new = convert(net.train(), D4, x, pretrained=True)
    assert new.training
    optimizer, losses = torch.optim.SGD(new.parameters(), .01), []
    target = torch.zeros(len(x), dtype=torch.long) if answer(new, x).ndim == 2 else torch.zeros(len(x), *x.shape[-2:], dtype=torch.long)
    for _ in range(4):
        loss = F.cross_entropy(answer(new, x), target)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
    new.eval()
    with torch.no_grad():
        y = answer(new, x)
        assert max(off(answer(new, act(D4, g, x)), act(D4, g, y)) for g in D4.elements()) < 1e-4
        twin = convert(net.eval(), D4, x, pretrained=True)
        twin.load_state_dict(new.state_dict())
        assert torch.equal(answer(twin, x), y)


def test_manners():
    net, x = made('unet')
    check_module(convert(net, C4, x), torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize('width', ['parameters', 'flops'])
def test_width(width):
    "One of them stays, within a tenth."
    from gcnn_stn.model import count_flops, count_parameters
    count = count_parameters if width == 'parameters' else partial(count_flops, shape=(3, 33, 33))
    net, x = made('resnet')
    assert abs(count(convert(net, C4, x, width=width))/count(net) - 1) < .1


@pytest.mark.parametrize('width', ['parameters', 'flops'])
@pytest.mark.parametrize('name', ['unet', 'lraspp', 'decoder', 'squeezenet1_1'])
def test_answer_keeps_its_channels(name, width):
    "A class for each pixel, or for each image, stays one, however narrow the network becomes."
    net, x = made(name)
    new = convert(net, C4, x, width=width).eval()
    with torch.no_grad():
        assert answer(new, x).shape == answer(net, x).shape
        assert off(answer(new, act(C4, 1, x)), act(C4, 1, answer(new, x))) < 1e-4


WHY = { # network → pixels, what is said
    'vgg11_bn': (models.vgg11_bn, 64, r'classifier\.0 \(Linear\) reads each place'),
    'shufflenet': (models.shufflenet_v2_x1_0, 65, r'the code of the network itself mixes'),
    'convnext': (models.convnext_tiny, 64, r'meets features .*\(features\.1\.0\.layer_scale\)'),
    'vit': (partial(models.VisionTransformer, 35, 5, 1, 2, 8, 8), 35, r'meets features .*\(class_token\)|must not know numbers of channels'),
}


@pytest.mark.parametrize('name', WHY)
def test_refused(name):
    make, n, why = WHY[name]
    with pytest.raises(ValueError, match=why): convert(make(num_classes=3), C4, torch.randn(2, 3, n, n))


ALONE = { # a layer behind a convolution → what is said
    'oblong': (nn.Conv2d(4, 4, (3, 1)), 'conv: kernel_size must be the same for height and width'),
    'strides': (nn.Conv2d(4, 4, 3, (1, 2)), 'conv: stride must be the same'),
    'half': (nn.Conv2d(4, 4, 2, padding='same'), 'conv: padding=.same. must be the same on both sides'),
    'one side': (nn.ConvTranspose2d(4, 4, 3, 2, 1, 1), 'conv: output_padding must be 0'),
}


@pytest.mark.parametrize('name', ALONE)
def test_refused_layers(name):
    layer, why = ALONE[name]
    net = nn.Sequential()
    net.add_module('lift', nn.Conv2d(3, 4, 3))
    net.add_module('conv', layer)
    with pytest.raises(ValueError, match=why): convert(net, C4, torch.randn(2, 3, 9, 9))
    if name != 'strides': assert type(convert(net[:1], C4, torch.randn(2, 3, 9, 9))) is Converted


def test_even_kernels_need_pixels():
    "On C8 there is no basis for them, and it is said."
    with pytest.raises(ValueError, match=r"stem: kernel_size must be odd.*basis 'pixel' on C4"):
        net = nn.Sequential()
        net.add_module('stem', nn.Conv2d(3, 4, 4, 4))
        convert(net, CyclicGroup(8), torch.randn(2, 3, 16, 16))


def test_one_layer():
    "A single convolution becomes one whose answer turns along."
    new, x = convert(nn.Conv2d(1, 3, 3), C4, torch.randn(2, 1, 9, 9)), torch.randn(2, 1, 9, 9)
    assert off(new(act(C4, 1, x)), act(C4, 1, new(x))) < 1e-5


def test_several_answers():
    "A tuple stays a tuple."
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)
        def forward(self, x):
            y = self.conv(x).relu()
            return y, self.head(y.mean((2, 3)))
    new, x = convert(Two(), C4, torch.randn(2, 1, 9, 9)), torch.randn(2, 1, 9, 9)
    maps, numbers = new(x)
    assert maps.shape == (2, 4, 9, 9) and off(new(act(C4, 1, x))[0], act(C4, 1, maps)) < 1e-5 and off(new(act(C4, 1, x))[1], numbers) < 1e-5


def test_shared_and_unused():
    "A layer that stands in two places stays one; one that isn't called stays what it was."
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
            self.again, self.unused, self.act = self.conv, nn.Conv2d(4, 4, 3), nn.ReLU()
        def forward(self, x): return self.head(self.act(self.again(self.act(self.conv(self.lift(x))))).mean((2, 3)))
    new = convert(Twice(), C4, torch.randn(2, 1, 9, 9))
    assert new.model.conv is new.model.again and isinstance(new.model.conv, Posed) and isinstance(new.model.conv.layer, GroupConv2d)
    assert type(new.model.unused) is nn.Conv2d
    class Both(Twice):
        def forward(self, x): return self.act(self.lift(self.lift(x).mean(1, keepdim=True)))
    with pytest.raises(ValueError, match='lift is used for images and for features'): convert(Both(), C4, torch.randn(2, 1, 9, 9))
