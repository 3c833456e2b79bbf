"""`evaluate`: what it writes equals scikit-image and lpips on the written images, on one process and on two."""

import csv
import json
import os
import signal

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_dataset import Photographs
from kl_autoencoder.data.image_io import load_image, tensor_to_images
from kl_autoencoder.evaluation import runner
from kl_autoencoder.evaluation.methods import Model, short_names
from tests.evaluated import NET, SIZE, evaluate, evaluate_one
from tests.processes import finish, start, start_ranks, wait_until


@pytest.fixture
def metrics(report):
    return json.loads((report / "metrics.json").read_text())


@pytest.fixture
def rows(report):
    with open(report / "images.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_values_are_those_of_the_written_images(report, metrics, rows):
    distance = lpips.LPIPS(net=NET, verbose=False) if NET else None
    keys = list(metrics["results"])
    assert len(keys) == 10 and len(rows) == 5
    for row in rows:
        name = f"{int(row['number']):06d}.png"
        original = np.asarray(Image.open(report / "images" / "original" / name))
        for key in keys:
            image = np.asarray(Image.open(report / "images" / key / name))
            expected = {
                "psnr": peak_signal_noise_ratio(original, image, data_range=255),
                "ssim": structural_similarity(
                    original, image, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
                    use_sample_covariance=False,
                ),
            }  # fmt: skip
            if distance:
                pair = [
                    torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for x in (original, image)
                ]
                expected["lpips"] = distance(*pair).item()
            for metric, value in expected.items():
                assert float(row[f"{key}:{metric}"]) == pytest.approx(value, abs=1e-4)


def test_means_and_deviations_are_those_of_the_rows(metrics, rows):
    for key, result in metrics["results"].items():
        for name in ("psnr", "ssim", "ms_ssim", "bits_per_pixel"):
            values = [float(row[f"{key}:{name}"]) for row in rows]
            found = result["metrics"][name]
            assert found["n"] == 5 and found["mean"] == pytest.approx(np.mean(values))
            assert found["std"] == pytest.approx(np.std(values, ddof=1))


def test_unreadable_files_are_skipped_and_the_others_are_the_originals(report, metrics, rows, five_photos):
    assert [skipped["number"] for skipped in metrics["data"]["skipped"]] == [1]
    assert "broken.png" in metrics["data"]["skipped"][0]["reason"]
    assert [row["name"] for row in rows] == [
        p.name for p in sorted(five_photos.iterdir()) if p.stem != "broken"
    ]
    for row in rows:
        expected = tensor_to_images(load_image(five_photos / row["name"], SIZE, multiple_of=1))[0]
        written = Image.open(report / "images" / "original" / f"{int(row['number']):06d}.png")
        assert (np.asarray(written) == np.asarray(expected)).all()


def test_each_row_is_the_reconstruction_that_its_name_says(report, metrics, two_models, five_photos):
    vae = KLAutoencoder.from_pretrained(two_models / "first" / "export")
    images = load_image(five_photos / "astronaut.png", SIZE)
    with torch.inference_mode():
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7 + 0))
        sampled = vae.decode(posterior.mean + posterior.std * noise).sample
        found = {r.row.latents: r for r in Model("first", vae, seed=7).reproduce(images, [0])}
    torch.testing.assert_close(found["sample"].images, sampled, atol=1e-4, rtol=1e-4)
    written = np.asarray(Image.open(report / "images" / "first" / "mode" / "float32" / "000000.png"))
    expected = np.asarray(tensor_to_images(found["mode"].images)[0])
    assert np.abs(written.astype(int) - expected).max() <= 1  # another batch, the last digit
    side = SIZE // 8
    assert found["mode"].extras["bits_per_pixel"] == [8 * 4 * side**2 / SIZE**2]
    nats = posterior.kl().item()
    assert found["mode"].extras["kl_bits_per_pixel"] == [pytest.approx(nats / np.log(2) / SIZE**2, rel=1e-6)]
    results = metrics["results"]
    assert results["jpeg/f8c4"]["metrics"]["bits_per_pixel"]["mean"] <= 8 * 4 / 64
    assert {"bicubic/f8", "bicubic/f4", "jpeg/f4c2", "webp/f8c4", "webp/f4c2"} < set(results)


def test_latents_are_in_the_metrics(metrics):
    for name, channels in (("first", 4), ("second", 2)):
        latents = metrics["latents"][name]
        assert len(latents["mean"]) == channels and np.shape(latents["correlation"]) == (channels, channels)
        assert latents["study"]["images"] == 2 and len(latents["study"]["noise"]["psnr"]) == 6
        assert (latents["study"]["noise"]["lpips"][5] is None) == (NET is None)
        assert 1 <= latents["effective_dimension"] <= channels
        assert all(value > 5 for value in latents["study"]["scale"]["psnr"])
        assert (
            sum(latents["logvar_histogram"]["counts"]) == 5 * channels * (SIZE // {4: 8, 2: 4}[channels]) ** 2
        )
    assert metrics["settings"]["study_images"] == [0, 5]


def test_two_processes_find_what_one_finds(two_models, five_photos, metrics, tmp_path):
    log = tmp_path / "log"
    codes = finish(*start_ranks(2, log, evaluate, two_models, five_photos, tmp_path / "two"))
    assert codes == [0, 0], log.read_text()
    same(json.loads((tmp_path / "two" / "metrics.json").read_text()), metrics)


def same(found, expected, place="metrics"):
    assert type(found) is type(expected), place
    if isinstance(found, dict):
        assert list(found) == list(expected), place
        for key in found:
            same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), place
        for i, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{place}[{i}]")
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), place
    else:
        assert found == expected, place


