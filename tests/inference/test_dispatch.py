"""When the network is executed in pieces and when not, what runs out of memory, and the switches of pipelines."""

import contextlib
import copy
import importlib.util
import math
import sys
import threading
import warnings
from unittest.mock import patch

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.utils.checkpoint import checkpoint

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference import dispatch
from kl_autoencoder.inference.dispatch import infer, largest_activation, why_whole
from kl_autoencoder.inference.executor import Executor
from kl_autoencoder.inference.memory import available_in_control_group, limit_of_control_group
from kl_autoencoder.networks import convolutional as net
from tests.models.test_autoencoder_kl import images, pair, pipeline, run
from tests.processes import run_python

pytestmark = pytest.mark.usefixtures("nothing_is_small")


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return KLAutoencoder(block_out_channels=(8, 16), norm_num_groups=4).eval()


@pytest.fixture
def pieces(monkeypatch):
    """The shape of every input that is executed in pieces, in order."""
    shapes, execute = [], Executor.run
    monkeypatch.setattr(
        Executor, "run", lambda self, network, x: shapes.append(tuple(x.shape)) or execute(self, network, x)
    )
    return shapes


def latents(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def whole(vae, z):
    with torch.no_grad():
        return vae.decoder(vae.post_quant_conv(z))


# ---------------------------------------------------------------- pieces or the whole


def test_in_training_gradients_are_those_of_the_plain_network(vae):
    x = images()
    out = vae.train()(x)
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


def test_without_gradients_the_network_is_executed_in_pieces(vae):
    x = latents(1, 4, 8, 8)
    with torch.no_grad():
        assert not why_whole(vae.decoder, x) and not why_whole(vae.train().decoder, x)
        assert vae.decode(x).sample.grad_fn is None
    with torch.inference_mode():
        assert not why_whole(vae.decoder, x)
        torch.testing.assert_close(vae.decode(x).sample, whole(vae, x))
    assert "training" in why_whole(vae.decoder, x)
    assert not why_whole(vae.requires_grad_(False).decoder, x)


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
def test_a_network_that_a_user_has_changed_is_executed_whole(vae, change):
    z = latents(1, 4, 8, 8)
    before = whole(vae, z)
    with torch.no_grad():
        change(vae)
        assert "was replaced" in why_whole(vae.decoder, z)
        assert torch.equal(vae.decode(z).sample, whole(vae, z))
        if change is not parametrized:
            assert not torch.allclose(whole(vae, z), before)


def test_under_autocast_and_compile_the_network_is_executed_whole(vae):
    z = latents(1, 4, 8, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert vae.decode(z).sample.dtype == torch.bfloat16
        compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(vae.post_quant_conv(z)), whole(vae, z))
        decode = torch.compile(lambda z: vae._decode(z), backend="eager", fullgraph=True)
        torch.testing.assert_close(decode(z), whole(vae, z))


def test_weights_that_accelerate_offloads_are_fetched_layer_by_layer(vae):
    from accelerate import cpu_offload

    z, x = latents(2, 4, 8, 8), images()
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters
        wanted = whole(vae, z)
        cpu_offload(vae, execution_device=torch.device("cpu"))
        assert vae.decoder.conv_in.weight.is_meta and not why_whole(vae.decoder, z)
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


def test_a_wrong_type_raises_the_error_of_torch(vae):
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


def test_an_error_in_one_thread_reaches_the_caller(vae, two_threads):
    vae.decoder.up_blocks[1].resnets[1].conv2.bias = torch.nn.Parameter(torch.zeros(3))
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected bias"):
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


# ---------------------------------------------------------------- gradients of what was executed in pieces


@pytest.fixture
def never_whole(monkeypatch):
    """Executing a network whole without building a graph is an error; lists the networks executed with one."""
    with_graph = []

    def watched(forward):
        def watch(self, x):
            assert torch.is_grad_enabled(), "executed whole"
            with_graph.append(type(self).__name__)
            return forward(self, x)

        return watch

    for network in (net.Encoder, net.Decoder):
        monkeypatch.setattr(network, "forward", watched(network.forward))
    return with_graph


def test_the_common_call_is_executed_in_pieces_and_its_gradients_are_right(vae, never_whole):
    """Trainable parameters, gradients enabled, evaluation mode: a model of from_pretrained, called as it is."""
    x = images().requires_grad_()
    out = vae(x).sample
    assert out.requires_grad and never_whole == []
    out.square().mean().backward()
    assert never_whole == ["Decoder", "Encoder"]  # for their gradients
    found = [x.grad, *(p.grad for p in vae.parameters())]
    x.grad = None
    vae.zero_grad()
    vae.train()(x).sample.square().mean().backward()
    for ours, plain in zip(found, [x.grad, *(p.grad for p in vae.parameters())], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_only_tensors_that_require_a_gradient_get_one(vae, never_whole):
    vae.requires_grad_(False)
    z = latents(1, 4, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(vae.decode(z).sample.square().sum(), z)
    with torch.enable_grad():
        (wanted,) = torch.autograd.grad(vae.decoder(vae.post_quant_conv(z)).square().sum(), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    vae.decoder.conv_out.requires_grad_(True)
    vae.decode(z.detach()).sample.sum().backward()
    assert {name for name, p in vae.named_parameters() if p.grad is not None} == {
        "decoder.conv_out.weight",
        "decoder.conv_out.bias",
    }


def test_a_small_network_is_executed_whole_and_without_a_graph(vae, monkeypatch, pieces):
    z = latents(1, 4, 16, 16)
    largest = 16 * 32 * 32 * 4  # bytes, behind the upsampling
    for small, in_pieces in ((largest, 0), (largest - 1, 1)):
        monkeypatch.setattr(dispatch, "SMALL_BYTES_A_THREAD", small // torch.get_num_threads())
        image = vae.decode(z).sample
        assert len(pieces) == in_pieces and image.requires_grad
        assert torch.equal(image, whole(vae, z)) == (not in_pieces)
        assert "_Recomputed" in type(image.grad_fn).__name__ + str(image.grad_fn.next_functions)
        vae.zero_grad()
        image.sum().backward()
        assert vae.decoder.conv_in.weight.grad.abs().sum() > 0
    vae.enable_tiling()
    monkeypatch.setattr(dispatch, "SMALL_BYTES_A_THREAD", largest)
    vae.decode(z)
    assert len(pieces) == 2


def test_a_small_network_is_executed_without_reading_the_free_memory(vae, monkeypatch):
    """Reading it takes as long as a small network."""
    monkeypatch.setattr(dispatch, "SMALL_BYTES_A_THREAD", 1 << 20)
    monkeypatch.setattr(dispatch, "available_host_memory", lambda: pytest.fail("looked at the memory"))
    with torch.no_grad():
        z = latents(1, 4, 8, 8)
        assert torch.equal(vae.decode(z).sample, whole(vae, z))


def test_gradients_of_gradients_and_within_a_checkpoint(vae):
    vae.double().decoder.mid_block.attentions = torch.nn.ModuleList()  # torch cannot differentiate it twice
    z = latents(1, 4, 4, 4).double().requires_grad_()
    results = []
    for decode in (
        lambda z: vae.decode(z).sample,
        lambda z: vae.decoder(vae.post_quant_conv(z)),
        lambda z: checkpoint(lambda z: vae.decode(z).sample, z, use_reentrant=False),
    ):
        (first,) = torch.autograd.grad(decode(z).square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z)
        results.append((first, second))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])


def test_weights_changed_before_the_backward_pass_are_noticed(vae):
    out = vae.decode(latents(1, 4, 8, 8)).sample
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_functional_parameters_get_their_own_gradients(vae):
    z = latents(1, 4, 8, 8)
    others = {name: p.detach() * 1.1 for name, p in vae.named_parameters() if name.startswith("decoder")}
    found = []
    for forward in (vae.decode, lambda z: DecoderOutput(vae.decoder(vae.post_quant_conv(z)))):
        copies = {name: p.clone().requires_grad_() for name, p in others.items()}
        with patch.object(KLAutoencoder, "forward", lambda self, z, of=forward: of(z).sample):
            torch.func.functional_call(vae, copies, (z,)).square().mean().backward()
        found.append([p.grad for p in copies.values()])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- tiling is a promise


def lora(vae):
    peft = pytest.importorskip("peft")
    layers = ["conv1", "conv2", "conv", "up_blocks.1.resnets.0.conv_shortcut", "to_q", "to_out.0"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    peft.inject_adapter_in_model(config, vae)
    vae.eval()
    return contextlib.nullcontext()


def layerwise(vae):
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return contextlib.nullcontext()


def autocast(vae):
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("change, tolerance", [(autocast, 0.05), (lora, 1e-5), (layerwise, 1e-5)])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "trainable"])
def test_autocast_lora_and_layerwise_casting_are_tiled(change, tolerance, gradients, monkeypatch):
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=(8, 16), norm_num_groups=4).eval()
    z, x = latents(2, 4, 20, 12), images(40, 24)
    with change(vae):
        with torch.no_grad():
            wanted, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
        monkeypatch.setattr(net.Decoder, "forward", None)
        monkeypatch.setattr(net.Encoder, "forward", None)
        vae.enable_tiling()
        with torch.set_grad_enabled(gradients), warnings.catch_warnings():
            warnings.simplefilter("error")
            image, posterior = vae.decode(z).sample, vae.encode(x).latent_dist
    for ours, whole in ((image, wanted), (posterior.parameters, moments)):
        assert ours.dtype == whole.dtype and ours.requires_grad == gradients
        assert (ours - whole).abs().max() <= tolerance * (whole.max() - whole.min())


def test_gradients_under_autocast_and_tiling_are_those_under_autocast(vae):
    found = []
    for tiling in (False, True):
        vae.zero_grad()
        vae.enable_tiling(tiling)
        with torch.autocast("cpu", torch.bfloat16):
            out = vae.decode(latents(1, 4, 8, 8)).sample
        out.float().square().mean().backward()
        found.append(vae.decoder.up_blocks[0].resnets[0].conv1.weight.grad.clone())
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0.05, atol=0.02 * found[0].abs().max().item())


