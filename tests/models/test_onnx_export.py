"""ONNX: onnxruntime computes what torch computes, at any size, in float16 too, from files that name no path."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.models.publishing import onnx_export
from tests.models.test_float16 import enlarge, model


@pytest.fixture(scope="module")
def vae():
    """With attention, quant_conv, and downsampling by 2; in float16 as it is it overflows."""
    return enlarge(model(widths=(16, 32)))


@pytest.fixture(scope="module")
def told():
    """What the command prints of its check, by type."""
    return {}


@pytest.fixture(scope="module")
def folders(vae, told, tmp_path_factory):
    """What the command writes of it, by type, into the folder of a pipeline."""
    folder = tmp_path_factory.mktemp("onnx")
    vae.save_pretrained(folder / "vae")
    KLAutoencoder.from_pretrained(folder / "vae").save_pretrained(folder / "vae")
    for dtype in ("float32", "float16"):
        (folder / dtype / "vae_decoder").mkdir(parents=True)
        (folder / dtype / "model_index.json").write_text("{}")
        command = ["export", folder / "vae", "--onnx", "--dtype", dtype, "-o", folder / dtype]
        assert main([str(word) for word in command]) == 2  # not without --overwrite
        assert not list((folder / dtype / "vae_decoder").iterdir())
        with redirect_stdout(StringIO()) as out:
            assert main([str(word) for word in (*command, "--overwrite")]) == 0
        told[dtype] = out.getvalue().splitlines()[0]
    assert {path.name for path in folder.iterdir()} == {"vae", "float32", "float16"}
    return {dtype: folder / dtype for dtype in ("float32", "float16")}


def computed(folder, name, x):
    session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert [*given.shape[::2], given.shape[3]] == ["batch", "height", "width"]
    (values,) = session.run(None, {given.name: x.numpy()})
    return given.name, result.name, torch.from_numpy(values)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 2e-2)])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 20, 44), (2, 64, 16)])
def test_onnxruntime_computes_what_diffusers_computes(vae, folders, dtype, tolerance, shape):
    """Diffusers' own network in float32; `tolerance` as a part of the range."""
    theirs = AutoencoderKL.from_pretrained(folders["float32"].parent / "vae").eval()
    b, h, w = shape
    x = torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(h)) * 2 - 1
    with torch.no_grad():
        wanted = theirs.encode(x).latent_dist.parameters
        z = wanted[:, : vae.config.latent_channels]
        images = theirs.decode(z).sample
    half = getattr(torch, dtype)
    *names, parameters = computed(folders[dtype], "vae_encoder", x.to(half))
    assert names == ["sample", "latent_parameters"] and parameters.dtype == half
    logvar = parameters.float().chunk(2, dim=1)[1].clamp(-30, 20)  # as the distribution clamps it
    parameters = torch.cat([parameters.float().chunk(2, dim=1)[0], logvar], dim=1)
    wanted = torch.cat([wanted.chunk(2, dim=1)[0], wanted.chunk(2, dim=1)[1].clamp(-30, 20)], dim=1)
    *names, decoded = computed(folders[dtype], "vae_decoder", z.to(half))
    assert names == ["latent_sample", "sample"] and decoded.shape == x.shape
    for got, right in ((parameters, wanted), (decoded.float(), images)):
        assert (got - right).abs().max() <= tolerance * (right.max() - right.min())


def test_files_say_what_they_are_of_and_nothing_of_this_machine(vae, folders):
    for dtype, folder in folders.items():
        assert {path.name for path in folder.iterdir()} == {"vae_encoder", "vae_decoder", "model_index.json"}
        for path in (*folder.glob("vae_*/*"), folder.parent / "vae" / "config.json"):
            content = path.read_bytes()
            assert b".py" not in content and bytes(folder.parent) not in content
        config = json.loads((folder / "vae_decoder" / "config.json").read_text())
        assert config["_class_name"] == "AutoencoderKL"
        assert config["scaling_factor"] == vae.config.scaling_factor
        assert config["force_upcast"] == (dtype == "float32")


def test_weights_that_are_not_the_models_are_noticed(vae, folders):
    other = model(widths=(16, 32))
    other.decoder.conv_out.weight.mul_(1.01)
    with pytest.raises(
        ValueError, match=r"vae_decoder: onnxruntime differs from torch by 0\.0\d+ of the range"
    ):
        onnx_export.differences(_with_encoder_of(vae, other), folders["float32"])


def _with_encoder_of(vae, other):
    other.encoder, other.quant_conv = vae.encoder, vae.quant_conv
    return other


def test_the_command_says_what_it_checked(folders, told):
    for dtype, tolerance in (("float32", 1e-4), ("float16", 2e-2)):
        assert told[dtype].startswith(
            "checked onnxruntime against torch at latents of 1x8x8, 3x5x7, 1x16x9: vae_encoder"
        )
        assert all(float(value) < tolerance for value in re.findall(r"within (\S+?),? ", told[dtype]))
        assert len(re.findall("within", told[dtype])) == 2
