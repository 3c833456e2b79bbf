"""The network against diffusers' AutoencoderKL: names, shapes, outputs, gradients, and how it may be run."""

import pytest
import torch
from diffusers import AutoencoderKL

from kl_autoencoder.networks.convolutional import Decoder, Encoder
from tests.published import PUBLISHED, reduced


def networks(config):
    """Our encoder and decoder, and diffusers' with the same weights."""
    torch.manual_seed(0)
    reference = AutoencoderKL(**config)
    shape = (config["block_out_channels"], config["layers_per_block"], config.get("norm_num_groups", 32))
    attention = config.get("mid_block_add_attention", True)
    encoder = Encoder(3, config["latent_channels"], *shape, attention)
    decoder = Decoder(config["latent_channels"], 3, *shape, attention)
    encoder.load_state_dict(reference.encoder.state_dict())
    decoder.load_state_dict(reference.decoder.state_dict())
    return (encoder, decoder), (reference.encoder, reference.decoder)


def inputs(config, size=(48, 32), batch=2):
    generator = torch.Generator().manual_seed(1)
    f = 2 ** (len(config["block_out_channels"]) - 1)
    images = torch.rand(batch, 3, *size, generator=generator) * 2 - 1
    z = torch.randn(batch, config["latent_channels"], size[0] // f, size[1] // f, generator=generator)
    return images, z


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_at_full_width(name):
    with torch.device("meta"):
        ours, theirs = networks(PUBLISHED[name])
    for our, their in zip(ours, theirs, strict=True):
        names_and_shapes = [(k, v.shape) for k, v in our.state_dict().items()]
        assert names_and_shapes == [(k, v.shape) for k, v in their.state_dict().items()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", PUBLISHED)
def test_outputs_and_gradients_equal_diffusers(name, memory_format):
    config = reduced(PUBLISHED[name])
    ours, theirs = networks(config)
    for our, their, x in zip(ours, theirs, inputs(config), strict=True):
        our.to(memory_format=memory_format)
        out, expected = our(x.to(memory_format=memory_format)), their(x)
        assert relative(out, expected) < 1e-5
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        references = dict(their.named_parameters())
        for key, parameter in our.named_parameters():
            # a key's bias moves every score of a query alike: its true gradient is zero
            if not key.endswith("to_k.bias"):
                assert relative(parameter.grad, references[key].grad) < 1e-4, key


@pytest.mark.parametrize("groups, widths, layers", [(8, (16, 24), 1), (1, (5, 7, 9), 3), (32, (32,), 2)])
def test_other_shapes(groups, widths, layers):
    levels = len(widths)
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 3,
    }
    ours, theirs = networks(config)
    for our, their, x in zip(ours, theirs, inputs(config, (24, 36)), strict=True):
        assert relative(our(x), their(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_as_close_as_diffusers(dtype):
    config = reduced(PUBLISHED["sd"])
    ours, theirs = networks(config)
    for our, their, x in zip(ours, theirs, inputs(config), strict=True):
        with torch.no_grad():
            exact = our(x)
            with torch.autocast("cpu", dtype):
                cast, cast_theirs = our(x), their(x)
            half, half_theirs = our.to(dtype)(x.to(dtype)), their.to(dtype)(x.to(dtype))
        assert cast.dtype == half.dtype == dtype
        for result, reference in ((cast, cast_theirs), (half, half_theirs)):
            assert rms(result - exact) < 1.3 * rms(reference - exact)


def rms(x):
    return x.float().square().mean().sqrt()


def test_gradient_checkpointing_and_compile_change_nothing():
    """With fullgraph a graph break would raise."""
    config = reduced(PUBLISHED["sd"])
    ours, _ = networks(config)
    for our, x in zip(ours, inputs(config), strict=True):
        plain = gradients(our, our, x)
        for stage in our.modules():
            if hasattr(stage, "gradient_checkpointing"):
                stage.gradient_checkpointing = True
                stage._gradient_checkpointing_func = checkpoint
        recomputed = gradients(our, our, x)
        torch._dynamo.reset()
        compiled = gradients(our, torch.compile(our, fullgraph=True, backend="aot_eager"), x)
        for key in plain:
            torch.testing.assert_close(recomputed[key], plain[key], rtol=0, atol=0)
            torch.testing.assert_close(
                compiled[key], plain[key], rtol=1e-4, atol=1e-5 * plain[key].abs().max().item()
            )


def checkpoint(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


def gradients(network, call, x):
    network.zero_grad()
    call(x).square().mean().backward()
    return {k: p.grad.clone() for k, p in network.named_parameters()}
