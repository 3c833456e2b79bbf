"""What configs may say: each key's type and range, and the size of the network, told without building one."""

import json
import shutil
import tracemalloc

import pytest
import torch
from diffusers import AutoencoderKL

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.models.config import count_parameters
from kl_autoencoder.models.packaged import COMPACT
from tests.published import PUBLISHED, reduced


@pytest.mark.parametrize("config", [
    *PUBLISHED.values(), reduced(PUBLISHED["sd"]), {**PUBLISHED["flux"], "layers_per_block": 1, "in_channels": 4},
    {"block_out_channels": (32,), "use_quant_conv": False}, {"block_out_channels": (32, 64, 32), "out_channels": 1},
])  # fmt: skip
def test_parameters_are_counted(config):
    with torch.device("meta"):
        ours = KLAutoencoder(
            **{key: value for key, value in config.items() if not key.endswith("block_types")}
        )
        theirs = AutoencoderKL.from_config(ours.config)
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    assert count_parameters(ours.config) == expected
    assert expected == 83653863 or config is not PUBLISHED["sd"]


@pytest.mark.parametrize("key, value", [
    ("scaling_factor", [16384] * 4), ("scaling_factor", 0), ("scaling_factor", float("nan")),
    ("scaling_factor", 10**400), ("scaling_factor", True), ("scaling_factor", None), ("scaling_factor", "0.18"),
    ("shift_factor", float("inf")), ("shift_factor", [0.1]),
    ("latents_mean", "abcd"), ("latents_mean", [0, 0, None, 0]), ("latents_mean", [0.0] * 5),
    ("latents_std", [1, 1, 1, 0]), ("latents_std", 1.0),
    ("use_quant_conv", 2**31), ("use_post_quant_conv", None), ("mid_block_add_attention", "true"),
    ("force_upcast", 1), ("layers_per_block", 65536), ("layers_per_block", 2.0), ("layers_per_block", [1, 1]),
    ("block_out_channels", [2**30]), ("block_out_channels", []), ("block_out_channels", [32, "64"]),
    ("block_out_channels", 64), ("block_out_channels", [True, 32]), ("block_out_channels", [32] * 17),
    ("block_out_channels", [65536] * 4), ("in_channels", True), ("out_channels", -1), ("latent_channels", 1e3),
    ("norm_num_groups", "a" * 5000), ("norm_num_groups", 0), ("act_fn", ["silu"]), ("act_fn", {}),
    ("sample_size", None), ("sample_size", "512"), ("sample_size", []), ("sample_size", [512, 0]),
    ("down_block_types", "DownEncoderBlock2D"), ("up_block_types", [[]]), ("up_block_types", ["x"] * 9),
])  # fmt: skip
def test_nonsense_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"^(\w+, )*{key}.*: .*; allowed: ") as error:
        KLAutoencoder(**{key: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("key, value, told", [
    ("layers_per_block", 100, "layers_per_block: 100 in the config; the tensors are of a model with 1"),
    ("block_out_channels", [16, 32, 64, 4096],
     "block_out_channels: (16, 32, 64, 4096) in the config; the tensors are of a model with (16, 32, 64, 128)"),
    ("latent_channels", 16, "latent_channels: 16 in the config"),
    ("use_quant_conv", False, "use_quant_conv: False in the config; the tensors are of a model with True"),
    ("mid_block_add_attention", True, "mid_block_add_attention: True in the config"),
])  # fmt: skip
def test_a_config_is_compared_with_the_weights_before_anything_is_built(tmp_path, key, value, told):
    shutil.copytree(COMPACT, tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        KLAutoencoder.from_pretrained(tmp_path, subfolder="vae")
    assert str(error.value).startswith(f"{tmp_path / 'vae'}: {told}")
    assert tracemalloc.get_traced_memory()[1] < 2 << 20  # not even the modules of a hundred layers
    tracemalloc.stop()


def test_a_single_file_is_compared_with_what_is_given(tmp_path):
    KLAutoencoder.from_pretrained("compact").save_single_file(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"vae\.safetensors: layers_per_block: 3 in the config"):
        KLAutoencoder.from_single_file(tmp_path / "vae.safetensors", layers_per_block=3)


def test_sizes_may_differ_where_that_is_asked_for(tmp_path):
    KLAutoencoder(**reduced(PUBLISHED["sd"])).save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}
    wider = KLAutoencoder.from_pretrained(tmp_path, latent_channels=8, **options)
    assert wider.decoder.conv_in.weight.shape == (96, 8, 3, 3)
    with pytest.raises(
        ValueError, match="latent_channels: 8 in the config; the tensors are of a model with 4"
    ):
        KLAutoencoder.from_pretrained(tmp_path, latent_channels=8)


def test_variants_and_parts(tmp_path):
    vae = KLAutoencoder(**reduced(PUBLISHED["sd"]))
    vae.save_pretrained(tmp_path, variant="fp16")
    vae.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    for loaded in (KLAutoencoder.from_pretrained(tmp_path, variant="fp16"),
                   KLAutoencoder.from_pretrained(tmp_path / "parts")):  # fmt: skip
        assert all(torch.equal(t, vae.state_dict()[name]) for name, t in loaded.state_dict().items())
    for folder, variant in ((tmp_path, "fp16"), (tmp_path / "parts", None)):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 4}))
        with pytest.raises(ValueError, match="layers_per_block: 4 in the config"):
            KLAutoencoder.from_pretrained(folder, variant=variant)
