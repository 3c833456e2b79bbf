"""encode-dataset: every row against the model itself, and the same bytes whatever happens on the way."""

import io
import json
import os
import random
import signal
import time

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from skimage import data

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_io import load_image, open_image
from kl_autoencoder.latents.latent_dataset import stored_latents
from kl_autoencoder.latents.shards import ShardFolder
from kl_autoencoder.networks.distributions import DiagonalGaussian
from tests.processes import finish, start, start_ranks, wait_until

CAPTIONS = ["an astronaut", "a cat", "coffee"]


def tiny(seed=0):
    torch.manual_seed(seed)
    return KLAutoencoder(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=3).eval()


def encode(model, source, output, *more, size=32):
    arguments = ["--model", str(model), "--data", str(source), "--size", str(size), "-o", str(output)]
    return main(
        ["encode-dataset", *arguments, "--device", "cpu", "--workers", "0", "--shard-rows", "4", *more]
    )


def contents(folder):
    """Path -> bytes of every file but the lock."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock"}


def rows_of(folder):
    return datasets.load_dataset(str(folder), split="train")


def test_every_row_is_what_the_model_says(model, parquet, undisturbed):
    vae, source = (
        KLAutoencoder.from_pretrained(model),
        datasets.load_dataset("parquet", data_files=str(parquet)),
    )
    source = source["train"].cast_column("image", datasets.Image(decode=False))
    rows = rows_of(undisturbed)
    wanted = [i for i in range(27) if i != 5 and not 8 <= i < 12]
    assert [(row["row"], row["flipped"]) for row in rows] == [
        (i, flip) for i in wanted for flip in (False, True)
    ]
    assert rows.features["kind"].names == ["even", "odd"]
    for row in rows:
        photo = open_image(io.BytesIO(source[row["row"]]["image"]["bytes"]))
        height, width = 4 * row["shape"][1], 4 * row["shape"][2]
        images = load_image(photo, (height, width), multiple_of=1)
        images = images.flip(-1) if row["flipped"] else images
        posterior = vae.encode(images).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], 1)[0]
        assert torch.allclose(stored_latents(row, "moments").float(), moments, rtol=1e-3, atol=1e-3)
        assert row["original_size"] == [photo.height, photo.width]
        assert (row["source_id"], row["dtype"]) == (f"row {row['row']}", "float16")
        assert (row["caption"], row["kind"]) == (CAPTIONS[row["row"] % 3], row["row"] % 2)
        left, top, right, bottom = row["crop_box"]
        assert left == pytest.approx(photo.width - right, abs=1e-3)
        assert top == pytest.approx(photo.height - bottom, abs=1e-3)
        assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=1e-3)
    assert len({tuple(row["shape"]) for row in rows}) >= 4


def test_skipped_photographs_are_counted_and_listed(undisturbed):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["skipped"] == {"too small": 4, "unreadable": 1}
    lines = (undisturbed / "skipped.csv").read_text().splitlines()
    assert lines[0] == "row,source_id,reason" and lines[1].startswith("5,row 5,unreadable: ")
    assert [line.split(",")[0] for line in lines[2:]] == ["8", "9", "10", "11"]
    assert lines[2] == '8,row 8,"too small: 200x10 pixels, too small for 64x16"'
    assert [path.name for path in (undisturbed / "empty").iterdir()] == ["train-00002-of-00007.parquet"]


@pytest.mark.parametrize("content", ["moments", "sample", "mode"])
@pytest.mark.parametrize("stored_as", ["float16", "bfloat16", "float32"])
def test_statistics_equal_numpy(model, photographs, tmp_path, content, stored_as):
    more = ("--content", content, "--store", stored_as, "--shard-rows", "7")
    assert encode(model, photographs, tmp_path / "out", *more) == 0
    latents = [stored_latents(row, content).double() for row in rows_of(tmp_path / "out")]
    z = np.stack([z.numpy() for z in latents])
    variance = np.zeros(())
    if content == "moments":
        z, logvar = np.split(z, 2, axis=1)
        variance = np.exp(logvar)
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["statistics"]
    channels = np.moveaxis(z, 1, 0).reshape(3, -1)
    noise = np.moveaxis(variance, 1, 0).reshape(3, -1).mean(1) if content == "moments" else 0
    np.testing.assert_allclose(found["mean"], channels.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found["std"], np.sqrt(channels.var(1) + noise), rtol=1e-9)
    np.testing.assert_allclose(found["shift_factor"], z.mean(), rtol=1e-9)
    np.testing.assert_allclose(found["scaling_factor"], 1 / np.sqrt(z.var() + variance.mean()), rtol=1e-9)


def test_samples_are_of_the_moments(model, photographs, tmp_path):
    for content in ("moments", "sample"):
        more = ("--content", content, "--store", "float32")
        assert encode(model, photographs, tmp_path / content, *more) == 0
    pairs = zip(rows_of(tmp_path / "moments"), rows_of(tmp_path / "sample"), strict=True)
    noise = []
    for moments, sample in pairs:
        posterior = DiagonalGaussian(stored_latents(moments, "moments")[None])
        noise.append((stored_latents(sample, "sample")[None] - posterior.mean) / posterior.std)
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs((noise[0] * noise[1]).mean()) < 0.15  # each photograph has noise of its own


@pytest.mark.parametrize(
    "change",
    [("--workers", "2"), ("--store", "float16"), ("ranks",), ("threads",)],
    ids=["workers", "again", "ranks", "threads"],
)
def test_rows_do_not_depend_on_workers_ranks_or_threads(model, parquet, undisturbed, tmp_path, change):
    settings = ("--keep", "caption", "kind", "--flip", "--crop", "buckets")
    output = tmp_path / "out"
    if change == ("ranks",):
        arguments = (str(model), str(parquet), str(output), *settings)
        assert finish(*start_ranks(3, tmp_path / "log", encode, *arguments)) == [0, 0, 0]
    elif change == ("threads",):
        process = start(tmp_path / "log", encode_with_threads, 3, model, parquet, output, *settings)
        assert finish(process) == [0]
    else:
        assert encode(model, parquet, output, *settings, *change) == 0
    assert contents(output) == contents(undisturbed)


def encode_with_threads(threads, *arguments):
    torch.set_num_threads(threads)
    return encode(*arguments)


def test_kills_change_no_byte(model, parquet, undisturbed, tmp_path):
    """Two ranks are killed five times, at random moments; a complete shard is never written again."""
    settings = ("--keep", "caption", "kind", "--flip", "--crop", "buckets", "--workers", "1")
    arguments = (str(model), str(parquet), str(tmp_path / "out"), *settings)
    rng, complete = random.Random(3), {}
    shards, killed = tmp_path / "out" / "data", 0
    for kill in range(5):
        ranks = start_ranks(2, tmp_path / "log", encode, *arguments)
        wait_until(lambda more=kill + 1: len([*shards.glob("*.parquet")]) >= more, ranks[0])
        time.sleep(0.02 * rng.random())
        for process in ranks:
            process.kill()
        killed += finish(*ranks).count(-signal.SIGKILL)
        for path in shards.glob("*.parquet"):
            assert complete.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert killed > 0  # not all had ended before
    assert finish(*start_ranks(2, tmp_path / "log", encode, *arguments)) == [0, 0]
    assert contents(tmp_path / "out") == contents(undisturbed)
    for path in shards.glob("*.parquet"):
        assert complete.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns


def test_another_model_setting_or_source_is_refused(
    model, parquet, photographs, undisturbed, tmp_path, capsys
):
    tiny(seed=1).save_pretrained(tmp_path / "other")
    settings = ("--keep", "caption", "kind", "--flip", "--crop", "buckets")
    before = contents(undisturbed)
    for wanted, given in (
        ("model.weights_sha256", (tmp_path / "other", parquet, undisturbed, *settings)),
        ("settings.store", (model, parquet, undisturbed, *settings, "--store", "float32")),
        ("settings.crop buckets, not centre", (model, parquet, undisturbed, *settings[:-2])),
        ("source.rows 27, not 48", (model, photographs, undisturbed, "--flip", "--crop", "buckets")),
    ):
        assert encode(*given) == 2
        assert wanted in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert contents(undisturbed) == before
    (tmp_path / "other" / "holiday.jpg").write_bytes(b"")
    assert encode(model, parquet, tmp_path / "other") == 2
    assert "holds other things than latents" in capsys.readouterr().err


def test_photographs_changed_since_are_noticed(model, tmp_path, capsys):
    for name in "ab":
        Image.fromarray(data.chelsea()[:64, :64]).save(tmp_path / f"{name}.png")
    assert encode(model, tmp_path, tmp_path / ".out") == 0
    Image.fromarray(data.coffee()[:64, :64]).save(tmp_path / "b.png")
    assert encode(model, tmp_path, tmp_path / ".out") == 2
    assert "source.sampled_sha256" in capsys.readouterr().err


def test_claims_are_of_one_process_and_end_with_it(tmp_path):
    folder = tmp_path / "out"
    with ShardFolder(folder, 10, 3) as ours:
        claims = ours.claims(1, 2)
        assert next(claims) == 1
        assert finish(start(tmp_path / "log", claim_all, folder, tmp_path / "claimed")) == [0]
        # its own, then what is left, but not 1
        assert json.loads((tmp_path / "claimed").read_text()) == [0, 2, 3]
        assert list(claims) == [3, 0, 2]
        assert [len(ours.rows(k)) for k in range(ours.count)] == [3, 3, 3, 1]


def claim_all(folder, target):
    with ShardFolder(folder, 10, 3) as shards:
        target.write_text(json.dumps(list(shards.claims(0, 2))))
    return 0


def test_random_crops_depend_on_the_seed(model, tmp_path):
    crops = {}
    for seed in ("0", "1"):
        Image.fromarray(data.coffee()).save(tmp_path / "wide.png")
        assert encode(model, tmp_path / "*.png", tmp_path / seed, "--crop", "random", "--seed", seed) == 0
        crops[seed] = rows_of(tmp_path / seed)[0]["crop_box"]
    assert crops["0"] != crops["1"] and crops["0"][3] - crops["0"][1] == 400


def test_latents_that_are_not_finite_are_an_error(tmp_path, photographs, capsys):
    vae = tiny()
    vae.quant_conv.bias.data.fill_(1e5)  # fits into float32, not into float16
    vae.save_pretrained(tmp_path / "vae")
    assert encode(tmp_path / "vae", photographs, tmp_path / "out") == 2
    assert "not finite in float32 stored as float16" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "data").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_workers_end_with_their_parent(model, tmp_path, number):
    """Each photograph is larger than a pipe's buffer, so that a worker is blocked while it hands one over."""
    (tmp_path / "in").mkdir()
    Image.fromarray(data.astronaut()).save(tmp_path / "in" / "0.jpg")
    for i in range(1, 400):
        (tmp_path / "in" / f"{i}.jpg").symlink_to("0.jpg")
    arguments = (str(model), str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "2")
    process = start(tmp_path / "log", encode_at_256, *arguments)
    parent, workers = psutil.Process(process.pid), []
    assert wait_until(lambda: (tmp_path / "out" / "data").is_dir() and len(parent.children()) == 2, process)
    assert wait_until(lambda: any((tmp_path / "out" / "data").iterdir()), process)
    workers = parent.children()
    os.kill(process.pid, number)
    assert finish(process) == [130 if number == signal.SIGINT else -number]
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for left in alive:
        left.kill()
    assert len(gone) == 2 and not alive


def encode_at_256(*arguments):
    return encode(*arguments, size=256)
