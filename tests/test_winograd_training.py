"""The convolutions of training in fewer products: values and every gradient are those of the definition."""

import pytest
import torch
from torch import nn

from kl_autoencoder.network import norm_silu_conv, upsample_conv
from kl_autoencoder.winograd_training import FewerProducts, pays


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def products(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield FewerProducts()
    torch.set_num_threads(before)


def layers(into, out, groups=4):
    torch.manual_seed(into + out)
    norm, conv = nn.GroupNorm(groups, into), nn.Conv2d(into, out, 3, padding=1)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.5)
    return norm, conv


def run(function, parameters, x, dy):
    """[the result, then every gradient]"""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for p in parameters:
        p.grad = None
    y = function(x)
    y.backward(dy.to(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in parameters)]


def relative_rms(values, truths):
    return [
        ((v.double() - t).square().mean() / t.square().mean()).sqrt().item()
        for v, t in zip(values, truths, strict=True)
    ]


SHAPES = [
    (2, 64, 64, 32, 32), (2, 64, 128, 37, 41), (5, 128, 72, 24, 20), (9, 96, 64, 15, 18), (1, 64, 64, 16, 130),
]  # fmt: skip


@pytest.mark.parametrize("b, into, out, height, width", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_silu_conv(products, b, into, out, height, width, channels_last):
    norm, conv = layers(into, out)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = (torch.randn(b, into, height, width) * 2 + 1).to(memory_format=memory)
    dy = torch.randn(b, out, height, width)
    assert pays(conv, x, b * height * width)
    parameters = [*norm.parameters(), *conv.parameters()]
    ours = run(lambda x: products.norm_silu_conv(norm, conv, x), parameters, x, dy)
    plain = run(lambda x: norm_silu_conv(norm, conv, x), parameters, x, dy)
    norm, conv = norm.double(), conv.double()
    parameters = [*norm.parameters(), *conv.parameters()]
    truth = run(lambda x: norm_silu_conv(norm, conv, x), parameters, x.double(), dy.double())
    for mine, theirs in zip(relative_rms(ours, truth), relative_rms(plain, truth), strict=True):
        assert mine <= min(5 * theirs, 2e-6)


@pytest.mark.parametrize("b, into, out, height, width", SHAPES)
def test_upsample_conv(products, b, into, out, height, width):
    _, conv = layers(into, out)
    x, dy = torch.randn(b, into, height, width), torch.randn(b, out, 2 * height, 2 * width)
    ours = run(lambda x: products.upsample_conv(conv, x), list(conv.parameters()), x, dy)
    conv = conv.double()
    truth = run(lambda x: upsample_conv(conv, x), list(conv.parameters()), x.double(), dy.double())
    assert max(relative_rms(ours, truth)) <= 2e-6


def test_the_same_bits_every_time(products):
    norm, conv = layers(64, 64)
    x, dy = torch.randn(2, 64, 60, 60), torch.randn(2, 64, 60, 60)
    parameters = [*norm.parameters(), *conv.parameters()]
    first, *more = (
        run(lambda x: products.norm_silu_conv(norm, conv, x), parameters, x, dy) for _ in range(4)
    )
    for again in more:
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_where_it_does_not_pay_it_is_the_plain_way():
    norm, conv = layers(32, 32)
    x, dy = torch.randn(2, 32, 40, 40), torch.randn(2, 32, 40, 40)
    parameters = [*norm.parameters(), *conv.parameters()]
    products = FewerProducts()
    ours = run(lambda x: products.norm_silu_conv(norm, conv, x), parameters, x, dy)
    for a, b in zip(ours, run(lambda x: norm_silu_conv(norm, conv, x), parameters, x, dy), strict=True):
        assert torch.equal(a, b)
    norm, conv = layers(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.norm_silu_conv(norm, conv, torch.randn(2, 64, 40, 40)).dtype == torch.bfloat16
