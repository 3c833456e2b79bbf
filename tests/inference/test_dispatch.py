"""When the network is executed in pieces and when not, what runs out of memory, and the switches of pipelines."""

import copy
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference.dispatch import can_infer, infer, largest_activation
from tests.models.test_autoencoder_kl import images, pair, pipeline, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return KLAutoencoder(block_out_channels=(8, 16), norm_num_groups=4).eval()


def latents(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def whole(vae, z):
    with torch.no_grad():
        return vae.decoder(vae.post_quant_conv(z))


# ---------------------------------------------------------------- pieces or the whole


def test_gradients_are_those_of_the_plain_network(vae):
    x = images()
    out = vae(x)
    out.sample.square().mean().backward()
    ours = {name: p.grad.clone() for name, p in vae.named_parameters()}
    vae.zero_grad()
    moments = vae.quant_conv(vae.encoder(x))
    vae.decoder(vae.post_quant_conv(moments.chunk(2, dim=1)[0])).square().mean().backward()
    assert all(torch.equal(ours[name], p.grad) for name, p in vae.named_parameters())
    vae.requires_grad_(False)
    x.requires_grad_()
    vae.encode(x).latent_dist.mode().sum().backward()
    assert x.grad.abs().sum() > 0


def test_without_gradients_it_is_executed_in_pieces(vae):
    x = latents(1, 4, 8, 8)
    with torch.no_grad():
        assert can_infer(vae.decoder, x) and can_infer(vae.train().decoder, x)
        assert vae.decode(x).sample.grad_fn is None
    with torch.inference_mode():
        assert can_infer(vae.decoder, x)
        torch.testing.assert_close(vae.decode(x).sample, whole(vae, x))
    assert not can_infer(vae.decoder, x)
    assert can_infer(vae.requires_grad_(False).decoder, x)


def circular(vae):
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"


def hooked(vae):
    vae.decoder.mid_block.resnets[0].register_forward_hook(lambda module, args, out: 2 * out)


def replaced(vae):
    vae.decoder.conv_in.forward = lambda x: torch.zeros(*x.shape[:1], 16, *x.shape[2:])


def subclassed(vae):
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    vae.decoder.conv_out.__class__ = Doubled


def parametrized(vae):
    torch.nn.utils.parametrizations.weight_norm(vae.decoder.conv_out)


@pytest.mark.parametrize("change", [circular, hooked, replaced, subclassed, parametrized])
def test_what_somebody_has_changed_is_respected(vae, change):
    z = latents(1, 4, 8, 8)
    before = whole(vae, z)
    with torch.no_grad():
        change(vae)
        assert not can_infer(vae.decoder, z)
        assert torch.equal(vae.decode(z).sample, whole(vae, z))
        if change is not parametrized:
            assert not torch.allclose(whole(vae, z), before)


def test_autocast_and_compile_get_the_whole(vae):
    z = latents(1, 4, 8, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert vae.decode(z).sample.dtype == torch.bfloat16
        compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(vae.post_quant_conv(z)), whole(vae, z))
        decode = torch.compile(lambda z: vae._decode(z), backend="eager", fullgraph=True)
        torch.testing.assert_close(decode(z), whole(vae, z))


def test_accelerates_offloading_is_served_weight_by_weight(vae):
    from accelerate import cpu_offload

    z, x = latents(2, 4, 8, 8), images()
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters
        wanted = whole(vae, z)
        cpu_offload(vae, execution_device=torch.device("cpu"))
        assert vae.decoder.conv_in.weight.is_meta and can_infer(vae.decoder, z)
        vae.enable_tiling()
        torch.testing.assert_close(vae.decode(z).sample, wanted)
        torch.testing.assert_close(vae.encode(x).latent_dist.parameters, moments)
        assert vae.decoder.conv_in.weight.is_meta


def test_weights_may_change_between_calls_and_nothing_is_done_to_them():
    ours, theirs = pair()
    z = latents(1, 4, 8, 8)
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        ours.decode(z)
        for name, tensor in theirs.state_dict().items():
            assert tensor.data_ptr() == state[name][0] and torch.equal(tensor, state[name][1])
            assert tensor.is_contiguous()
        for p in theirs.parameters():
            p.mul_(1.1)
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=1e-4, atol=1e-4)
        ours.to(torch.float64)
        torch.testing.assert_close(ours.decode(z.double()).sample, whole(ours, z.double()))
        ours.to(memory_format=torch.channels_last)
        torch.testing.assert_close(ours.decode(z.double()).sample, whole(ours, z.double()))


