"""Executing a network in pieces equals executing it whole: sizes, strips, widths, types, threads, kernels."""

import random

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference.conv import DirectConv, DirectDownsample, DirectUpsample
from kl_autoencoder.inference.dispatch import infer_in_pieces
from kl_autoencoder.inference.executor import Executor
from kl_autoencoder.inference.group_norm import Statistics
from kl_autoencoder.inference.memory import Arena, Workspace
from kl_autoencoder.inference.winograd import (
    BatchedProducts,
    GroupedProducts,
    SeparateProducts,
    WinogradConv,
    WinogradUpsample,
)
from kl_autoencoder.inference.workers import Workers
from tests.processes import run_python
from tests.published import PUBLISHED, reduced

CPU = torch.device("cpu")
WIDTHS = [(8,), (8, 16), (64, 64), (16, 8, 24), (8, 72, 64), (8, 8, 8, 16)]  # Winograd from 64 channels on


def random_case(seed):
    """A model with random weights, images for it, and a strip height (None: by size in bytes)."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    widths = pick.choice(WIDTHS)
    vae = KLAutoencoder(
        block_out_channels=widths, layers_per_block=pick.choice([1, 2]), norm_num_groups=pick.choice([1, 4, 8]),
        latent_channels=pick.choice([1, 4, 16]), mid_block_add_attention=pick.random() < 0.6,
        use_quant_conv=pick.random() < 0.5, use_post_quant_conv=pick.random() < 0.5,
    ).eval()  # fmt: skip
    for p in vae.parameters():  # norms and biases that do something
        if p.ndim == 1:
            nn.init.normal_(p, mean=0.5, std=0.5)
    f = vae.downsampling
    height, width = (f * pick.randint(1, max(1, 40 // f)) for _ in range(2))
    images = torch.randn(pick.choice([1, 1, 2, 3]), 3, height, width)
    return vae, images, pick.choice([4, 8, 12, 16, 20, 40, None])


def worst(ours, whole):
    """The largest difference, relative to the range of the output."""
    return ((ours - whole).abs().max() / (whole.max() - whole.min()).clamp(min=1e-3)).item()


def both_ways(vae, images, rows, **more):
    """(in pieces, whole) for the encoder and for the decoder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for small tensors on busy cores
    with torch.no_grad():
        moments = vae.encoder(images)
        z = moments.chunk(2, dim=1)[0].contiguous()
        z = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
        images_again = vae.decoder(z)
    torch.set_num_threads(threads)
    yield infer_in_pieces(vae.encoder, images, rows=rows, **more), moments
    yield infer_in_pieces(vae.decoder, z, rows=rows, **more), images_again


@pytest.mark.parametrize("tens", range(22))
def test_pieces_equal_the_whole(tens, two_threads):
    for seed in range(10 * tens, 10 * tens + 10):
        vae, images, rows = random_case(seed)
        for ours, whole in both_ways(vae, images, rows):
            assert ours.shape == whole.shape and ours.is_contiguous()
            assert worst(ours, whole) <= 2e-5, (seed, vae.config, images.shape, rows)


