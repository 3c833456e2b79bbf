"""`study`: the measures and pictures that it writes of a model, and its errors."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder import Autoencoder, KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.evaluation.variational.measures import Images, encode, measure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with an untrained model of gray 16x16 images, its config and its metrics."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    network = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "sample_size": 16}
    vae = KLAutoencoder(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **network)
    vae.save_pretrained(folder / "export")
    (folder / "config.yaml").write_text("loss: {reconstruction: l1}\n")
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": n, "train/reconstruction": 1 / n, "train/kl": 0.1}) + "\n" for n in (1, 2, 3)
        )
    )
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Twelve gray images of 16x16 in two folders, dark and light."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / name).mkdir()
        for number in range(6):
            pixels = random.integers(low, low + 128, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def pixels(folder):
    files = sorted(folder.rglob("*.png"))
    stacked = np.stack([np.asarray(Image.open(file)) for file in files])
    return torch.from_numpy(stacked).float()[:, None] / 127.5 - 1


def test_it_writes_the_measures_of_the_library_and_pictures(run, classes, tmp_path, capsys):
    output = tmp_path / "study"
    assert main(["study", str(run), "--data", str(classes), "-o", str(output), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    names = {"measures.json", "traversals.png", "latents.png", "training.png"}
    assert {path.name for path in output.iterdir()} == names
    found = json.loads((output / "measures.json").read_text())
    assert found["likelihood"] == "laplace"  # the run's l1

    vae = KLAutoencoder.from_pretrained(run / "export").eval()
    data = Images(pixels(classes))
    with torch.no_grad():
        wanted = measure(vae, data, encode(vae, data), "laplace")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value == found[name] or math.isclose(value, found[name], rel_tol=1e-4, abs_tol=1e-5), name
    assert f"elbo                {found['elbo']:.5g} nats" in told and "active_units" in told

    assert main(["study", str(run), "--data", str(classes), "-o", str(output)]) == 2
    assert "measures.json: exists already; --overwrite replaces it" in capsys.readouterr().err


def test_json_alone_is_printed_on_request(run, classes, tmp_path, capsys):
    command = ["study", str(run), "--data", str(classes), "-o", str(tmp_path), "--json", "--limit", "4"]
    assert main([*command, "--likelihood", "bernoulli"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "measures.json").read_text())
    assert printed["images"] == 4 and printed["likelihood"] == "bernoulli" and "log_scale" not in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--size", "15"], "--size: 15; allowed: multiples of 2"),
        (["--label-column", "kind"], "--label-column: 'kind', but "),
        (["--limit", "1"], "allowed: at least 2"),
    ],
)
def test_impossible_options_are_refused(run, classes, tmp_path, capsys, options, told):
    command = ["study", str(run), "--data", str(classes), "-o", str(tmp_path / "study"), *options]
    assert main(command) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


KINDS = {
    "vq": ({"kind": "vq", "codes": 5}, {"codes.png", "latents.png"}),
    "fsq": ({"kind": "fsq", "levels": [3, 2]}, {"codes.png", "latents.png"}),
    "adversarial": ({"kind": "adversarial", "prior": "swiss_roll"}, {"traversals.png", "latents.png"}),
    "none": ({"kind": "none"}, {"traversals.png", "latents.png"}),
    "kl": ({"kind": "kl"}, {"manifold.png", "traversals.png", "latents.png"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_bottleneck(kind, classes, tmp_path, capsys):
    """Of fully connected models with two latents, conditional on the two classes."""
    bottleneck, pictures = KINDS[kind]
    torch.manual_seed(0)
    shape = {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "sample_size": 16}
    model = Autoencoder(network="mlp", hidden_sizes=(8,), classes=2, bottleneck=bottleneck, **shape).eval()
    with torch.no_grad():  # so that the class counts, as it does after training
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    command = [
        "study",
        str(tmp_path / "model"),
        "--data",
        str(classes),
        "-o",
        str(tmp_path / "study"),
        "--json",
    ]
    assert main([*command, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "study").iterdir()} == pictures | {"measures.json"}

    images, labels = pixels(classes), torch.tensor([0] * 6 + [1] * 6)
    with torch.no_grad():
        reconstruction = model(images, labels).sample
        assert math.isclose(found["mse"], float((reconstruction - images).square().mean()), rel_tol=1e-5)
        if model.is_discrete:
            counts = model.encode_indices(images, labels).flatten().bincount(minlength=model.codes)
            wanted = torch.distributions.Categorical(counts / 12).entropy().exp()
            assert math.isclose(found["perplexity"], float(wanted), rel_tol=1e-5)
            assert found["codes"] == model.codes and found["usage"] == int((counts > 0).sum()) / model.codes
        elif kind == "kl":
            rate = model.encode(images, labels).latent_dist.kl().mean()
            assert math.isclose(found["rate"], float(rate), rel_tol=1e-5)
        else:
            assert found["prior"] == bottleneck.get("prior", "normal") and math.isfinite(found["mmd"])
