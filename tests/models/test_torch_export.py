"""Programs of torch.export compute what diffusers computes, at any size, and name nothing of this machine."""

import re
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from diffusers import AutoencoderKL

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.models.publishing import torch_export
from tests.conftest import ROOT
from tests.models.test_float16 import enlarge, model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(the model's folder, what the command wrote, its line)."""
    folder = tmp_path_factory.mktemp("program")
    enlarge(model(widths=(16, 32))).save_pretrained(folder / "vae")
    KLAutoencoder.from_pretrained(folder / "vae").save_pretrained(folder / "vae")
    with redirect_stdout(StringIO()) as out:
        assert main(["export", str(folder / "vae"), "--torch-export", "-o", str(folder / "out")]) == 0
    assert {path.name for path in folder.iterdir()} == {"vae", "out"}
    return folder / "vae", folder / "out", out.getvalue().splitlines()[0]


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 20, 44), (2, 64, 16)])
def test_programs_compute_what_diffusers_computes(exported, shape):
    """In a process that has never heard of this package, at three sizes, to 1e-4 of the range."""
    folder, programs, _ = exported
    theirs = AutoencoderKL.from_pretrained(folder).eval()
    b, h, w = shape
    x = torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(h)) * 2 - 1
    with torch.no_grad():
        moments = theirs.quant_conv(theirs.encoder(x))
        z = moments[:, : theirs.config.latent_channels]
        images = theirs.decode(z).sample
        for name, given, wanted in (("vae_encoder", x, moments), ("vae_decoder", z, images)):
            got = torch.export.load(programs / name / "model.pt2").module()(given)
            assert (got - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


def test_a_program_needs_torch_alone(exported, tmp_path):
    program = f"""
import sys, torch
decode = torch.export.load({str(exported[1] / "vae_decoder" / "model.pt2")!r}).module()
assert decode(torch.zeros(2, 4, 7, 9)).shape == (2, 3, 14, 18)
assert "diffusers" not in sys.modules and "kl_autoencoder" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, check=True)


def test_a_program_names_nothing_of_this_machine(exported):
    paths = list(exported[1].glob("*/model.pt2"))
    assert len(paths) == 2
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                assert b".py" not in content and str(ROOT).encode() not in content, name


def test_the_command_says_what_it_checked(exported):
    told = exported[2]
    assert told.startswith(
        "checked the programs against torch at latents of 1x8x8, 3x5x7, 1x16x9: vae_encoder"
    )
    assert all(float(value) < 1e-4 for value in re.findall(r"within (\S+?),? ", told))
    assert len(re.findall("within", told)) == 2


def test_weights_that_are_not_the_models_are_noticed(exported):
    other = KLAutoencoder.from_pretrained(exported[0]).eval()
    with torch.no_grad():
        other.decoder.conv_out.weight.mul_(1.01)
    with pytest.raises(
        ValueError, match=r"vae_decoder: the program differs from torch by 0\.0\d+ of the range"
    ):
        torch_export.differences(other, exported[1])