def trained(vae):
    vae.train()


def watched_globally(vae):
    return torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)


@pytest.mark.parametrize(
    "change, cause", [(trained, "training mode"), (watched_globally, "global"), (hooked, "resnets.0")]
)
def test_networks_that_cannot_be_tiled_warn_once_and_say_why(vae, change, cause):
    vae.enable_tiling()
    handle = change(vae)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(2):
                vae.decode(latents(1, 4, 8, 8))
    finally:
        if handle:
            handle.remove()
    (message,) = [str(w.message) for w in caught]
    assert "not tiled" in message and cause in message and len(message) < 300


def test_the_retry_works_under_autocast(vae, monkeypatch):
    z, before = latents(2, 4, 20, 12), net.Decoder.forward
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = vae.decode(z).sample

        def exhausted(self, x):
            torch.empty(1 << 48)  # the allocator's own error

        monkeypatch.setattr(net.Decoder, "forward", exhausted)
        with pytest.warns(UserWarning, match="least memory"):
            tiled = vae.decode(z).sample
    monkeypatch.setattr(net.Decoder, "forward", before)
    assert (tiled - wanted).abs().max() <= 0.05 * (wanted.max() - wanted.min())


# ---------------------------------------------------------------- torch's transformations, hooks, default devices


def test_vmap_and_jvp_get_the_plain_network(vae):
    z = latents(3, 1, 4, 6, 6)
    vae.requires_grad_(False)
    wanted = torch.stack([whole(vae, one) for one in z])
    torch.testing.assert_close(torch.vmap(lambda z: vae.decode(z).sample)(z), wanted)
    # torch has no forward derivative of attention on a CPU
    vae.decoder.mid_block.attentions = torch.nn.ModuleList()
    _, tangent = torch.func.jvp(lambda z: vae.decode(z).sample, (z[0],), (z[1],))
    step = 1e-6
    vae.double()
    a, b = (whole(vae, z[0].double() + side * step * z[1].double()) for side in (1, -1))
    torch.testing.assert_close(tangent.double(), (a - b) / (2 * step), rtol=1e-3, atol=1e-4)


