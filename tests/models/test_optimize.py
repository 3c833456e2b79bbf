"""`optimize`: the same images from every family of pipelines, whatever happens to the pipeline afterwards."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL, AutoencoderTiny, AutoPipelineForImage2Image, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder

from kl_autoencoder import KLAutoencoder, optimize, restore
from tests.models.test_autoencoder_kl import images
from tests.models.tiny_pipelines import FAMILIES, run_pipeline, tiny_pipeline, tiny_vae

pytestmark = pytest.mark.usefixtures("nothing_is_small")


@pytest.fixture(autouse=True)
def no_warnings():
    """Every warning of ours is an error unless a test expects it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not optimized|not tiled)")
        yield


@pytest.fixture(scope="module")
def plain():
    """Family -> the images of its pipeline as diffusers computes them."""
    return {family: run_pipeline(tiny_pipeline(family), family) for family in FAMILIES}


# ---------------------------------------------------------------- what may happen to a pipeline


def nothing(pipe):
    return pipe


def moved(pipe):
    pipe.vae.to(torch.float64)
    pipe.vae.to(torch.float32)
    return pipe.to("cpu")


def with_lora(pipe):
    """With weights of its own, which are then switched off."""
    from peft import LoraConfig

    pipe.vae.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "to_q", "to_out.0"])
    )
    pipe.vae.disable_adapters()
    return pipe


