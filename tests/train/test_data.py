"""Data: what sample n is does not depend on ranks, workers or restarts; crops, sources, unreadable images."""

import glob
import io
import itertools
import logging
import math
import multiprocessing
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from kl_autoencoder.data.crops import Crop, TooSmall, read_crop
from kl_autoencoder.data.image_io import image_to_tensor, load_image
from kl_autoencoder.data.locating import SAMPLE_FILES, SAMPLE_PHOTOGRAPHS
from tests.conftest import SHARED
from tests.file_server import write_tar
from train.autoencoder.validation import HeldOut
from train.config import Config, build
from train.data.config import DataConfig
from train.data.loader import LoaderFailed
from train.data.random_access import SampleOrder, replacements
from train.data.samples import PRINTED, REMEMBERED, RandomCrops, SkippedImages, augmentation, permutation
from train.data.training_data import TrainingData

SHARDS = SHARED / "images"
pytestmark = pytest.mark.usefixtures("datasets_cache")


def flat(i: int, size=(12, 10)) -> Image.Image:
    """An image of one colour, by which `which` knows any crop of it."""
    return Image.new("RGB", size, (i, 255 - i, 7))


def which(images: torch.Tensor) -> list[int]:
    """(B, 3, R, R) of `flat` images -> their numbers."""
    assert images.amax((2, 3)).equal(images.amin((2, 3)))
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def folder_of(path: Path, images) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, image in images:
        image.save(path / f"{i:03d}.png")
    return path


def config(train, **values) -> DataConfig:
    small = {"validation": SAMPLE_PHOTOGRAPHS, "resolution": 8, "batch_size": 2, "num_workers": 0}
    return DataConfig(train=str(train), **{**small, **values})


def take(data: DataConfig, samples: int, start=0, ranks=1, seed=3) -> dict[int, torch.Tensor]:
    """Samples start ... start + samples - 1 as `ranks` ranks see them: sample number -> image."""
    seen = {}
    for rank in range(ranks):
        loader = train_loader(data, seed, start, rank, ranks)
        for batch in itertools.islice(loader, samples // (ranks * data.batch_size)):
            assert batch["images"].shape[1:] == (3, data.resolution, data.resolution)
            assert batch["images"].dtype == torch.float32 and batch["images"].abs().max() <= 1
            for n, image in zip(batch["sample"].tolist(), batch["images"], strict=True):
                assert n not in seen
                seen[n] = image
    assert sorted(seen) == list(range(start, start + samples))
    return seen


def train_loader(data: DataConfig, seed: int, start=0, rank=0, ranks=1):
    return TrainingData(data, seed).loader(start, rank, ranks)


def validation_images(data: DataConfig) -> torch.Tensor:
    return torch.cat(list(HeldOut(TrainingData(data, 0).held_out(), batch_size=4).batches()))


def square(encoded: bytes, resolution: int, crop: Crop, enlarge=False) -> torch.Tensor:
    pixels = read_crop(io.BytesIO(encoded), (resolution, resolution), crop, enlarge)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def assert_same(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]):
    for n in b:
        assert a[n].equal(b[n]), f"sample {n}"


# ---------------------------------------------------------------- order and restart


@pytest.fixture
def noise_folder(tmp_path):
    """Eleven images in which no two crops are alike."""
    rng = np.random.default_rng(0)
    images = (Image.fromarray(rng.integers(0, 256, (15, 17, 3), dtype=np.uint8)) for _ in range(11))
    return folder_of(tmp_path / "noise", enumerate(images))


def test_ranks_workers_and_restarts_do_not_change_the_samples(noise_folder):
    alone = take(config(noise_folder), 40)
    changing = take(config(noise_folder, num_workers=2), 12, ranks=2)
    changing |= take(config(noise_folder, num_workers=1, batch_size=4), 4, start=12)
    changing |= take(config(noise_folder, batch_size=3), 24, start=16, ranks=4)
    assert sorted(changing) == list(range(40))
    assert_same(alone, changing)


@pytest.mark.parametrize("start", [1, 10, 11, 12, 25])
def test_start_at_any_sample(noise_folder, start):
    assert_same(take(config(noise_folder), 32), take(config(noise_folder), 6, start=start))