def test_global_forward_hooks_see_every_module(vae):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        with torch.no_grad():
            vae.decode(latents(1, 4, 8, 8))
    finally:
        handle.remove()
    assert {m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)} <= set(seen)


@pytest.mark.parametrize("widths", [(8, 16), (64, 64)])
def test_the_default_device_does_not_matter(widths):
    torch.manual_seed(0)
    vae = KLAutoencoder(block_out_channels=widths, norm_num_groups=4).eval()
    z, x = latents(1, 4, 8, 8), images()
    with torch.inference_mode():
        wanted, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
        with torch.device("meta"):
            assert torch.equal(vae.decode(z).sample, wanted)
            assert torch.equal(vae.encode(x).latent_dist.parameters, moments)


def test_constants_are_on_the_cpu_whatever_the_default_device():
    spec = importlib.util.find_spec("kl_autoencoder.inference.winograd")
    with torch.device("meta"):
        again = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(again)
    assert again.FILTER_4.device.type == again.FILTER_UP.device.type == "cpu"


# ---------------------------------------------------------------- memory


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_free_memory_is_bounded_by_the_limits_of_control_groups(tmp_path):
    """Version 2: the least that a group around this process has left, its cached files counted as free."""
    memberships, groups = tmp_path / "cgroup", tmp_path / "groups"
    memberships.write_text("0::/job/step\n")
    write_group(groups, memory__current=5)  # the root has no limit
    write_group(
        groups / "job", memory__max=1000, memory__current=700, memory__stat="anon 600\ninactive_file 80"
    )
    write_group(
        groups / "job" / "step", memory__max="max", memory__current=100, memory__stat="inactive_file 9"
    )
    assert available_in_control_group(groups, memberships) == 380
    assert limit_of_control_group(groups, memberships) == 1000
    write_group(groups / "job" / "step", memory__max=200)
    assert available_in_control_group(groups, memberships) == 109
    assert limit_of_control_group(groups, memberships) == 200
    memberships.write_text("0::/on/the/host\n")  # not visible from within a container
    write_group(groups, memory__max=600, memory__current=650, memory__stat="inactive_file 10")
    assert available_in_control_group(groups, memberships) == 0