def test_any_memory_format_and_strides_of_the_input(vae):
    z = latents(3, 8, 9, 4).permute(0, 3, 1, 2)
    x = images(32, 64)[:, :, ::2, ::2]
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(z).sample, whole(vae, z.contiguous()))
        torch.testing.assert_close(
            vae.encode(x).latent_dist.parameters, vae.quant_conv(vae.encoder(x.contiguous()))
        )


def test_a_wrong_type_is_torchs_error_as_ever(vae):
    with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
        vae.decode(latents(1, 4, 8, 8).double())


def test_compiled_once_for_all_sizes(vae):
    sizes = [(1, 4, 48, 32), (1, 4, 30, 56), (1, 4, 80, 22)]
    wanted = [whole(vae, latents(*size)) for size in sizes]
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    vae.compile_for_inference(backend=backend)
    with torch.inference_mode():
        for size, image in zip(sizes, wanted, strict=True):
            torch.testing.assert_close(vae.decode(latents(*size)).sample, image)
        assert len(graphs) == 1
        vae.enable_tiling()
        vae.decode(latents(1, 4, 40, 8))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_several_threads_may_decode_at_once(vae):
    z = latents(4, 4, 12, 10)
    wanted, results = whole(vae, z), [None] * 4

    def decode(i):
        with torch.inference_mode():
            results[i] = vae.decode(z[i : i + 1]).sample

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(4)]
    before = torch.get_num_threads()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_num_threads() == before
    torch.testing.assert_close(torch.cat(results), wanted)


def test_an_error_in_one_thread_reaches_the_caller(vae):
    vae.decoder.up_blocks[1].resnets[1].conv2.bias = torch.nn.Parameter(torch.zeros(3))
    torch.set_num_threads(2)
    with torch.no_grad(), pytest.raises(RuntimeError):
        vae.decode(latents(1, 4, 8, 8))


def test_the_largest_activation_is_known_beforehand(vae):
    sizes = {}
    for network, x in ((vae.encoder, images()), (vae.decoder, latents(2, 4, 16, 24))):
        twin = copy.deepcopy(network)
        blocks = [m for m in twin.modules() if hasattr(m, "conv1") or type(m).__name__.endswith("sample")]
        for block in [twin.conv_in, *blocks]:
            block.register_forward_hook(
                lambda m, args, out, of=network: sizes.setdefault(of, []).append(out.numel())
            )
        with torch.no_grad():
            twin(x)
        assert largest_activation(network, x) == max(sizes[network])


# ---------------------------------------------------------------- memory