def test_types_are_measured_side_by_side_and_broken_values_are_counted(
    two_models, five_photos, tmp_path, capsys
):
    vae = KLAutoencoder.from_pretrained(two_models / "second" / "export")
    vae.decoder.conv_out.bias.data[:] = 1e5  # beyond float16, white in the others
    vae.save_pretrained(tmp_path / "model")
    types = ["float32", "bfloat16", "float16"]
    command = [
        "evaluate",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(five_photos / "cat.png"),
        "--size",
        "64",
    ]
    assert main([*command, "-o", str(tmp_path / "report"), "--lpips", NET or "alex", "--dtype", *types]) == 0
    results = json.loads((tmp_path / "report" / "metrics.json").read_text())["results"]
    broken = {t: results[f"model/mode/{t}"]["metrics"]["not_finite"]["mean"] for t in types}
    assert broken == {"float32": 0, "bfloat16": 0, "float16": 1}
    assert results["model/mode/float32"]["metrics"]["psnr"]["std"] is None  # of one image
    page = (tmp_path / "report" / "report.html").read_text()
    assert "not finite in 1 image (NaN is black)" in page
    assert "model, mode, float16" in capsys.readouterr().out


def test_an_existing_report_is_not_overwritten(report, two_models, five_photos, capsys):
    before = (report / "metrics.json").read_bytes()
    assert evaluate(two_models, five_photos, report) == 2
    assert "metrics.json: exists already; --overwrite" in capsys.readouterr().err
    assert (report / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "32"], "--size: 32; allowed: native, or a number from 64 on"),
        (["--data", "nowhere/at all"], "--data: 'nowhere/at all' is no file or folder here"),
        (["--data", "../nowhere"], "--data: '../nowhere' is no file or folder here; allowed"),
        (["--image-column", "picture"], "--image-column: no column 'picture'"),
    ],
)
def test_errors_name_the_option(two_models, tmp_path, capsys, arguments, told):
    (tmp_path / "data").mkdir()
    parquet = tmp_path / "data" / "a.parquet"
    import datasets

    datasets.Dataset.from_dict({"image": [None]}).to_parquet(parquet)
    command = [
        "evaluate",
        "--model",
        str(two_models / "first"),
        "--data",
        str(parquet),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main([*command, *arguments]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_photographs_at_their_own_size_come_one_by_one(five_photos):
    native = Photographs.open(str(five_photos), None)
    batches = list(native.batches(4))
    assert [len(batch) for batch in batches] == [1] * 5 and list(native.skipped) == [1]
    expected = np.asarray(Image.open(five_photos / "cat.png").convert("RGB"))
    cat = next(p for (p,) in batches if p.name == "cat.png")
    assert (np.asarray(tensor_to_images(cat.image)[0]) == expected).all()


def test_a_photograph_is_in_the_same_batch_on_any_number_of_ranks(five_photos):
    alone = [[p.number for p in batch] for batch in Photographs.open(str(five_photos), 64).batches(2)]
    shared = [
        [p.number for p in batch]
        for rank in (0, 1)
        for batch in Photographs.open(str(five_photos), 64).batches(2, rank, 2)
    ]
    assert sorted(shared) == alone == [[0], [2, 3], [4, 5]]


def test_names_tell_models_apart():
    assert short_names(["runs/a/export", "runs/b", "stabilityai/sd-vae-ft-mse"]) == [
        "a",
        "b",
        "sd-vae-ft-mse",
    ]
    assert short_names(["x/run/export", "y/run/vae"]) == ["x-run", "y-run"]
    with pytest.raises(ValueError, match="each model once"):
        short_names(["a", "a"])


def test_a_rank_that_fails_ends_them_all(two_models, five_photos, tmp_path):
    arguments = (two_models, five_photos, tmp_path / "report")
    assert finish(*start_ranks(2, tmp_path / "log", evaluate_failing_on_rank_1, *arguments)) == [2, 2]
    lines = (tmp_path / "log").read_text().splitlines()
    told = sorted(line for line in lines if line.startswith("kl-autoencoder: error: "))
    assert told == [f"kl-autoencoder: error: {text}" for text in ("no such number", "rank 1: no such number")]
    assert not (tmp_path / "report").exists()


def evaluate_failing_on_rank_1(*arguments):
    def fail(*_):
        raise ValueError("no such number")

    if os.environ["RANK"] == "1":
        runner.Evaluation.reproductions = fail
    return evaluate(*arguments)


def test_after_a_kill_the_same_command_writes_a_whole_report(two_models, five_photos, tmp_path):
    arguments = (two_models, five_photos, tmp_path / "report", "--save-images")
    process = start(tmp_path / "log", evaluate_one, *arguments)
    started = tmp_path / ".report.unfinished" / "images" / "original"
    assert wait_until(lambda: started.is_dir() and any(started.iterdir()), process)
    process.kill()
    assert finish(process) == [-signal.SIGKILL]
    assert not (tmp_path / "report").exists()
    assert finish(start(tmp_path / "log", evaluate_one, *arguments)) == [0]
    assert {path.name for path in tmp_path.iterdir()} == {"log", "report"}
    assert len([*(tmp_path / "report" / "images" / "original").iterdir()]) == 5


def test_other_files_in_an_existing_folder_are_kept(two_models, five_photos, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert evaluate_one(two_models, five_photos, tmp_path, "--limit", "1", "--json") == 0
    before = (tmp_path / "metrics.json").read_text()
    assert capsys.readouterr().out == before
    assert evaluate_one(two_models, five_photos, tmp_path, "--limit", "3") == 2
    assert (tmp_path / "metrics.json").read_text() == before
    assert evaluate_one(two_models, five_photos, tmp_path, "--limit", "3", "--overwrite") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["data"]["images"] == 2  # one is broken
    names = {"mine.txt", "metrics.json", "images.csv", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