def model_offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def sequentially_offloaded(pipe):
    """What `enable_sequential_cpu_offload` does, which itself fails for the device "cpu:0" in accelerate."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"))
    assert pipe.vae.decoder.conv_in.weight.is_meta
    return pipe


def group_offloaded(kind):
    def change(pipe):
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        pipe.vae.enable_group_offload(torch.device("cpu"), offload_type=kind, **groups)
        return pipe

    return change


def cast_layerwise(pipe):
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float64, compute_dtype=torch.float32)
    return pipe


def compiled(pipe):
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    pipe.vae.encode = torch.compile(pipe.vae.encode, backend="eager")
    return pipe


def tiled_and_sliced(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 4
    return pipe


def copied(pipe):
    pipe.vae = copy.deepcopy(pipe.vae)
    return pipe


def pickled(pipe):
    pipe.vae = pickle.loads(pickle.dumps(pipe.vae))
    return pipe


def fused(pipe):
    pipe.vae.fuse_qkv_projections()
    return pipe


# name -> (what happens, whether the networks are then executed in pieces; None: no, and a warning says so)
SITUATIONS = {
    "nothing": (nothing, True),
    "to": (moved, True),
    "lora": (with_lora, False),
    "model offload": (model_offloaded, True),
    "sequential offload": (sequentially_offloaded, True),
    "group offload, leaves": (group_offloaded("leaf_level"), None),
    "group offload, blocks": (group_offloaded("block_level"), None),
    "layerwise casting": (cast_layerwise, False),
    "compile": (compiled, False),
    "tiling": (tiled_and_sliced, True),
    "deepcopy": (copied, True),
    "pickle": (pickled, True),
    "fused projections": (fused, True),
}
CASES = [
    (situation, family)
    for situation in SITUATIONS
    for family in FAMILIES
    # tracing takes seconds, and these have the autoencoders of the others
    if situation != "compile" or family in ("sd3", "flux2", "inpaint")
]


@pytest.mark.parametrize(("situation", "family"), CASES)
def test_pipelines_make_the_same_images(situation, family, plain, pieces):
    change, in_pieces = SITUATIONS[situation]
    if situation == "group offload, blocks" and family == "flux2":
        in_pieces = True  # diffusers hooks this class as a whole
    pipe = tiny_pipeline(family)
    assert optimize(pipe) is pipe
    pipe = change(pipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1 if in_pieces else 2):
            torch.testing.assert_close(run_pipeline(pipe, family), plain[family], rtol=0, atol=1e-4)
    told = [str(w.message) for w in caught if "not optimized" in str(w.message)]
    networks = 2 if "image" in FAMILIES[family][3] else 1  # the decoder, and the encoder if it gets an image
    if in_pieces:
        assert len(pieces) >= networks and not told
        assert set(pieces) == {situation == "tiling"}
    else:
        assert not pieces and len(told) == (networks if in_pieces is None else 0)


# ---------------------------------------------------------------- the autoencoder itself


@pytest.fixture
def vae():
    return tiny_vae("sd")


def reconstruct(vae, x):
    with torch.no_grad():
        return vae(x).sample


def test_nothing_about_the_autoencoder_changes(vae, tmp_path):
    state = {name: tensor.data_ptr() for name, tensor in vae.state_dict().items()}
    before = repr(vae.config)
    optimize(vae)
    assert type(vae) is AutoencoderKL and repr(vae.config) == before
    assert {name: tensor.data_ptr() for name, tensor in vae.state_dict().items()} == state
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert type(loaded.encoder) is Encoder
    restore(vae).save_pretrained(tmp_path / "plain")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_restore_leaves_no_trace(vae, pieces):
    before, names = reconstruct(vae, images()), set(vae.__dict__)
    inside = set(vae.decoder.__dict__)
    assert restore(optimize(optimize(vae, tiling=True))) is vae
    assert set(vae.__dict__) == names and set(vae.decoder.__dict__) == inside
    assert (type(vae.encoder), type(vae.decoder)) == (Encoder, Decoder)
    assert torch.equal(reconstruct(vae, images()), before) and not pieces
    restore(vae)


def test_a_pipeline_is_saved_and_made_into_another(plain, pieces, tmp_path):
    pipe = optimize(tiny_pipeline("img2img"))
    other = StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.vae is pipe.vae and AutoPipelineForImage2Image.from_pipe(other).vae is pipe.vae
    torch.testing.assert_close(run_pipeline(other, "sd"), plain["sd"], rtol=0, atol=1e-4)
    assert len(pieces) == 1
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    absent = dict.fromkeys(
        ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    )
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae.decoder) is Decoder
    torch.testing.assert_close(run_pipeline(loaded, "sd"), plain["sd"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", ["sd", "sd3", "flux2"])
def test_tiles_are_exact_and_obey_three_switches(shape, pieces):
    vae = tiny_vae(shape)
    x = images(40, 56)  # 5x7 latents
    expected = reconstruct(vae, x)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
    vae.enable_tiling()
    assert (reconstruct(vae, x) - expected).abs().max() > 1e-2  # what diffusers' tiles make of it
    for tiling, switched_on, least in (
        (None, True, True),
        (None, False, False),
        (True, False, True),
        (False, True, False),
    ):
        vae.use_tiling = switched_on
        optimize(vae, tiling=tiling)
        torch.testing.assert_close(reconstruct(vae, x), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            vae.tiled_decode(vae.encode(x).latent_dist.mode()).sample, expected, rtol=0, atol=1e-4
        )
        assert pieces[:2] == [least, least]
        pieces.clear()


def test_gradients_equal_those_of_diffusers(vae):
    x = images().requires_grad_()
    for training in (False, True):
        results = []
        for change in (restore, optimize):
            change(vae).train(training).zero_grad()
            x.grad = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # training mode needs the network whole, and says so
                vae(x).sample.square().mean().backward()
            results.append([x.grad, *(p.grad.clone() for p in vae.parameters())])
        for ours, theirs in zip(*reversed(results), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * float(theirs.abs().max()) + 1e-8)


def test_gradient_checkpointing_still_works(vae):
    optimize(vae).train().enable_gradient_checkpointing()
    x = images().requires_grad_()
    with pytest.warns(UserWarning, match="in training mode gradients need all activations"):
        vae(x).sample.mean().backward()
    assert x.grad.abs().max() > 0 and vae.is_gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bfloat16_and_float64(vae, dtype, pieces):
    x = images()
    expected = reconstruct(vae, x)
    ours = reconstruct(optimize(vae).to(dtype), x.to(dtype))
    assert ours.dtype == dtype and len(pieces) == 2
    theirs = reconstruct(restore(vae), x.to(dtype))
    scale = float(expected.abs().max())
    if dtype == torch.bfloat16:
        assert (ours - expected).abs().max() < 2 * (theirs - expected).abs().max() < 0.1 * scale
    else:
        torch.testing.assert_close(ours, theirs)


def test_autocast_and_inference_mode(vae, pieces):
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        expected = reconstruct(vae, x)
        assert torch.equal(reconstruct(optimize(vae), x), expected) and not pieces
    with torch.inference_mode():
        vae(x)
    assert len(pieces) == 2


def test_sizes_that_leave_a_remainder(vae, pieces):
    """diffusers drops the rows and columns beyond a multiple of 8, and still does when optimized."""
    x = images(45, 67)
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mode()
        found = optimize(vae).encode(x).latent_dist.mode()
    assert found.shape == (2, 4, 5, 8) and len(pieces) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class Doubling:
    def __call__(self, attn, hidden_states, *_, **__):
        return 2 * hidden_states


def doubled(vae):
    vae.set_attn_processor(Doubling())


def hooked(vae):
    for network in (vae.encoder, vae.decoder):
        network.mid_block.resnets[0].register_forward_hook(lambda module, args, out: 2 * out)


def circular(vae):
    vae.encoder.conv_in.padding_mode = vae.decoder.conv_in.padding_mode = "circular"


def scaled(vae):
    vae.encoder.mid_block.resnets[0].output_scale_factor = vae.decoder.mid_block.resnets[
        0
    ].output_scale_factor = 2


def activated(vae):
    for network in (vae.encoder, vae.decoder):
        network.mid_block.resnets[0].nonlinearity = torch.nn.Mish()


@pytest.mark.parametrize("change", [doubled, hooked, circular, scaled, activated])
def test_a_network_that_a_user_has_changed_is_executed_whole(vae, change, pieces):
    x = images()
    before = reconstruct(vae, x)
    change(vae)
    expected = reconstruct(vae, x)
    assert not torch.allclose(before, expected, atol=1e-3)
    optimize(vae)
    with pytest.warns(UserWarning, match="not optimized, .* was replaced"):
        assert torch.equal(reconstruct(vae, x), expected)
    assert torch.equal(reconstruct(vae, x), expected) and not pieces  # without another warning


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_processors_of_the_same_function_are_computed_in_pieces(vae, processor, pieces):
    vae.set_attn_processor(processor())
    expected = reconstruct(vae, images())
    torch.testing.assert_close(reconstruct(optimize(vae), images()), expected, rtol=0, atol=1e-4)
    assert len(pieces) == 2


def test_hooks_on_the_networks_are_called_around_them(vae):
    seen = []
    handles = [
        n.register_forward_hook(lambda m, a, out: seen.append(out.shape)) for n in (vae.encoder, vae.decoder)
    ]
    optimize(vae)
    reconstruct(vae, images())
    assert seen == [(2, 8, 4, 6), (2, 3, 32, 48)]
    [handle.remove() for handle in handles]


def test_offloading_before_and_after(vae, pieces):
    """Hooks of accelerate on the networks hold their `forward`, and leave it behind when they are removed."""
    x = images()
    expected = reconstruct(vae, x)
    for network in (vae.encoder, vae.decoder):
        add_hook_to_module(network, AlignDevicesHook(torch.device("cpu")))
    for change, number in ((optimize, 2), (restore, 2)):
        torch.testing.assert_close(reconstruct(change(vae), x), expected, rtol=0, atol=1e-4)
        assert len(pieces) == number
    optimize(vae)
    remove_hook_from_module(vae, recurse=True)
    torch.testing.assert_close(reconstruct(vae, x), expected, rtol=0, atol=1e-4)
    assert len(pieces) == 4
    assert torch.equal(reconstruct(restore(vae), x), expected) and len(pieces) == 4


def test_compiled_before_and_after(vae, pieces):
    x = images()
    expected = reconstruct(vae, x)
    optimize(vae)
    vae.decoder.compile(backend="eager")
    torch.testing.assert_close(reconstruct(vae, x), expected, rtol=0, atol=1e-4)
    assert len(pieces) == 1  # the encoder


def test_optimize_only_switches_the_tiling_of_our_class():
    pipe = tiny_pipeline("sd")
    pipe.register_modules(vae=KLAutoencoder.from_diffusers(pipe.vae))
    assert optimize(pipe, tiling=True).vae.use_tiling and type(pipe.vae.decoder).__name__ == "Decoder"
    assert not optimize(pipe.vae, tiling=False).use_tiling


@pytest.mark.parametrize(
    "given",
    [
        torch.nn.Linear(2, 2),
        3,
        AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
    ],
)
def test_objects_that_cannot_be_optimized_are_refused(given):
    with pytest.raises(
        ValueError, match=f"{type(given).__name__}: no encoder or decoder .*; allowed: .*AutoencoderKLFlux2"
    ):
        optimize(given)
