"""KLAutoencoderFlux2 against diffusers' AutoencoderKLFlux2: numbers, gradients, normalisation, files, pipelines."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Pipeline
from safetensors.torch import load_file, save_file

from kl_autoencoder import KLAutoencoder, KLAutoencoderFlux2
from kl_autoencoder.inference import dispatch
from kl_autoencoder.models.config import count_parameters
from tests.models.test_autoencoder_kl import images
from tests.models.tiny_pipelines import run_pipeline, tiny_pipeline, tiny_vae

SYMMETRIC = {"decoder_block_out_channels": None}
KINDS = pytest.mark.parametrize("widths", [{}, SYMMETRIC], ids=["asymmetric", "symmetric"])


def pair(widths):
    theirs = tiny_vae("flux2", **widths)
    return KLAutoencoderFlux2.from_diffusers(theirs), theirs


@KINDS
@pytest.mark.parametrize("pieces", [False, True])
def test_answers_and_gradients_are_those_of_diffusers(widths, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(dispatch, "SMALL_BYTES_A_THREAD", 0)
    ours, theirs = pair(widths)
    x = images()
    with torch.no_grad():
        posterior, expected = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.parameters, expected.parameters, rtol=1e-5, atol=1e-5)
        z = expected.mode()
        wanted = theirs.decode(z).sample
        torch.testing.assert_close(
            ours.decode(z).sample, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item()
        )
    gradients = []
    for vae in (ours.train(), theirs.train()):
        vae.zero_grad()
        vae(x).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in vae.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[1].items():
        atol = 2e-4 * float(wanted.abs().max()) + 1e-8  # to_k's bias has none
        torch.testing.assert_close(gradients[0][name], wanted, rtol=0, atol=atol)


@KINDS
def test_it_is_a_diffusers_component(widths):
    ours, theirs = pair(widths)
    assert isinstance(ours, AutoencoderKLFlux2) and KLAutoencoderFlux2 == AutoencoderKLFlux2
    assert KLAutoencoderFlux2 not in (AutoencoderKL, KLAutoencoder)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(ours.config[key] == value for key, value in theirs.config.items() if key[0] != "_")
    assert count_parameters(ours.config) == sum(p.numel() for p in theirs.parameters())
    assert repr(ours).startswith("KLAutoencoderFlux2(")
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(copied) is KLAutoencoderFlux2
        assert torch.equal(copied.bn.running_mean, theirs.bn.running_mean)


def test_latents_are_normalised_as_pipelines_do():
    ours, theirs = pair({})
    z = torch.randn(2, 32, 4, 6)
    patches = Flux2Pipeline._patchify_latents(z)
    mean, variance = (t.view(1, -1, 1, 1) for t in (theirs.bn.running_mean, theirs.bn.running_var))
    expected = (patches - mean) / torch.sqrt(variance + theirs.config.batch_norm_eps)
    torch.testing.assert_close(ours.scale(z), expected)
    torch.testing.assert_close(ours.unscale(expected), z)
    with pytest.raises(ValueError, match="latents of 3x6; allowed: multiples of the patches' 2x2"):
        ours.scale(torch.zeros(1, 32, 3, 6))


@KINDS
def test_folders_are_read_by_both_classes(widths, tmp_path):
    ours, _ = pair(widths)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKLFlux2"
    for cls in (AutoencoderKLFlux2, KLAutoencoderFlux2):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in loaded.state_dict().items())


@KINDS
def test_single_files_of_both_layouts(widths, tmp_path):
    ours, _ = pair(widths)
    ours.save_single_file(tmp_path / "ae.safetensors")
    tensors = load_file(tmp_path / "ae.safetensors")
    # Black Forest Labs' own names
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.weight", "bn.running_var"} <= tensors.keys()
    assert "decoder.up.0.block.0.norm1.weight" in tensors
    save_file(tensors, tmp_path / "bare.safetensors")  # as they have it, without our metadata
    save_file(ours.state_dict(), tmp_path / "diffusers.safetensors")
    for name in ("ae", "bare", "diffusers"):
        loaded = KLAutoencoderFlux2.from_single_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(v, ours.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert loaded.decoder.conv_in.weight.shape == ours.decoder.conv_in.weight.shape
    del tensors["bn.running_var"]
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="missing: bn.running_var"):
        KLAutoencoderFlux2.from_single_file(tmp_path / "bare.safetensors")


def test_it_works_in_a_pipeline(tmp_path):
    pipe = tiny_pipeline("flux2")
    expected = run_pipeline(pipe, "flux2")
    pipe.register_modules(vae=KLAutoencoderFlux2.from_diffusers(pipe.vae))
    torch.testing.assert_close(run_pipeline(pipe, "flux2"), expected, rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [
        "diffusers",
        "AutoencoderKLFlux2",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder_block_out_channels": (8, 8)}, "decoder_block_out_channels: 2 levels; allowed: 4"),
        (
            {"decoder_block_out_channels": (8, 8, 8, 12)},
            "decoder_block_out_channels: .*multiples of norm_num",
        ),
        ({"patch_size": (2,)}, "patch_size: .*; allowed: two whole numbers"),
        ({"batch_norm_eps": -1.0}, "batch_norm_eps: -1.0; allowed: a number above 0"),
    ],
)
def test_configs_that_no_network_can_have(given, message):
    with pytest.raises(ValueError, match=message):
        KLAutoencoderFlux2(block_out_channels=(8,) * 4, norm_num_groups=8, **given)