def test_an_epoch_holds_each_image_once_and_the_next_another_order(tmp_path):
    data = config(folder_of(tmp_path, ((i, flat(i)) for i in range(10))))
    order = [which(image[None])[0] for _, image in sorted(take(data, 30).items())]
    epochs = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_changes_order_and_crops(noise_folder):
    one, other = take(config(noise_folder), 4, seed=1), take(config(noise_folder), 4, seed=2)
    assert not any(one[n].equal(other[n]) for n in one)


def test_order_of_ranks_interleaves_and_counts_no_batch_twice():
    def first(rank, world_size, batches, batch_size):
        order = iter(SampleOrder(7, 5, batch_size, start_sample=9, rank=rank, world_size=world_size))
        return [draw for _ in range(batches) for draw in next(order)]

    one = first(0, 1, batches=6, batch_size=4)
    assert [draw.sample for draw in one] == list(range(9, 33))
    for rank in range(3):
        assert first(rank, 3, batches=4, batch_size=2) == one[rank::3]


def test_orders_and_crops_do_not_depend_on_the_version_of_numpy_or_python():
    assert permutation(8, 0, 0).tolist() == [3, 4, 6, 0, 1, 2, 7, 5]
    crop = RandomCrops((0.25, 1.0), True).draw(augmentation(0, 0))
    assert crop == pytest.approx(
        (0.5070131932279729, 0.6924420773214919, 0.8307707218969084, True), rel=1e-12
    )


def test_a_loader_leaves_the_global_generator_alone(noise_folder):
    before = torch.get_rng_state()
    next(iter(train_loader(config(noise_folder, num_workers=1), seed=0)))
    assert torch.get_rng_state().equal(before)


def test_workers_ignore_an_interrupt_at_the_terminal(noise_folder):
    before = multiprocessing.active_children()
    batches = iter(train_loader(config(noise_folder, num_workers=1), seed=0))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(4):
        next(batches)
    assert worker.is_alive()


# ---------------------------------------------------------------- crops


def test_crops_reach_every_part_of_the_picture_and_half_are_mirrored(tmp_path):
    """Each pixel holds its own coordinates, and crops of 40x40 pixels are not resampled."""
    x, y = np.meshgrid(np.arange(100), np.arange(60))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    data = config(folder_of(tmp_path, [(0, ramp)]), resolution=40, crop_scale=((40 / 60) ** 2,) * 2)
    places, mirrored = set(), 0
    for image in take(data, 400).values():
        across, down, _ = ((image + 1) * 127.5).round().long()
        mirrored += bool(across[0, 0] > across[0, -1])
        across = across.flip(-1) if across[0, 0] > across[0, -1] else across
        left, top = int(across[0, 0]), int(down[0, 0])
        assert across.equal(left + torch.arange(40).expand(40, 40))
        assert down.equal(top + torch.arange(40)[:, None].expand(40, 40))
        places.add((left, top))
    lefts, tops = {left for left, _ in places}, {top for _, top in places}
    assert (min(lefts), max(lefts), min(tops), max(tops)) == (0, 60, 0, 20)
    assert len(places) > 250
    assert 150 < mirrored < 250


def test_without_horizontal_flip_no_crop_is_mirrored(tmp_path):
    ramp = Image.fromarray(np.arange(60, dtype=np.uint8)[None].repeat(50, 0)).convert("RGB")
    images = take(config(folder_of(tmp_path, [(0, ramp)]), horizontal_flip=False), 20)
    assert all((image[..., 1:] > image[..., :-1]).all() for image in images.values())


@pytest.mark.parametrize("scale", [0.04, 0.3, 0.71, 1.0])
@pytest.mark.parametrize("x, y", [(0, 0), (0.5, 0.25), (0.9999999, 0.9999999)])
def test_a_crop_is_an_independent_crop_and_resize(scale, x, y):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8))
    ours = square(png(picture), 32, Crop(scale, x, y, False))
    side = max(round(90 * scale**0.5), 32)
    left, top = math.floor(x * (131 - side + 1)), math.floor(y * (90 - side + 1))
    pixels = np.asarray(picture)[top : top + side, left : left + side]
    assert pixels.shape[:2] == (side, side)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).astype(
        np.float32
    )
    torch.testing.assert_close(ours, torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)


