"""KLAutoencoder as a diffusers component: the same answers, files that either class reads, pipelines."""

import copy
import json
import logging
import pickle
import warnings

import pytest
import torch
from diffusers import AutoencoderKL

from kl_autoencoder import DiagonalGaussian, KLAutoencoder
from tests.published import PUBLISHED, reduced


def pair(name="sd"):
    """diffusers' model with random weights, and ours around the same tensors."""
    torch.manual_seed(0)
    theirs = AutoencoderKL(**reduced(PUBLISHED[name])).eval()
    return KLAutoencoder.from_diffusers(theirs), theirs


def images(height=32, width=48, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_answers_as_diffusers(name):
    ours, theirs = pair(name)
    x = images()
    with torch.no_grad():
        posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mode(), expected.mode(), rtol=1e-5, atol=1e-5)
        seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
        torch.testing.assert_close(
            posterior.sample(seeds[0]), expected.sample(seeds[1]), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-5, atol=1e-4)
        z = expected.mode()
        decoded, wanted = ours.decode(z).sample, theirs.decode(z).sample
        torch.testing.assert_close(decoded, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
        out = ours(x, sample_posterior=True, generator=torch.Generator().manual_seed(4))
        again = theirs(x, sample_posterior=True, generator=torch.Generator().manual_seed(4)).sample
        torch.testing.assert_close(out.sample, again, rtol=1e-4, atol=1e-4)
        assert isinstance(out.latent_dist, DiagonalGaussian)
        assert torch.equal(ours(x).sample, ours.decode(ours.encode(x, return_dict=False)[0].mode(), False)[0])


def test_it_is_a_diffusers_autoencoder():
    ours, theirs = pair()
    assert isinstance(ours, AutoencoderKL)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(ours.config[key] == value for key, value in theirs.config.items() if key[0] != "_")
    assert pickle.loads(pickle.dumps(ours)).config == ours.config
    assert type(copy.deepcopy(ours)) is KLAutoencoder
    assert "kl_autoencoder" in repr(KLAutoencoder)
    ours.set_default_attn_processor()
    ours.fuse_qkv_projections()
    ours.enable_slicing()
    x = images()
    torch.testing.assert_close(ours(x).sample, theirs(x).sample, rtol=1e-4, atol=1e-4)


def test_from_diffusers_shares_every_tensor():
    ours, theirs = pair()
    for name, tensor in theirs.named_parameters():
        assert ours.get_parameter(name) is tensor


def test_gradients_reach_the_encoder_through_a_sample():
    ours, _ = pair()
    out = ours(images(), sample_posterior=True)
    (out.sample.square().mean() + out.latent_dist.kl().mean() * 1e-3).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert ours.encoder.conv_in.weight.grad.abs().max() > 0


def test_gradient_checkpointing_through_the_diffusers_switch():
    ours, _ = pair()
    ours(images()).sample.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing
    ours(images()).sample.square().mean().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=0)


def test_the_modules_that_checkpoint_are_named_as_diffusers_are():
    checkpointing = [
        [(name, type(m).__name__) for name, m in vae.named_modules() if hasattr(m, "gradient_checkpointing")]
        for vae in pair()
    ]
    assert checkpointing[0] == checkpointing[1]


# ------------------------------------------------------------------ files


def test_folders_are_read_by_both_classes(tmp_path):
    ours, _ = pair("flux")
    ours.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["shift_factor"] == 0.1159
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    for cls in (AutoencoderKL, KLAutoencoder):
        loaded = cls.from_pretrained(tmp_path, subfolder="vae", torch_dtype=torch.float64)
        assert type(loaded) is cls and loaded.dtype == torch.float64
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor.float(), ours.state_dict()[name])


def test_a_folder_of_another_variant_is_diffusers_error(tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path, variant="fp16")
    messages = []
    for cls in (KLAutoencoder, AutoencoderKL):
        with pytest.raises(OSError) as caught:
            cls.from_pretrained(tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    KLAutoencoder.from_pretrained(tmp_path, variant="fp16")


def test_pickled_weights_in_a_folder_are_not_opened(tmp_path):
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        KLAutoencoder.from_pretrained(tmp_path)
    loaded = KLAutoencoder.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(loaded.encoder.conv_in.weight, ours.encoder.conv_in.weight)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    good = load_file(weights)
    key = "encoder.conv_in.weight"
    for tensors, message in (
        ({k: v for k, v in good.items() if k != key}, f"missing: {key}"),
        (good | {"encoder.extra": torch.zeros(1)}, "unexpected: encoder.extra"),
        (good | {key: torch.zeros(1, 3, 3, 3)}, key),
    ):
        save_file(tensors, weights)
        with pytest.raises(ValueError, match=message):
            KLAutoencoder.from_pretrained(tmp_path)


def test_old_attention_names_in_a_folder(tmp_path):
    from safetensors.torch import load_file, save_file

    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(weights)
    for new, name in old.items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
    save_file(tensors, weights)
    loaded = KLAutoencoder.from_pretrained(tmp_path)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["sd", "flux", "no-attention"])
