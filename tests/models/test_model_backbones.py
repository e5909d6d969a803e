"""Built-in architectures: parameter counts, shapes, shortcuts, initialisation from the generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clkit.config import ModelConfig
from clkit.errors import ModelError
from clkit.models import architectures
from clkit.models.backbones.cifar_resnet import BasicBlock
from clkit.models.backbones.efficientnet_lite import EfficientNetLite0, SameConv2d


def build(name: str, shape, seed: int = 0, **options):
    return architectures.get(name)(ModelConfig(name=name, **options), shape, torch.Generator().manual_seed(seed))


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("depth", "general", "special"),
    [(8, 19088, 55552), (14, 42320, 129536), (20, 65552, 203520), (26, 88784, 277504), (32, 112016, 351488)],
)
def test_resnets_have_the_published_numbers_of_parameters(depth, general, special):
    net = build(f"cifar-resnet-{depth}", (3, 32, 32))
    assert count(net.stem) + count(net.stage1) + count(net.stage2) == general
    assert count(net.stage3) == special
    assert count(net) == general + special


def test_a_resnet_halves_the_image_twice_and_gives_64_features():
    net = build("cifar-resnet-8", (1, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 8)
    maps = net.stage2(net.stage1(net.stem(x)))
    assert maps.shape == (2, 32, 4, 4)
    assert net(x).shape == (2, net.out_features) == (2, 64)


def test_the_shortcut_takes_every_second_pixel_and_adds_empty_channels():
    block = BasicBlock(2, 5, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone (batch norm is the identity)
    x = torch.rand(1, 2, 6, 6)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 2:], torch.zeros(1, 3, 3, 3))


@pytest.mark.parametrize("name", ["mlp", "cifar-resnet-8", "efficientnet-lite0"])
def test_weights_come_from_the_generator_only(name):
    torch.manual_seed(1)
    first = build(name, (3, 8, 8), seed=3).state_dict()
    torch.manual_seed(2)
    again = build(name, (3, 8, 8), seed=3).state_dict()
    other = build(name, (3, 8, 8), seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_resnet_convolutions_have_the_stated_spread():
    net = build("cifar-resnet-32", (3, 32, 32))
    weight = net.stage3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "shape"), [("cifar-resnet-8", (64,)), ("efficientnet-lite0", (2, 8, 8)), ("mlp", None)]
)
def test_inputs_that_do_not_fit_are_refused(name, shape):
    with pytest.raises(ModelError, match=name):
        build(name, shape)


def test_an_mlp_flattens_and_has_the_given_widths():
    net = build("mlp", (1, 8, 8), hidden=[32, 16])
    assert [tuple(layer.weight.shape) for layer in net.layers] == [(32, 64), (16, 32)]
    assert net(torch.randn(5, 1, 8, 8)).shape == (5, 16)
    with pytest.raises(ModelError, match="hidden"):
        build("mlp", (4,), hidden=[])


def test_efficientnet_has_the_published_shape():
    net = EfficientNetLite0(torch.Generator(), classes=1000)
    assert len(net.state_dict()) == 296
    assert count(net) == 4_652_008
    assert len(net._blocks) == 16


def test_efficientnet_takes_grey_and_small_images():
    net = build("efficientnet-lite0", (1, 8, 12)).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 1, 8, 12)).shape == (2, 1280)
        grey = torch.rand(1, 1, 64, 64)
        assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (5, 1, 1)])
def test_same_padding_puts_the_odd_pixel_to_the_right_and_below(size, kernel, stride):
    layer = SameConv2d(1, 1, kernel, stride)
    x = torch.randn(1, 1, size, size)
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    before = total // 2
    padded = torch.zeros(1, 1, size + total, size + total)
    padded[:, :, before : before + size, before : before + size] = x
    assert torch.allclose(layer(x), F.conv2d(padded, layer.weight, stride=stride), atol=1e-6)
    assert layer(x).shape[-2:] == (out, out)
