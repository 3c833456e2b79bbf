"""Winograd convolutions in training: values and all gradients equal those of the plain convolutions."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference.winograd_autograd import WinogradOps, is_profitable
from kl_autoencoder.networks.convolutional import norm_silu_conv, upsample_conv
from train.autoencoder.model import choose_backward


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def products(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield WinogradOps()
    torch.set_num_threads(before)


def layers(into, out, groups=4):
    torch.manual_seed(into + out)
    norm, conv = nn.GroupNorm(groups, into), nn.Conv2d(into, out, 3, padding=1)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.5)
    return norm, conv


def run(function, parameters, x, dy):
    """[result, gradient of x, gradients of the parameters]"""
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
    assert is_profitable(conv, x, b * height * width)
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


def test_where_winograd_is_not_profitable_the_plain_convolution_is_used():
    norm, conv = layers(32, 32)
    x, dy = torch.randn(2, 32, 40, 40), torch.randn(2, 32, 40, 40)
    parameters = [*norm.parameters(), *conv.parameters()]
    products = WinogradOps()
    ours = run(lambda x: products.norm_silu_conv(norm, conv, x), parameters, x, dy)
    for a, b in zip(ours, run(lambda x: norm_silu_conv(norm, conv, x), parameters, x, dy), strict=True):
        assert torch.equal(a, b)
    norm, conv = layers(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.norm_silu_conv(norm, conv, torch.randn(2, 64, 40, 40)).dtype == torch.bfloat16


def test_threads_do_not_share_scratch_memory():
    """Each of three threads gets, again and again, the gradients that it gets alone."""
    products, work = WinogradOps(), []
    for seed in range(3):
        norm, conv = layers(64, 64 + 8 * seed)
        x, dy = torch.randn(1, 64, 48, 48), torch.randn(1, 64 + 8 * seed, 48, 48)
        work.append((norm, conv, x, dy))

    def gradients(norm, conv, x, dy):
        parameters = [*norm.parameters(), *conv.parameters()]
        return run(lambda x: products.norm_silu_conv(norm, conv, x), parameters, x, dy)

    alone, together = [gradients(*one) for one in work], [[] for _ in work]
    threads = [
        threading.Thread(target=lambda i=i: together[i].extend(gradients(*work[i]) for _ in range(6)))
        for i in range(len(work))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, results in zip(alone, together, strict=True):
        assert len(results) == 6
        assert all(torch.equal(a, b) for result in results for a, b in zip(wanted, result, strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))])
def test_a_model_in_training_can_be_copied(duplicate):
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=(64, 64), norm_num_groups=4, mid_block_add_attention=False)
    choose_backward(vae, "norms")
    images, gradients = torch.randn(1, 3, 64, 64), []
    vae.encode(images).latent_dist.mode().sum().backward()  # has scratch memory now
    for model in (vae, duplicate(vae)):
        model.zero_grad()
        model.encode(images).latent_dist.mode().sum().backward()
        gradients.append([p.grad for p in model.encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
