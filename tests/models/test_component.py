"""KLAutoencoder where programs expect diffusers' class: from_pipe, attention processors, device maps."""

import copy
import pickle
import threading

import pytest
import torch
from accelerate import infer_auto_device_map
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from kl_autoencoder import KLAutoencoder
from tests.models.test_autoencoder_kl import images, pair, pipeline, run
from tests.published import PUBLISHED, reduced


class Derived(KLAutoencoder):
    """A user's own class."""

    def twice(self, x):
        return self(self(x).sample).sample


@pytest.mark.parametrize("cls", [KLAutoencoder, Derived])
def test_from_pipe_hands_on_the_same_autoencoder(cls):
    from diffusers import AutoPipelineForInpainting, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    vae = cls(**reduced(PUBLISHED["sd"]))
    pipe = pipeline(StableDiffusionPipeline, vae)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.vae is vae and StableDiffusionPipeline.from_pipe(other).vae is vae
    assert AutoPipelineForInpainting.from_pipe(pipe).vae is vae
    other.set_progress_bar_config(disable=True)
    more = {"image": (images(64, 64, 1) + 1) / 2, "strength": 1.0}
    theirs = pipeline(StableDiffusionImg2ImgPipeline, AutoencoderKL.from_config(vae.config))
    theirs.vae.load_state_dict(vae.state_dict())
    torch.testing.assert_close(run(other, **more), run(theirs, **more), rtol=1e-4, atol=1e-4)


def test_the_class_equals_diffusers_and_is_another():
    assert KLAutoencoder == AutoencoderKL and AutoencoderKL == KLAutoencoder and Derived == AutoencoderKL
    assert KLAutoencoder != torch.nn.Module and KLAutoencoder != Derived
    assert len({KLAutoencoder, AutoencoderKL, Derived}) == 3
    assert {AutoencoderKL: 1}.get(KLAutoencoder) is None


def test_repr_names_the_class():
    vae = KLAutoencoder(block_out_channels=(32,))
    assert repr(vae).startswith("KLAutoencoder(\n") and repr(KLAutoencoder).endswith("KLAutoencoder'>")
    assert repr(Derived(block_out_channels=(32,))).startswith("Derived(\n")


def test_a_pipeline_with_a_derived_class_is_saved_and_loaded(tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = pipeline(StableDiffusionPipeline, Derived(**reduced(PUBLISHED["sd"])))
    pipe.save_pretrained(tmp_path)
    absent = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "tokenizer": None}
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded.vae) is AutoencoderKL
    given = Derived.from_pretrained(tmp_path, subfolder="vae")
    assert type(given) is Derived and type(pickle.loads(pickle.dumps(given))) is Derived
    again = StableDiffusionPipeline.from_pretrained(tmp_path, vae=given, **absent)
    assert again.vae is given
    for vae in (loaded.vae, given):
        assert torch.equal(vae.encoder.conv_in.weight, pipe.vae.encoder.conv_in.weight)


# ------------------------------------------------------------------ attention


def test_processors_are_those_of_diffusers():
    ours, theirs = pair()
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    assert all(isinstance(processor, AttnProcessor2_0) for processor in ours.attn_processors.values())
    (block,) = ours.decoder.mid_block.attentions
    assert block.processor is ours.attn_processors["decoder.mid_block.attentions.0.processor"]
    assert pickle.loads(pickle.dumps(ours)).attn_processors.keys() == theirs.attn_processors.keys()


class Doubling:
    """A processor that nobody could mistake for the block's own."""

    def __call__(self, attn, hidden_states, *_, **__):
        return 2 * attn.to_out[1](attn.to_out[0](hidden_states.flatten(2).mT)).mT.reshape(hidden_states.shape)


class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, attn, hidden_states, *_, **__):
        return self.gain * AttnProcessor()(attn, hidden_states)


@pytest.mark.filterwarnings("ignore:.*attentions.0 has hooks, another attention processor")
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, Doubling, Learned])
def test_a_processor_computes_the_block(processor, pieces):
    ours, theirs = pair()
    ours.enable_tiling()  # in pieces, small as it is
    x, z = images(), torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = ours.decode(z).sample
        assert len(pieces) == 1
        for vae in (ours, theirs):
            vae.set_attn_processor(processor())
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample)
        torch.testing.assert_close(ours(x).sample, theirs(x).sample)
        assert len(pieces) == 1  # not in pieces, which know nothing of it
        if processor in (Doubling, Learned):
            assert (ours.decode(z).sample - before).abs().max() > 1e-3
        ours.set_default_attn_processor()
        torch.testing.assert_close(ours.decode(z).sample, before)
        assert len(pieces) == 2
    assert ours.state_dict().keys() == AutoencoderKL.from_config(ours.config).state_dict().keys()


