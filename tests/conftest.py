"""Shared fixtures; the folder `../shared` beside the project is used where it exists."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Set before torch is imported anywhere, for this process and those that it starts. Small networks gain nothing from
# more threads, which on a core shared with another program wait for each other thousands of times a second.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In tests with several threads the waiting ones sleep: spinning beside another busy process takes minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The LPIPS backbones of ../shared, unless the user has set TORCH_HOME.
if "TORCH_HOME" not in os.environ and (SHARED / "torch_home").is_dir():
    os.environ["TORCH_HOME"] = str(SHARED / "torch_home")


def pytest_xdist_auto_num_workers(config):
    """One worker more than there are cores: many tests wait for processes that they have started."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else (os.cpu_count() or 1) + 1


def backbone_missing(net):
    from kl_autoencoder.evaluation.metrics import backbone_file

    return not backbone_file(net).is_file()


@pytest.fixture
def nothing_is_small(monkeypatch):
    """Execute small networks, which are quick to test, in pieces as large ones are."""
    from kl_autoencoder.inference import dispatch

    monkeypatch.setattr(dispatch, "SMALL_BYTES_A_THREAD", 0)


@pytest.fixture
def two_threads():
    """Let torch compute with two threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["alex", "squeeze"])
def lpips_net(request):
    """The name of an LPIPS net; skips where its backbone is not on this machine, nothing is downloaded."""
    if backbone_missing(request.param):
        pytest.skip(f"the LPIPS backbone {request.param} is not in TORCH_HOME")
    return request.param


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium; the test is skipped where there is none."""
    from tests.chromium import chromium

    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


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
    """A folder of five photographs of different shapes and one file that is not an image, broken.png."""
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
    """The folder that `evaluate --save-images` of `two_models` on `five_photos` wrote, in one process."""
    from tests.evaluated import evaluate

    output = tmp_path_factory.mktemp("report") / "report"
    assert evaluate(two_models, five_photos, output, "--save-images") == 0
    return output
