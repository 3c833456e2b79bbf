"""Shared fixtures: what is beside the project (`../shared`) is used where it is there."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Before torch is imported anywhere, for this process and those it starts. Small networks gain nothing from more
# threads, and where another program holds a core these wait for one another thousands of times a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads of the tests that have several wait without computing: beside another process that spins for minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# LPIPS backbones from beside the project, unless the user has some.
if "TORCH_HOME" not in os.environ and (SHARED / "torch_home").is_dir():
    os.environ["TORCH_HOME"] = str(SHARED / "torch_home")


def backbone_missing(net):
    from kl_autoencoder.evaluation.metrics import backbone_file

    return not backbone_file(net).is_file()


@pytest.fixture(params=["alex", "squeeze"])
def lpips_net(request):
    """A net whose backbone is on this machine; nothing is downloaded."""
    if backbone_missing(request.param):
        pytest.skip(f"the LPIPS backbone {request.param} is not in TORCH_HOME")
    return request.param


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of 48 PNG of 64x64, see `write_photographs`."""
    from tests.photograph_tiles import write_photographs

    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def shard_server(photographs, tmp_path_factory):
    """A local HTTP server of eight webdataset shards, six of the photographs in each.

    `server.url + "/shard-{000..007}.tar"` names them all; the image column is png.
    """
    from tests.file_server import FileServer, write_tar

    folder, files = tmp_path_factory.mktemp("shards"), sorted(photographs.iterdir())
    for i in range(8):
        entries = ((file.name, file.read_bytes()) for file in files[i::8])
        write_tar(folder / f"shard-{i:03d}.tar", entries)
    with FileServer(folder) as server:
        yield server


@pytest.fixture(scope="session")
def two_models(tmp_path_factory):
    """A folder with two small models of different shapes, untrained."""
    import torch

    from kl_autoencoder import KLAutoencoder

    folder = tmp_path_factory.mktemp("models")
    for seed, (name, levels, channels) in enumerate((("first", 4, 4), ("second", 3, 2))):
        torch.manual_seed(seed)
        vae = KLAutoencoder(block_out_channels=(8,) * levels, norm_num_groups=4, latent_channels=channels)
        vae.save_pretrained(folder / name / "export")
    return folder


@pytest.fixture(scope="session")
def five_photos(tmp_path_factory):
    """A folder of five photographs of different shapes, and a file that is none."""
    from PIL import Image
    from skimage import data

    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("astronaut", "chelsea", "coffee", "rocket", "cat")):
        Image.fromarray(getattr(data, name)()[40 : 240 + 10 * i, 60 : 320 - 10 * i]).save(
            folder / f"{name}.png"
        )
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="session")
def report(two_models, five_photos, tmp_path_factory):
    """The folder that one process of `evaluate` wrote of them, with all images."""
    from tests.evaluated import evaluate

    output = tmp_path_factory.mktemp("report") / "report"
    assert evaluate(two_models, five_photos, output, "--save-images") == 0
    return output