def test_single_files_go_both_ways(tmp_path, name):
    """Written here, read by diffusers and by us, bit-equal; and the configuration survives."""
    ours, theirs = pair(name)
    theirs.save_pretrained(tmp_path / "folder")  # diffusers asks the hub unless it is given a configuration
    path = tmp_path / "vae.safetensors"
    ours.save_single_file(path)
    loaded = AutoencoderKL.from_single_file(str(path), config=str(tmp_path / "folder"))
    again = KLAutoencoder.from_single_file(path)
    for model in (loaded, again):
        assert set(model.state_dict()) == set(ours.state_dict())
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[key]), key
    for key in ("block_out_channels", "norm_num_groups", "scaling_factor", "shift_factor", "sample_size"):
        assert again.config[key] == json.loads(ours.to_json_string())[key]
    half = KLAutoencoder.from_single_file(path, torch_dtype=torch.bfloat16, scaling_factor=2.0)
    assert half.dtype == torch.bfloat16 and half.config.scaling_factor == 2.0


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("size, message", [
    ((513, 512), "height 513 is not a multiple of 8; 512 or 520 would fit"),
    ((512, 771), "width 771 is not a multiple of 8; 768 or 776 would fit"),
    ((3, 8), "height 3 is not a multiple of 8; 8 would fit"),
])  # fmt: skip
def test_sizes_that_would_lose_pixels_are_refused(size, message):
    ours, _ = pair()
    with pytest.raises(ValueError, match=message):
        ours.encode(torch.zeros(1, 3, *size))


def test_wrong_channels_are_refused():
    ours, _ = pair()
    with pytest.raises(ValueError, match=r"x: shape \(1, 4, 8, 8\); allowed: \(B, 3, H, W\)"):
        ours.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"z: shape \(1, 3, 8, 8\); allowed: \(B, 4, h, w\)"):
        ours.decode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("config, message", [
    ({"norm_num_groups": 48}, "block_out_channels: .64,.; allowed: multiples of norm_num_groups"),
    ({"act_fn": "relu"}, "act_fn: 'relu'; allowed: 'silu'"),
    ({"down_block_types": ("AttnDownEncoderBlock2D",)}, "down_block_types"),
    ({"latent_channels": 0}, "latent_channels: 0; allowed: a whole number from 1"),
    ({"latents_mean": (0.0,)}, "latents_mean: 1 values; allowed: 4"),
])  # fmt: skip
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        KLAutoencoder(**config)


def test_one_block_type_stands_for_all_levels():
    model = KLAutoencoder(block_out_channels=(32, 64))
    assert tuple(model.config.down_block_types) == ("DownEncoderBlock2D",) * 2 and model.downsampling == 2


# ------------------------------------------------------------------ pipelines


@pytest.fixture
def caught(caplog):
    """Whatever diffusers or Python warns of while a pipeline is made and run."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    with warnings.catch_warnings(record=True) as python_warnings:
        warnings.simplefilter("always")
        yield lambda: [r.getMessage() for r in caplog.records] + [str(w.message) for w in python_warnings]
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def unet(**more):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    shape = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=32, **shape, **more
    ).eval()  # fmt: skip


def text_encoder(projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2, vocab_size=100,
        projection_dim=32, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def pipeline_parts():
    return {"unet": unet(), "text_encoder": text_encoder()}


def pipeline(cls, vae):
    """A Stable Diffusion pipeline with small random parts; prompts are given as embeddings."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    pipe = cls(
        vae=vae, **pipeline_parts(), tokenizer=None, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **more):
    embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3))
    return pipe(
        prompt_embeds=embeddings, negative_prompt_embeds=torch.zeros_like(embeddings), num_inference_steps=2,
        generator=torch.Generator().manual_seed(4), output_type="pt", **more,
    ).images  # fmt: skip


def type_complaints(messages):
    return [m for m in messages if "AutoencoderKL" in m or "vae" in m.lower() or "xpected type" in m]


def test_stable_diffusion_pipelines_give_what_they_give_with_diffusers(caught, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    ours, theirs = pair()
    for cls, more in (
        (StableDiffusionPipeline, {"height": 64, "width": 64}),
        (StableDiffusionImg2ImgPipeline, {"image": (images(64, 64, 1) + 1) / 2, "strength": 1.0}),
    ):
        pipe = pipeline(cls, ours)
        torch.testing.assert_close(
            run(pipe, **more), run(pipeline(cls, theirs), **more), rtol=1e-4, atol=1e-4
        )
    # a saved pipeline names diffusers' class, so that it loads where this package is unknown
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    absent = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "tokenizer": None}
    loaded = StableDiffusionImg2ImgPipeline.from_pretrained(
        tmp_path, vae=KLAutoencoder.from_pretrained(tmp_path, subfolder="vae"), **absent
    )
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded, **more), run(pipe, **more))
    assert type(StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path, **absent).vae) is AutoencoderKL
    assert not type_complaints(caught())


def test_sdxl_pipeline_gives_what_it_gives_with_diffusers(caught):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    embeddings = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3))
    pooled = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    results = []
    for vae in pair("sdxl"):
        conditioned = unet(addition_embed_type="text_time", addition_time_embed_dim=8,
                           projection_class_embeddings_input_dim=32 + 6 * 8)  # fmt: skip
        pipe = StableDiffusionXLPipeline(
            vae=vae, unet=conditioned, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), add_watermarker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        results.append(
            pipe(
                prompt_embeds=embeddings, negative_prompt_embeds=torch.zeros_like(embeddings),
                pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=torch.zeros_like(pooled),
                num_inference_steps=2, height=64, width=64, generator=torch.Generator().manual_seed(4),
                output_type="pt",
            ).images
        )  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not type_complaints(caught())