OUT_OF_MEMORY = """
import resource, sys, warnings
from pathlib import Path
import torch
from kl_autoencoder import KLAutoencoder

torch.manual_seed(0)
vae = KLAutoencoder(block_out_channels=(32, 32), norm_num_groups=4, mid_block_add_attention=False).eval()
z = torch.randn(10, 4, 96, 96)
x = torch.randn(10, 3, 192, 192)

def virtual():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    calls = {"Decoder": lambda: vae.decode(z).sample, "Encoder": lambda: vae.encode(x).latent_dist.mode()}
    for of, run in calls.items():
        wanted = run()
        assert not caught, caught[0].message
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (virtual() + (60 << 20), hard))
        result = run()
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        messages = [str(caught.pop().message) for _ in list(caught)]
        assert len(messages) == 1, messages
        message = messages[0]
        assert of in message and "memory" in message and "enable_tiling" in message, message
        torch.testing.assert_close(result, wanted)
    vae.enable_tiling()
    resource.setrlimit(resource.RLIMIT_AS, (virtual() + (2 << 20), hard))
    try:
        vae.decode(z)
    except RuntimeError as error:
        assert "memory" in str(error)
    else:
        sys.exit("2 MB were enough")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_decode_that_runs_out_of_memory_is_repeated_tiled_with_one_warning():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_will_not_fit_is_done_one_by_one_from_the_start(vae, monkeypatch):
    free = type("Memory", (), {"available": 100_000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    z = latents(3, 4, 16, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(vae.decode(z).sample, whole(vae, z))


# ---------------------------------------------------------------- what pipelines and their users call


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_tiling": True}, {"offload": True}, {"tile_sample_min_size": 64, "tile_overlap_factor": 0.5}],
)
def test_tiling_changes_nothing_but_memory(vae, arguments):
    z, x = latents(2, 4, 20, 33), images()
    with torch.no_grad():
        wanted, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
        vae.enable_tiling(**arguments)
        assert vae.use_tiling
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 16, 8, 0.1
        torch.testing.assert_close(vae.decode(z).sample, wanted)
        torch.testing.assert_close(vae.encode(x).latent_dist.parameters, moments)
        vae.disable_tiling()
        assert not vae.use_tiling and not vae.use_offload
        vae.enable_tiling(False)
        assert not vae.use_tiling
        vae.enable_slicing()
        torch.testing.assert_close(vae.decode(z).sample, wanted)
        vae.disable_slicing()


def test_the_tiled_methods_are_exact(vae):
    z, x = latents(2, 4, 40, 24), images(96, 80)
    with torch.no_grad():
        torch.testing.assert_close(vae.tiled_decode(z).sample, whole(vae, z))
        torch.testing.assert_close(vae.tiled_decode(z, return_dict=False)[0], whole(vae, z))
        moments = vae.quant_conv(vae.encoder(x))
        torch.testing.assert_close(vae.tiled_encode(x).latent_dist.parameters, moments)
        torch.testing.assert_close(vae.tiled_encode(x, return_dict=False)[0].parameters, moments)
    assert not vae.use_tiling


def test_an_argument_that_does_not_exist_is_named(vae):
    with pytest.raises(ValueError, match="ofload"):
        vae.enable_tiling(ofload=True)


def test_the_attributes_of_diffusers_tiles_are_there():
    ours, theirs = pair()
    for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_pipeline_with_tiling_gives_the_image_it_gives_without():
    """While diffusers' own tiles change it."""
    ours, theirs = pair()
    for vae, exact in ((ours, True), (theirs, False)):
        if not exact:
            vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
        pipe = pipeline(StableDiffusionPipeline, vae)
        without = run(pipe, height=64, width=96)
        tiling(pipe, True)
        assert vae.use_tiling
        tiled = run(pipe, height=64, width=96)
        steps = ((tiled * 255).round() - (without * 255).round()).abs()
        assert ((steps > 0).float().mean() <= 1e-3 and steps.max() <= 1) == exact
        tiling(pipe, False)
        assert not vae.use_tiling


def tiling(pipe, on):
    """As pipelines have it until diffusers 0.40, and as they have it since."""
    name = "enable" if on else "disable"
    getattr(pipe, f"{name}_vae_tiling", getattr(pipe.vae, f"{name}_tiling"))()


def test_infer_takes_diffusers_networks_as_they_are():
    """infer() is for our modules; anything else is called."""
    theirs = AutoencoderKL(block_out_channels=(32,)).eval()
    z = latents(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(infer(theirs.decoder, z), theirs.decoder(z))