def test_pieces_equal_the_whole_to_the_last_digits_of_float64(two_threads):
    for seed in range(300, 330):
        vae, images, rows = random_case(seed)
        for ours, whole in both_ways(vae.double(), images.double(), rows):
            assert worst(ours, whole) <= 1e-12, (seed, vae.config, images.shape, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_errors_are_no_larger_than_those_of_the_whole(dtype, two_threads):
    errors = []
    for seed in (1, 4, 7, 402, 405):
        vae, images, rows = random_case(seed)
        vae, images = vae.to(dtype).double(), images.to(dtype).double()
        truths = [whole for _, whole in both_ways(vae, images, rows)]
        for (ours, whole), truth in zip(
            both_ways(vae.to(dtype), images.to(dtype), rows), truths, strict=True
        ):
            assert ours.dtype == dtype
            rms = [((out.double() - truth).square().mean() / truth.var()).sqrt() for out in (ours, whole)]
            errors.append((rms[0] / rms[1]).item())
    assert sum(errors) / len(errors) <= 1.1, errors
    assert max(errors) <= 2, errors


def test_winograd_is_right_in_half_precision(two_threads, monkeypatch):
    """The processor decides where Winograd is profitable, so here it is used wherever it can be."""
    chosen = []

    def wherever_possible(conv, *_, **__):
        chosen.append(min(conv.weight.shape[:2]) >= 8)
        return chosen[-1]

    monkeypatch.setattr("kl_autoencoder.inference.winograd.is_profitable", wherever_possible)
    vae, images, rows = random_case(3)
    for ours, whole in both_ways(vae.to(torch.bfloat16), images.to(torch.bfloat16), rows):
        assert worst(ours, whole) <= 0.04
    assert any(chosen)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_against_diffusers(name, two_threads):
    torch.manual_seed(0)
    theirs = AutoencoderKL(**reduced(PUBLISHED[name])).eval()
    ours = KLAutoencoder.from_diffusers(theirs)
    images = torch.rand(2, 3, 96, 40) * 2 - 1
    ours.enable_tiling()
    with torch.no_grad():
        moments, expected = (
            ours.encode(images).latent_dist.parameters,
            theirs.encode(images).latent_dist.parameters,
        )
        assert worst(moments, expected) <= 1e-5
        z = torch.randn(2, PUBLISHED[name]["latent_channels"], 12, 5)
        assert worst(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-5


def test_any_number_of_threads_and_host_memory_give_the_same(two_threads):
    vae, images, _ = random_case(14)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([ours for ours, _ in both_ways(vae, images, 8)])
    results.append([ours for ours, _ in both_ways(vae, images, 8, offload=True)])
    results.append([ours for ours, _ in both_ways(vae, images, 8, least_memory=True)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert worst(a, b) <= 2e-5
    assert torch.get_num_threads() == 5


def test_the_same_bits_every_time(two_threads):
    vae, images, _ = random_case(14)
    first, second = ([ours for ours, _ in both_ways(vae, images, 4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_odd_number_of_rows_is_downsampled_as_in_torch(two_threads):
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=(8, 8, 16), norm_num_groups=4)
    images = torch.randn(2, 3, 45, 27)
    with torch.no_grad():
        assert worst(infer_in_pieces(vae.encoder, images, rows=4), vae.encoder(images)) <= 1e-5


class WatchedArena(Arena):
    most = 0  # bytes held at once

    def _take(self, size):
        place = super()._take(size)
        self.most = max(self.most, held(self))
        return place


def held(arena):
    return sum(len(chunk) for chunk in arena.chunks if chunk is not None)


@pytest.fixture(params=["encoder", "decoder"])
def watched_run(request, two_threads, monkeypatch):
    """(encoder or decoder, the arena after the network has run, the bytes of its largest activation)."""
    monkeypatch.setattr("kl_autoencoder.inference.memory.CHUNK_BYTES", 1 << 18)
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=(16, 16), norm_num_groups=4, mid_block_add_attention=False)
    x = torch.randn(1, 3, 256, 256) if request.param == "encoder" else torch.randn(1, 4, 128, 128)
    with Workers(1, CPU) as workers, torch.no_grad():
        executor = Executor(x, workers, strip_bytes=1 << 16)
        executor.memory = WatchedArena()
        executor.run(getattr(vae, request.param), x)
    return request.param, executor.memory, 16 * 256 * 256 * 4


def test_everything_is_freed_and_little_is_held(watched_run):
    """At most two of the largest activations at once; after an encoder little more than one is kept."""
    kind, arena, largest = watched_run
    assert not arena.used
    assert 2 * largest <= arena.most <= 2.3 * largest
    assert held(arena) <= (1.1 * largest if kind == "encoder" else arena.most)


# ---------------------------------------------------------------- kernels


def padded(x, before=1):
    """(B, C, H, W) -> a window (B, before + H + 1, before + W + 1, C)."""
    return F.pad(x, (before, 1, before, 1)).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize(
    "kernel, reference, shape",
    [
        (WinogradConv, lambda x, c: F.conv2d(x, c.weight, c.bias, padding=1), (8, 12)),
        (DirectConv, lambda x, c: F.conv2d(x, c.weight, c.bias, padding=1), (7, 5)),
        (WinogradUpsample, lambda x, c: F.conv2d(up(x), c.weight, c.bias, padding=1), (7, 5)),
        (DirectUpsample, lambda x, c: F.conv2d(up(x), c.weight, c.bias, padding=1), (7, 5)),
        (
            DirectDownsample,
            lambda x, c: F.conv2d(F.pad(x, (0, 1, 0, 1)), c.weight, c.bias, stride=2),
            (6, 10),
        ),
    ],
)
def test_kernels_equal_the_convolutions_that_they_replace(kernel, reference, shape):
    torch.manual_seed(0)
    stride = 2 if kernel is DirectDownsample else 1
    conv, work = nn.Conv2d(24, 40, 3, stride=stride).double(), Workspace(CPU)
    x = torch.randn(2, 24, *shape, dtype=torch.float64)
    with torch.no_grad():
        ours = kernel(conv, work)(padded(x, kernel.before), work).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, reference(x, conv), rtol=1e-12, atol=1e-12)


def up(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("kernel", [WinogradConv, WinogradUpsample])
@pytest.mark.parametrize("channels", [64, 512])
def test_winograd_rounds_as_its_docstring_says(kernel, channels):
    """Up to 6.5 times direct convolution in NCHW (upsampling: 2.6), up to twice that in channels_last."""
    torch.manual_seed(0)
    conv, work = nn.Conv2d(channels, channels, 3), Workspace(CPU)
    x = F.silu(torch.randn(1, channels, 16, 16) + 1)  # as what the network convolves
    with torch.no_grad():
        ours = kernel(conv, work)(padded(x), work).permute(0, 3, 1, 2)
        x = up(x) if kernel is WinogradUpsample else x
        truth = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        nchw, channels_last = (
            F.conv2d(x.contiguous(memory_format=memory), conv.weight, conv.bias, padding=1)
            for memory in (torch.contiguous_format, torch.channels_last)
        )
    rms = [((y - truth).square().mean() / truth.square().mean()).sqrt() for y in (ours, nchw, channels_last)]
    least = 1e-7  # another processor may sum more exactly than float32 promises
    assert rms[0] <= (2.6 if kernel is WinogradUpsample else 6.5) * max(rms[1], 2 * least), rms
    assert rms[0] <= 2 * max(rms[2], 4 * least), rms


def test_more_rows_take_no_more_scratch_memory_of_a_winograd_kernel(two_threads):
    conv, held = nn.Conv2d(64, 64, 3), []
    for rows in (32, 64):
        work = Workspace(CPU)
        with torch.no_grad():
            WinogradConv(conv, work)(torch.zeros(1, rows + 2, 258, 64), work)
        held.append({name: len(buffer) for name, buffer in work.buffers.items()})
    fewer, more = held
    result = 32 * 256 * 64 * 4
    assert (fewer.pop("result"), more.pop("result")) == (result, 2 * result)
    assert fewer == more and sum(more.values()) < 3 * result
    work.drop("half")
    assert "half" not in work.buffers and work.get("half", (1,), torch.float32).numel() == 1


@pytest.mark.parametrize("products", [BatchedProducts, GroupedProducts, SeparateProducts])
@pytest.mark.parametrize("n, pixels", [(6, (2, 3, 5)), (3, (1, 1, 1)), (3, (1, 7, 1))])
def test_products_equal_the_matrix_product_at_each_position(products, n, pixels):
    generator, work = torch.Generator().manual_seed(0), Workspace(CPU)
    filters = torch.randn(n * n, 40, 24, generator=generator)
    x = torch.randn(n, n, *pixels, 24, generator=generator)
    multiply = products(filters)
    tiles = multiply.tiles(x.shape, work)
    y = multiply(tiles.copy_(x), work)
    wanted = torch.einsum("klbrsc,kloc->klbrso", x.double(), filters.double().view(n, n, 40, 24))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


def test_statistics_merge_and_keep_small_variance_beside_a_large_mean():
    torch.manual_seed(0)
    x = torch.randn(2, 40, 13, 8) * torch.linspace(0.1, 1, 8) + 1000
    statistics, work = Statistics(), Workspace(CPU)
    for number, (a, b) in enumerate([(0, 7), (7, 8), (8, 40)]):
        statistics.add_and_measure(number, x[:, a:b].contiguous(), None, work)
    mean, variance = statistics.merge(4)
    grouped = x.double().view(2, -1, 4, 2)
    torch.testing.assert_close(mean.squeeze(-1), grouped.mean(dim=(1, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.squeeze(-1), grouped.var(dim=(1, 3), correction=0), rtol=1e-3, atol=0)


def test_the_arena_gives_no_byte_twice_and_takes_everything_back(monkeypatch):
    monkeypatch.setattr("kl_autoencoder.inference.memory.CHUNK_BYTES", 1 << 18)
    pick, arena, alive = random.Random(0), Arena(), {}
    for step in range(2000):
        if step % 10 == 0:
            arena.trim(keep=pick.randint(0, held(arena)))
        if alive and pick.random() < 0.5:
            key = pick.choice(list(alive))
            tensor = alive.pop(key)
            assert (tensor == key).all()
            arena.free(tensor)
        else:
            tensor = arena.empty((pick.randint(1, 5000), 2), torch.int32)
            alive[step] = tensor.fill_(step)
    for key, tensor in alive.items():
        assert (tensor == key).all()
        arena.free(tensor)
    kept = [(i, chunk) for i, chunk in enumerate(arena.chunks) if chunk is not None]
    assert 1 < len(kept) < len(arena.chunks)
    assert arena.free_ranges == [(i, 0, len(chunk)) for i, chunk in kept]
    arena.trim(keep=0)
    assert not held(arena) and not arena.free_ranges


INTERPRETED = """
import torch
from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference import triton_group_norm
from kl_autoencoder.inference.dispatch import infer_in_pieces

calls = {"measure": 0, "normalize": 0}
def counted(name, function):
    def call(*args):
        calls[name] += 1
        return function(*args)
    return call
for name in calls:
    setattr(triton_group_norm, name, counted(name, getattr(triton_group_norm, name)))

torch.manual_seed(0)
vae = KLAutoencoder(block_out_channels=(8, 16), norm_num_groups=4)
for network, x, dtype, tolerance in (
    (vae.decoder, torch.randn(2, 4, 9, 5), torch.float32, 1e-5),
    (vae.encoder, torch.randn(1, 3, 14, 50), torch.bfloat16, 0.05),
):
    network, x = network.to(dtype), x.to(dtype)
    with torch.no_grad():
        whole = network(x)
        difference = (infer_in_pieces(network, x, rows=4) - whole).abs().max() / whole.abs().max()
    assert difference <= tolerance, (dtype, difference)
y, residual = torch.randn(2, 70, 41, 72) + 30, torch.randn(2, 70, 41, 72)
total = (y + residual).double()
pixels, mean, variance = triton_group_norm.measure(y, residual)
assert torch.equal(y, total.float()) and pixels.sum() == 70 * 41 and len(pixels) > 1
share = (pixels / pixels.sum()).view(-1, 1, 1)
merged = (share * mean).sum(0)
torch.testing.assert_close(merged.double(), total.mean((1, 2)), rtol=1e-5, atol=0)
spread = (share * (variance + (mean - merged).square())).sum(0)
torch.testing.assert_close(spread.double(), total.var((1, 2), correction=0), rtol=1e-3, atol=0)
assert min(calls.values()) > 10, calls
"""


def test_triton_kernels_give_the_same_in_the_interpreter():
    pytest.importorskip("triton")
    done = run_python(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("of", ["*fp32", "*bf16", "*fp16"])
def test_triton_kernels_compile_for_a_gpu(of):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kl_autoencoder.inference import triton_group_norm

    target = GPUTarget("cuda", 90, 32)
    pointers = {"pixels": "*fp32", "mean": "*fp32", "variance": "*fp32"}
    constants = {
        "ADD": True,
        "CB": triton_group_norm.CHANNELS,
        "NB": triton_group_norm.PIXELS,
        "SPAN": triton_group_norm.PIXELS_A_PROGRAM,
    }
    signature = {"y": of, "other": of, **pointers, "n": "i32", "c": "i32"}
    names = dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=triton_group_norm._measure, signature={**signature, **names}, constexprs=constants)
    assert triton.compile(source, target=target).asm["ptx"]

    constants = {"SILU": True, "BLOCK": triton_group_norm.ELEMENTS}
    strides = dict.fromkeys(("row_length", "c", "x_image", "x_row", "out_image", "out_row"), "i32")
    signature = {"x": of, "scale": "*fp32", "shift": "*fp32", "out": of, **strides}
    names = dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=triton_group_norm._normalize, signature={**signature, **names}, constexprs=constants
    )
    assert triton.compile(source, target=target).asm["ptx"]
