"""Autoencoder: its config and files, and diffusers' VQModel made of one with a code book."""

import json

import pytest
import torch
from diffusers import VQModel

from kl_autoencoder import Autoencoder
from kl_autoencoder.cli.main import main

CONV = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}
VQ = {"kind": "vq", "codes": 12}


def test_plain_diffusers_loads_a_vq_model_of_the_same_function(tmp_path):
    torch.manual_seed(0)
    ours = Autoencoder(bottleneck=VQ, **CONV).eval()
    ours.to_vq_model().save_pretrained(tmp_path)
    theirs = VQModel.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).sample, ours(images).sample)
        z = theirs.encode(images).latents
        indices = theirs.quantize(z)[2][2].view(2, 8, 8)
        assert torch.equal(indices, ours.encode_indices(images)) and len(indices.unique()) > 1


def test_export_writes_a_vq_model_and_refuses_what_it_cannot_write(tmp_path, capsys):
    Autoencoder(bottleneck=VQ, **CONV).save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "-o", str(tmp_path / "theirs")]) == 0
    VQModel.from_pretrained(tmp_path / "theirs")
    assert (
        main(["export", str(tmp_path / "ours"), "-o", str(tmp_path / "a.safetensors"), "--single-file"]) == 2
    )
    assert "an Autoencoder; allowed: exported as a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", [{"bottleneck": {"kind": "none"}, **CONV}, {"bottleneck": VQ, "classes": 2, **CONV},
               {"bottleneck": VQ, "network": "mlp", "sample_size": 8}],
)  # fmt: skip
def test_other_models_are_no_vq_model(config):
    with pytest.raises(ValueError, match="allowed for a VQModel: conv, vq and 0"):
        Autoencoder(**config).to_vq_model()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bottleneck": {"kind": "soft"}}, "bottleneck.kind: 'soft'; allowed: kl, none"),
        ({"bottleneck": {"kind": "vq", "size": 3}}, "bottleneck: .*size"),
        ({"bottleneck": {"kind": ["vq"]}}, "bottleneck.kind: "),
        ({"network": "mlp", "sample_size": 2**20}, "sample_size, hidden_sizes: .* parameters in a layer"),
        ({"bottleneck": 7}, "bottleneck: 7; allowed"),
        ({"network": "transformer"}, "network: 'transformer'; allowed: 'conv' or 'mlp'"),
        ({"latent_channels": 2**40}, "latent_channels: "),
        ({"block_out_channels": [9, 16]}, "block_out_channels: .* multiples of norm_num_groups"),
        ({"classes": -1}, "classes: -1; allowed"),
        ({"layers_per_block": 2}, "encoder"),
    ],
)
def test_a_config_that_its_tensors_do_not_have_is_refused_by_name(change, message, tmp_path):
    Autoencoder(bottleneck=VQ, **CONV).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as error:
        Autoencoder.from_pretrained(tmp_path)
    assert len(str(error.value)) < 400


def test_images_and_latents_of_another_shape_are_refused():
    mlp = Autoencoder(network="mlp", sample_size=8, in_channels=1, out_channels=1)
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 16, 16), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match=r"x: shape .*; allowed: \(B, 1, 8, 8\)"):
            mlp.encode(images)
    with pytest.raises(ValueError, match=r"z: shape .*; allowed: \(B, 4, 1, 1\)"):
        mlp.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="bottleneck.kind: kl; allowed for codes"):
        mlp.encode_indices(torch.zeros(1, 1, 8, 8))