def test_a_small_image_is_enlarged_whole_and_a_large_one_never():
    for size, sides in {(1, 1): {1}, (5, 9): {5}, (40, 30): {16, 30}}.items():
        x = np.arange(size[1]) * (255 // max(size))
        picture = Image.fromarray(x.astype(np.uint8)[:, None].repeat(size[0], 1)).convert("RGB")
        for scale in (0.01, 1.0):
            crop = Crop(scale, 0, 0, False)
            image = square(png(picture), 16, crop, enlarge=True)
            if min(size) < 16:
                with pytest.raises(TooSmall, match=f"{size[0]}x{size[1]} pixels, too small for 16x16"):
                    square(png(picture), 16, crop)
            side = min(sides) if scale < 1 else max(sides)
            expected = load_image(picture.crop((0, 0, side, side)), 16, multiple_of=1)[0]
            torch.testing.assert_close(image, expected)


def test_jpeg_draft_stays_close_to_the_full_decode():
    import skimage

    picture = Image.open(Path(skimage.__file__).parent / "data" / "retina.jpg")
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    full = Image.open(file)
    for crop in (Crop(1.0, 0, 0, False), Crop(0.81, 0, 0, False), Crop(0.6, 0.3, 0.7, False)):
        fast = square(file.getvalue(), 128, crop)
        exact = square(png(full), 128, crop)
        assert not fast.equal(exact)  # else the draft was not used
        assert -10 * math.log10(float(((fast - exact) ** 2).mean()) / 4) > 36


def test_exif_rotation_is_applied_to_the_crop(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown, turn by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    crop = square((tmp_path / "turned.png").read_bytes(), 20, Crop(1.0, 0, 0, False))
    torch.testing.assert_close(crop, load_image(upright, multiple_of=1)[0])


# ---------------------------------------------------------------- unreadable images


@pytest.fixture
def ragged_folder(tmp_path):
    """26 readable images (one each gray, CMYK and 16-bit), one of a single pixel, and 3 that cannot be read."""
    folder = folder_of(tmp_path / "ragged", ((i, flat(i)) for i in range(23)))
    Image.new("L", (12, 12), 30).save(folder / "gray.png")
    Image.new("CMYK", (12, 12), (10, 20, 30, 40)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((12, 12), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    whole = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.webp").touch()
    return folder


def test_unreadable_images_are_replaced_alike_for_any_ranks_and_workers(ragged_folder):
    alone = take(config(ragged_folder), 48)
    assert_same(alone, take(config(ragged_folder, batch_size=3, num_workers=2), 48, ranks=2))
    assert_same(alone, take(config(ragged_folder), 16, start=8, ranks=4))


def test_unreadable_images_are_named_and_counted(ragged_folder, caplog):
    skipped = SkippedImages()
    assert skipped.summary() == "no images were skipped"
    with caplog.at_level(logging.WARNING):
        for batch in itertools.islice(train_loader(config(ragged_folder), seed=0), 45):  # three epochs
            skipped.add(batch["skipped"])
    assert len(skipped) == 4
    assert skipped.summary().startswith("4 images were skipped (1 too small, 3 unreadable):")
    for name in ("truncated.png", "text.jpg", "empty.webp", "pixel.png"):
        assert f"{ragged_folder / name} (row" in skipped.summary()
        assert sum(name in record.message for record in caplog.records) == 1


def test_many_skipped_images_are_remembered_up_to_a_limit_and_fewer_are_printed():
    skipped, other = SkippedImages(), SkippedImages()
    skipped.add((f"{i}.jpg", "too small: 1x1") for i in range(REMEMBERED))
    assert f"{REMEMBERED} images were skipped ({REMEMBERED} too small, 0 unreadable):" in skipped.summary()
    skipped.add([("other.jpg", "unreadable: text")])
    assert skipped.summary().startswith(f"more than {REMEMBERED} images were skipped")
    other.add([("a.jpg", "unreadable: text")])
    other.merge(skipped.state())
    assert len(skipped) == len(other) == REMEMBERED and other.more
    assert len(skipped.summary().splitlines()) == PRINTED + 2
    assert skipped.summary().endswith(f"... and {REMEMBERED - PRINTED} more")


def test_images_that_are_too_small_are_skipped_and_counted_or_enlarged(tmp_path, caplog):
    folder = folder_of(tmp_path, [(i, flat(i, (12, 10) if i % 2 else (7, 30))) for i in range(8)])
    skipped = SkippedImages()
    with caplog.at_level(logging.WARNING):
        loader = train_loader(config(folder, too_small="skip"), seed=0)
    assert "4 of 8 images" in caplog.text and "data.too_small: skip" in caplog.text
    for batch in itertools.islice(loader, 8):
        assert all(n % 2 for n in which(batch["images"]))
        skipped.add(batch["skipped"])
    assert skipped.summary().startswith("4 images were skipped (4 too small, 0 unreadable):")
    seen = take(config(folder, too_small="enlarge"), 8)
    assert sorted(which(torch.stack(list(seen.values())))) == list(range(8))


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_hand_over_bytes_and_the_trainer_gets_their_exact_values(tmp_path, workers):
    """A batch of bytes has a quarter of the size of one of float32, and goes from process to process."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([levels, levels.T, 255 - levels], -1))
    data = config(folder_of(tmp_path / "p", [(0, picture)]), resolution=16, num_workers=workers,
                  horizontal_flip=False)  # fmt: skip
    loader, handed_over = train_loader(data, seed=0), []
    floats = loader._floats
    loader._floats = lambda images: handed_over.append(images) or floats(images)
    assert next(iter(loader))["images"].equal(torch.stack([image_to_tensor(picture)] * 2))
    assert handed_over[0].dtype == torch.uint8 and handed_over[0].nbytes == 2 * 3 * 16 * 16


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    """One listing serves the images, the held-out ones and the fingerprint: millions of files take minutes."""
    folder = folder_of(tmp_path / "p", ((i, flat(i)) for i in range(20)))
    (folder / "below").mkdir()
    flat(20).save(folder / "below" / "020.png")
    listed, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda top, **more: listed.append(str(top)) or walk(top, **more))
    data = TrainingData(config(folder, validation=None), seed=0)
    assert data.held_out().count == 2 and data.fingerprint()["images"] == 21
    next(iter(data.loader()))
    assert listed == [str(folder)]


@pytest.mark.parametrize("length", [1, 2, 7, 12, 97])
def test_replacements_reach_every_image_once(length):
    for n in range(20):
        order = list(replacements(n % length, length, augmentation(0, n)))
        assert order[0] == n % length
        assert sorted(order) == list(range(length))


def test_replacements_are_spread():
    """90 of 100 neighbouring images are damaged: none of the other ten replaces much more than its share."""
    first = [next(i for i in replacements(n % 90, 100, augmentation(0, n)) if i >= 90) for n in range(900)]
    assert max(np.bincount(first, minlength=100)[90:]) < 200


def test_a_source_without_readable_images_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("no")
    with pytest.raises(ValueError, match=r"data\.train: no readable images in .*none of the 3 .*0\.jpg"):
        train_loader(config(tmp_path), seed=0)
    for i in range(3):  # with sound headers: the damage shows only when the pixels are read
        (tmp_path / f"{i}.jpg").write_bytes(png(flat(1, (64, 64)))[:60])
    with pytest.raises(LoaderFailed, match=r"none of 3 images could be used, the first: .*\.jpg \(row"):
        next(iter(train_loader(config(tmp_path), seed=0)))


def test_a_row_without_an_image_and_a_file_that_went_away_are_skipped(tmp_path):
    records = [
        {"bytes": png(flat(9)), "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "gone.png")},
    ]
    pyarrow.parquet.write_table(pyarrow.table({"image": records}), tmp_path / "rows.parquet")
    skipped = SkippedImages()
    for batch in itertools.islice(train_loader(config(tmp_path / "rows.parquet"), seed=0), 6):
        assert which(batch["images"]) == [9, 9]
        skipped.add(batch["skipped"])
    assert len(skipped) == 2 and skipped.reasons["row 1"] == "unreadable: no image in this row"
    assert "gone.png" in skipped.summary()


# ---------------------------------------------------------------- sources


def parquet(path: Path, numbers, column="image", raw=False) -> Path:
    values = [png(flat(i)) if raw else {"bytes": png(flat(i)), "path": None} for i in numbers]
    kind = datasets.Value("binary") if raw else datasets.Image()
    features = datasets.Features({column: kind, "source": datasets.Value("int64")})
    data = {column: values, "source": list(numbers)}
    datasets.Dataset.from_dict(data, features=features).to_parquet(path)
    return path


def tar(path: Path, numbers) -> Path:
    """A webdataset shard of flat images, each with a caption."""
    return write_tar(path, (entry for i in numbers for entry in entries(i)))


def entries(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:03d}.png", png(flat(i))), (f"{i:03d}.txt", b"caption")]


def make_source(kind: str, path: Path) -> DataConfig:
    """A source of flat images 0 ... 11."""
    halves = range(6), range(6, 12)
    if kind == "folder":
        for name, half in zip(("a/b", "c"), halves, strict=True):
            folder_of(path / name, ((i, flat(i)) for i in half))
        (path / ".hidden").mkdir()
        flat(200).save(path / ".hidden" / "x.png")
        (path / "notes.txt").write_text("not an image by name either")
        (path / "c" / "006.png").rename(path / "c" / "006.JFIF")
        (path / "c" / "007.png").rename(path / "c" / "007.heic")
        return config(path)
    if kind == "glob of images":
        folder_of(path, ((i, flat(i)) for i in range(12)))
        return config(path / "0*.png")
    if kind in ("parquet", "binary column"):
        for i, half in enumerate(halves):
            parquet(path / f"{i}.parquet", half, "photo", raw=kind == "binary column")
        return config(path / "*.parquet", image_column="photo")
    if kind == "webdataset":
        for i, half in enumerate(halves):
            tar(path / f"{i}.tar", half)
        return config(path, image_column="png")
    images = [{"bytes": png(flat(i)), "path": None} for i in range(12)]
    features = datasets.Features({"image": datasets.Image()})
    saved = datasets.Dataset.from_dict({"image": images}, features=features)
    if kind == "saved":
        saved.save_to_disk(path)
        return config(path)
    datasets.DatasetDict({"learn": saved, "test": saved.select([0])}).save_to_disk(path)
    return config(path, split="learn")


KINDS = ["folder", "glob of images", "parquet", "binary column", "webdataset", "saved", "saved splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_sources(kind, tmp_path):
    seen = take(make_source(kind, tmp_path), 12)
    assert sorted(which(torch.stack(list(seen.values())))) == list(range(12))


@pytest.mark.parametrize("kind", ["parquet", "binary column", "webdataset"])
def test_a_stream_holds_the_same_images(kind, tmp_path):
    data = make_source(kind, tmp_path)
    stream = config(data.train, image_column=data.image_column, streaming=True)
    seen = take(stream, 24)
    # Two files of six, read at the same time: each epoch of 12 samples holds every image once.
    for epoch in (range(12), range(12, 24)):
        assert sorted(which(torch.stack([seen[n] for n in epoch]))) == list(range(12))


@pytest.mark.parametrize("files", [1, 5])
def test_streams_do_not_depend_on_ranks_workers_or_restarts(files, tmp_path):
    numbers = iter(range(256))
    for i in range(files):
        tar(tmp_path / f"{i}.tar", itertools.islice(numbers, 3 + 2 * i))
    stream = config(tmp_path / "*.tar", image_column="png", streaming=True, shuffle_buffer=8)
    alone = take(stream, 96)
    assert len(set(which(torch.stack(list(alone.values()))))) == sum(3 + 2 * i for i in range(files))
    changing = take(config(**{**vars(stream), "num_workers": 2}), 36, ranks=2)
    changing |= take(config(**{**vars(stream), "num_workers": 1, "batch_size": 5}), 20, start=36, ranks=4)
    changing |= take(config(**{**vars(stream), "batch_size": 1}), 40, start=56)
    assert sorted(changing) == list(range(96))
    assert_same(alone, changing)


def test_streams_replace_unreadable_images(tmp_path):
    readable = [entry for i in range(6) for entry in entries(i)]
    write_tar(tmp_path / "a.tar", [*readable, ("x.png", b"none"), ("y.png", b"none")])
    stream = config(tmp_path / "a.tar", image_column="png", streaming=True)
    skipped = SkippedImages()
    for batch in itertools.islice(train_loader(stream, seed=0), 8):
        assert set(which(batch["images"])) <= set(range(6))
        skipped.add(batch["skipped"])
    assert sorted(name.split()[0] for name in skipped.reasons) == ["x.png", "y.png"]
    assert_same(take(stream, 16), take(config(**{**vars(stream), "num_workers": 2}), 16, ranks=2))


def test_sample_photographs_are_there_and_no_scene_is_on_both_sides():
    data = config(SAMPLE_PHOTOGRAPHS, resolution=64, batch_size=6)
    loader = train_loader(data, seed=0)
    assert len(loader.dataset) == len(SAMPLE_FILES["train"]) == 5
    assert next(iter(loader))["skipped"] == []
    assert validation_images(data).shape == (2, 3, 64, 64)
    scenes = [{name.split("_")[0].split(".")[0] for name in names} for names in SAMPLE_FILES.values()]
    assert not scenes[0] & scenes[1]


@pytest.mark.parametrize(
    "make, values, message",
    [
        ("nothing", {}, r"data\.train: .*no file or folder.*allowed: a folder of images, parquet"),
        ("empty", {}, r"data\.train: no images in .*empty; allowed: a folder"),
        ("both", {}, r"data\.train: .*both images .*a\.png.* and data files .*b\.parquet"),
        ("mixture", {}, r"data\.train: .*\.parquet and \.tar files; allowed"),
        ("column", {}, r"data\.image_column: no column 'image' in .*; allowed: photo, source"),
        (
            "column",
            {"streaming": True},
            r"data\.image_column: no column 'image' in .*; allowed: photo, source",
        ),
        (
            "column",
            {"image_column": "source"},
            r"data\.image_column: column 'source' .* holds .*int64.*, not",
        ),
        ("column", {"image_column": "source", "streaming": True}, r"column 'source' .* holds .*int64.*, not"),
        ("damaged", {}, r"data\.train: .*damaged\.parquet cannot be read as parquet files"),
        ("splits", {}, r"data\.train: no split 'train' in .*; allowed: learn, test"),
        ("folder", {"streaming": True}, r"data\.streaming: true.*allowed: false"),
        (
            "folder",
            {"validation": None, "validation_images": 64},
            r"data\.validation_images: 64.*the 3 images of",
        ),
        ("folder", {"resolution": 11}, r"data\.resolution: 11, larger than the 3 .*short sides, 10"),
    ],
)
def test_sources_that_cannot_be_used(make, values, message, tmp_path):
    train = tmp_path / make
    if make in ("folder", "both"):
        folder_of(train, [(i, flat(i)) for i in range(3 * (make == "folder"))])
    if make == "both":
        flat(1).save(train / "a.png")
        parquet(train / "b.parquet", [1])
    if make == "empty":
        train.mkdir()
    if make == "mixture":
        train.mkdir()
        parquet(train / "b.parquet", [1])
        tar(train / "c.tar", [1])
    if make == "column":
        train = parquet(tmp_path / "a.parquet", [1], "photo")
    if make == "damaged":
        train = tmp_path / "damaged.parquet"
        train.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    if make == "splits":
        make_source("saved splits", train)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train_loader(config(train, **values), seed=0)
    assert "\n" not in str(error.value)


def test_a_source_on_a_hub_that_cannot_be_reached_is_an_error():
    message = (
        r"data\.train: 'someone/photographs' is no file or folder here, and .* hub .*someone/photographs"
    )
    with pytest.raises(FileNotFoundError, match=message):
        train_loader(config("someone/photographs"), seed=0)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"resolution": 0}, r"data\.resolution: 0; allowed: at least 1"),
        ({"batch_size": 0}, r"data\.batch_size: 0; allowed: at least 1"),
        ({"num_workers": -1}, r"data\.num_workers: -1; allowed: at least 0"),
        ({"crop_scale": (0.5,)}, r"data\.crop_scale: \[0\.5\]; allowed"),
        ({"crop_scale": (0.5, 0.2)}, r"data\.crop_scale: \[0\.5, 0\.2\]; allowed"),
        ({"crop_scale": (0.0, 1.0)}, r"data\.crop_scale: \[0\.0, 1\.0\]; allowed"),
        ({"streaming": True, "validation": None}, r"data\.validation: null with data\.streaming; allowed"),
    ],
)
def test_config_values(values, message):
    data = {"train": "x", "validation": "y", **values}
    with pytest.raises(ValueError, match=message):
        build(Config, {"output_dir": "run", "data": data})


# ---------------------------------------------------------------- held-out images


def test_validation_images_are_centre_crops_of_the_held_out_files(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)) for i in range(4)]
    folder = folder_of(tmp_path / "v", enumerate(images))
    ours = validation_images(config(SAMPLE_PHOTOGRAPHS, validation=str(folder), resolution=16))
    assert ours.equal(torch.cat([load_image(image, 16, multiple_of=1) for image in images]))


def test_held_out_images_are_not_trained_on_and_are_the_same_for_every_seed(tmp_path):
    data = config(
        folder_of(tmp_path, ((i, flat(i)) for i in range(20))),
        validation=None,
        validation_images=6,
        batch_size=1,
    )
    held_out = which(validation_images(data))
    assert len(set(held_out)) == 6 and held_out == sorted(held_out) != list(range(6))
    assert TrainingData(data, 0).held_out_rows.tolist() == held_out
    for seed in (0, 1):
        seen = which(torch.stack(list(take(data, 28, seed=seed).values())))
        assert sorted(seen) == sorted(2 * list(set(range(20)) - set(held_out)))


@pytest.mark.parametrize("kind", ["folder", "parquet", "nameless"])
def test_added_images_do_not_make_trained_ones_held_out(kind, tmp_path):
    """When images were held out by position, one added image moved 61 trained ones into the 64 held out."""

    def split(numbers):
        path = tmp_path / f"{min(numbers)}-{max(numbers)}"
        if kind == "folder":
            source = folder_of(path, ((i, Image.new("RGB", (8, 8), (i // 256, i % 256, 7))) for i in numbers))
        else:
            records = [
                {"bytes": png(Image.new("RGB", (8, 8), (i // 256, i % 256, 7))),
                 "path": f"{i}.png" if kind == "parquet" else None} for i in numbers
            ]  # fmt: skip
            pyarrow.parquet.write_table(pyarrow.table({"image": records}), f"{path}.parquet")
            source = f"{path}.parquet"
        data = TrainingData(config(source, validation=None, validation_images=64), seed=0)
        return {numbers[i] for i in data.rows}, {numbers[i] for i in data.held_out_rows}, data.fingerprint()

    trained, held_out, fingerprint = split(list(range(1, 301)))
    assert len(held_out) == 64 and not trained & held_out and len(trained) == 236
    assert fingerprint == split(list(range(1, 301)))[2]
    for added in ([0], [301], [0, *range(301, 331)]):
        _, now_held_out, other = split(sorted([*range(1, 301), *added]))
        assert not now_held_out & trained
        assert len(held_out - now_held_out) <= len(added)
        assert other != fingerprint and other["images"] == 300 + len(added)


@pytest.mark.parametrize("images, held_out", [(2, 1), (7, 1), (8, 1), (24, 3), (64, 8), (512, 64), (600, 64)])
def test_by_default_an_eighth_of_a_small_source_is_held_out(tmp_path, images, held_out):
    folder, pixels = tmp_path / "photos", png(Image.new("RGB", (8, 8)))
    folder.mkdir()
    for i in range(images):
        (folder / f"{i}.png").write_bytes(pixels)
    data = TrainingData(config(folder, validation=None, resolution=8), seed=0)
    assert len(data.held_out_rows) == data.held_out().count == held_out
    assert len(data.rows) == images - held_out


def test_a_folder_that_is_moved_is_the_same_source(tmp_path):
    folder = folder_of(tmp_path / "a", ((i, flat(i)) for i in range(30)))
    data = config(folder, validation=None, validation_images=5)
    before = TrainingData(data, 0)
    folder.rename(tmp_path / "b")
    after = TrainingData(config(tmp_path / "b", validation=None, validation_images=5), 0)
    assert before.fingerprint() == after.fingerprint()
    assert before.held_out_rows.tolist() == after.held_out_rows.tolist()
    (tmp_path / "b" / "003.png").rename(tmp_path / "b" / "003.jpg")
    assert TrainingData(config(tmp_path / "b"), 0).fingerprint() != before.fingerprint()


@pytest.mark.parametrize("streaming", [False, True])
def test_no_more_than_validation_images_are_held_out(tmp_path, streaming):
    source = parquet(tmp_path / "v.parquet", range(9))
    data = config(source, validation=str(source), validation_images=4, streaming=streaming)
    assert len(set(which(validation_images(data)))) == 4


def test_unreadable_validation_images_are_left_out(ragged_folder):
    images = validation_images(config(SAMPLE_PHOTOGRAPHS, validation=str(ragged_folder)))
    assert len(images) == 26 + 1  # the single pixel is enlarged


@pytest.mark.skipif(not SHARDS.exists(), reason="the photographs of ../shared/images are not here")
def test_real_photographs():
    files = sorted(glob.glob(str(SHARDS / "train-00000*.parquet")))
    data = config(files[0], validation=str(SHARDS / "val256"), resolution=128, validation_images=5)
    images = torch.stack(list(take(data, 8).values()))
    assert 0.2 < images.std() < 1
    assert validation_images(data).shape == (5, 3, 128, 128)