def test_free_memory_is_bounded_by_control_groups_of_version_1(tmp_path):
    memberships, groups = tmp_path / "cgroup", tmp_path / "groups"
    memberships.write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    unlimited = 2**63 - 4096
    write_group(groups / "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=9)
    write_group(
        groups / "memory" / "a", memory__limit_in_bytes=5000, memory__usage_in_bytes=4000,
        memory__stat="inactive_file 1\ntotal_inactive_file 500",
    )  # fmt: skip
    assert available_in_control_group(groups, memberships) == 1500
    assert limit_of_control_group(groups, memberships) == 5000
    assert available_in_control_group(tmp_path / "none", memberships) == math.inf
    assert available_in_control_group(groups, tmp_path / "none") == math.inf
    assert limit_of_control_group(groups, tmp_path / "none") == math.inf


OUT_OF_MEMORY = """
import resource, sys, warnings
from pathlib import Path
import torch
from kl_autoencoder import KLAutoencoder

torch.manual_seed(0)
vae = KLAutoencoder(block_out_channels=(32, 32), norm_num_groups=4, mid_block_add_attention=False).eval()
z = torch.randn(6, 4, 96, 96)
x = torch.randn(6, 3, 192, 192)

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
    done = run_python(OUT_OF_MEMORY, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="1000000")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("available, batches", [(100_000, [1, 1, 1]), (10**9, [3])])
def test_a_batch_that_will_not_fit_is_decoded_image_by_image_from_the_start(
    vae, monkeypatch, pieces, available, batches
):
    monkeypatch.setattr(dispatch, "available_host_memory", lambda: available)
    z = latents(3, 4, 16, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(vae.decode(z).sample, whole(vae, z))
    assert [shape[0] for shape in pieces] == batches


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


def test_the_tile_attributes_equal_those_of_diffusers():
    ours, theirs = pair()
    for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_tiling_does_not_change_the_image_of_a_pipeline():
    """diffusers' own tiling does."""
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
    """Switch tiling on or off, by the pipeline until diffusers 0.40 and by its autoencoder since."""
    name = "enable" if on else "disable"
    getattr(pipe, f"{name}_vae_tiling", getattr(pipe.vae, f"{name}_tiling"))()


def test_infer_takes_networks_of_diffusers_too():
    _, theirs = pair()
    z = latents(1, 4, 8, 8)
    with torch.no_grad():
        assert not why_whole(theirs.decoder, z)
        torch.testing.assert_close(infer(theirs.decoder, z), theirs.decoder(z), rtol=0, atol=1e-5)