def test_projections_are_fused_and_unfused_again():
    ours, theirs = pair()
    x = images()
    with torch.no_grad():
        before = ours(x).sample
        for vae in (ours, theirs):
            vae.fuse_qkv_projections()
        assert {type(p) for p in ours.attn_processors.values()} == {FusedAttnProcessor2_0}
        assert ours.encoder.mid_block.attentions[0].to_qkv.weight.shape == (288, 96)
        torch.testing.assert_close(ours(x).sample, theirs(x).sample)
        ours.unfuse_qkv_projections()
        torch.testing.assert_close(ours(x).sample, before, rtol=0, atol=0)
    assert not any("to_qkv" in name for name in ours.state_dict())


def test_from_diffusers_takes_everything_over(pieces):
    _, theirs = pair()
    theirs.fuse_qkv_projections()
    theirs.enable_tiling()
    theirs.enable_slicing()
    ours = KLAutoencoder.from_diffusers(theirs)
    assert ours.use_tiling and ours.use_slicing and not ours.training
    with torch.no_grad():
        assert len(pieces) == 0
        x = images()
        torch.testing.assert_close(ours(x).sample, theirs(x).sample, rtol=1e-4, atol=1e-4)
        assert len(pieces) == 4  # two images, each encoded and decoded, by the network's own attention
        theirs.unfuse_qkv_projections()
        theirs.set_attn_processor(Doubling())
        torch.testing.assert_close(KLAutoencoder.from_diffusers(theirs)(x).sample, theirs(x).sample)
    assert ours.encoder.conv_in.weight is theirs.encoder.conv_in.weight


def test_upcast_vae_of_pipelines():
    """Half of the decoder in bfloat16, the rest in float32: AnimateDiffSDXL, and SDXL in diffusers 0.35."""
    vae, _ = pair("sdxl")
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = vae.decode(z.float()).sample
        assert isinstance(vae.decoder.mid_block.attentions[0].processor, AttnProcessor2_0)
        for part in (vae.post_quant_conv, vae.decoder.conv_in, vae.decoder.mid_block):
            part.to(torch.bfloat16)
        image = vae.decode(z).sample
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_device_maps_keep_blocks_whole():
    vae = KLAutoencoder(**reduced(PUBLISHED["sd"]))
    size = sum(p.nbytes for p in vae.parameters())
    for part in (8, 5, 3):
        places = infer_auto_device_map(
            vae, {0: size // part, "cpu": size}, no_split_module_classes=vae._no_split_modules
        )
        for name in places:
            above = [vae.get_submodule(name.rsplit(".", n)[0]) for n in range(1, name.count(".") + 1)]
            assert not [
                module for module in above if type(module).__name__ in ("ResnetBlock", "AttentionBlock")
            ]
        assert {*places.values()} == {0, "cpu"}


# ------------------------------------------------------------------ the rest


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_tiled_calls_of_two_threads_leave_the_model_as_it_was(direction):
    vae, _ = pair()
    x, network = (images(), vae.encoder) if direction == "encode" else (torch.randn(1, 4, 2, 2), vae.decoder)
    started, going = threading.Event(), threading.Event()

    def slow(module, arguments):
        started.set()
        going.wait(20)

    handle = network.register_forward_pre_hook(slow)
    seen = []
    with torch.no_grad(), pytest.warns(UserWarning, match="not tiled"):
        first = threading.Thread(target=lambda: getattr(vae, f"tiled_{direction}")(x))
        first.start()
        assert started.wait(20)
        seen.append(vae.use_tiling)
        going.set()
        first.join()
    handle.remove()
    assert seen == [False] and not vae.use_tiling


def test_a_single_file_takes_no_unknown_arguments(tmp_path):
    KLAutoencoder(**reduced(PUBLISHED["sd"])).save_single_file(tmp_path / "vae.safetensors")
    with pytest.raises(
        ValueError, match="scaling_facto: no such argument; allowed: .*; perhaps scaling_factor"
    ):
        KLAutoencoder.from_single_file(tmp_path / "vae.safetensors", scaling_facto=0.13025)
    with pytest.raises(ValueError, match="config: no such argument"):
        KLAutoencoder.from_single_file(tmp_path / "vae.safetensors", config="owner/name")
    vae = KLAutoencoder.from_single_file(
        tmp_path / "vae.safetensors", local_files_only=True, token=None, scaling_factor=0.5
    )
    assert vae.config.scaling_factor == 0.5 and "token" not in vae.config


def test_a_tuple_holds_the_image_alone():
    ours, theirs = pair()
    with torch.no_grad():
        (image,), (expected,) = (vae(images(), return_dict=False) for vae in (ours, theirs))
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)


def test_copies_keep_their_processors():
    vae, _ = pair()
    vae.set_attn_processor(Doubling())
    assert {type(processor) for processor in copy.deepcopy(vae).attn_processors.values()} == {Doubling}
