"""One size a step: aspect buckets and several resolutions, for any ranks, micro-batches and restarts."""

import io
import itertools
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder.data.crops import Crop, buckets, nearest_bucket, read_crop
from tests.processes import finish, start_ranks
from tests.train.runs import small_config
from tests.train.test_data import config, flat, folder_of, which
from tests.train.test_family import assert_ranks_equal_one_process, last, run
from train.config import build
from train.config.autoencoder import AutoencoderConfig
from train.data.sizes import Sizes, Steps, sort_into_buckets
from train.data.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("datasets_cache")

LANDSCAPE, PORTRAIT, PANORAMA = (96, 64), (64, 96), (200, 50)  # width and height, as PIL has them
WHOLE = Crop(1.0, 0.0, 0.0, False)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Flat images: 0 to 9 landscape, 10 to 15 portrait, and a panorama."""
    sizes = [LANDSCAPE] * 10 + [PORTRAIT] * 6 + [PANORAMA]
    images = ((i, flat(i, size)) for i, size in enumerate(sizes))
    return folder_of(tmp_path_factory.mktemp("shapes"), images)


def taken(source, steps, start=0, ranks=1, batch_size=4, accumulated=1, **values):
    """Sample number -> (its image, its step), as `ranks` ranks see the steps from sample `start` on."""
    seen, samples = {}, ranks * batch_size * accumulated
    data = TrainingData(config(source, batch_size=batch_size, **values), 3, None, 8, samples)
    for rank in range(ranks):
        batches = itertools.islice(data.loader(start, rank, ranks), steps * accumulated)
        for number, batch in enumerate(batches):
            for n, image in zip(batch["sample"].tolist(), batch["images"], strict=True):
                seen[n] = image, start // samples + number // accumulated
    assert sorted(seen) == list(range(start, start + steps * samples))
    return seen


# ---------------------------------------------------------------- crops


def encoded(image, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file


def test_a_rectangle_is_the_part_of_the_image_that_pil_would_cut_and_scale():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))
    # the largest part of 2 : 1 in 50 x 60 is 50 wide and 25 high, of which a quarter is 25 x 12 or 13
    expected = image.crop((0, 0, 50, 25)).resize((16, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(read_crop(encoded(image), (8, 16), WHOLE), expected)
    lowest = image.crop((0, 35, 50, 60)).resize((16, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(read_crop(encoded(image), (8, 16), WHOLE._replace(y=0.999)), lowest)
    quarter = image.crop((0, 0, 25, 12)).resize((16, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(read_crop(encoded(image), (8, 16), WHOLE._replace(scale=0.25)), quarter)


@pytest.mark.parametrize("size", [(61, 50), (52, 52)])
def test_the_part_of_an_image_stored_on_its_side_is_that_of_the_upright_image(size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))  # to be turned clockwise, orientation 6
    middle = WHOLE._replace(x=0.5, y=0.5)
    upright = read_crop(encoded(Image.fromarray(pixels)), (8, 16), middle)
    assert np.array_equal(read_crop(encoded(stored, 6), (8, 16), middle), upright)


# ---------------------------------------------------------------- buckets


def test_images_are_sorted_into_the_buckets_of_encode_dataset_that_fill_a_step():
    images = [(64, 96)] * 5 + [(96, 64)] * 4 + [(50, 200), None]
    found = sort_into_buckets(images, 32, 8, fewest=4)
    assert set(found.sizes) <= set(buckets(32, 8)) and len(found.sizes) == 2
    wide, high = (nearest_bucket(size, found.sizes) for size in ((64, 96), (96, 64)))
    assert wide[1] > wide[0] and high[0] > high[1]
    # the panorama goes to the wide one, and what cannot be read to the fullest
    assert [found.sizes[i] for i in found.of_image] == [wide] * 5 + [high] * 4 + [wide] * 2
    assert [len(images) for images in sort_into_buckets(images, 32, 8, fewest=99).sizes] == [2]


def test_a_step_has_one_bucket_and_each_image_its_own(shapes):
    seen = taken(shapes, 25, resolution=32, buckets=True)
    steps = defaultdict(set)
    for image, step in seen.values():
        steps[step].add(tuple(image.shape[1:]))
    assert all(len(sizes) == 1 for sizes in steps.values())
    counts = Counter(next(iter(sizes)) for sizes in steps.values())
    assert len(counts) == 2 and all(size in buckets(32, 8) for size in counts)
    # 11 landscapes and 6 portraits in steps of 4: round(11 / 4) = 3 and round(6 / 4) = 2 steps an epoch
    assert sorted(counts.values()) == [10, 15]
    for image, _ in seen.values():
        [number] = which(image[None])
        assert (image.shape[2] > image.shape[1]) == (not 10 <= number < 16)


def test_all_images_of_a_bucket_are_seen_equally_often(shapes):
    seen = taken(shapes, 22, resolution=32, buckets=True)
    landscapes = [which(image[None])[0] for _, (image, _) in sorted(seen.items()) if image.shape[2] > 32]
    for first in range(0, len(landscapes) // 11 * 11, 11):
        assert sorted(landscapes[first : first + 11]) == [*range(10), 16]


@pytest.mark.parametrize("values", [{"resolution": 32, "buckets": True}, {"resolution": (16, 24, 32)},
                                    {"resolution": (16, 32), "buckets": True}])  # fmt: skip
def test_ranks_micro_batches_and_restarts_change_no_sample(shapes, values):
    alone = taken(shapes, 8, **values)
    changing = taken(shapes, 3, ranks=2, batch_size=2, **values)
    changing |= taken(shapes, 2, start=12, batch_size=1, accumulated=4, **values)
    changing |= taken(shapes, 3, start=20, ranks=2, batch_size=1, accumulated=2, num_workers=1, **values)
    assert alone.keys() == changing.keys()
    assert all(alone[n][0].equal(changing[n][0]) and alone[n][1] == changing[n][1] for n in alone)


# ---------------------------------------------------------------- several resolutions


def test_a_cycle_of_steps_has_each_resolution_once_in_changing_order():
    sizes = Sizes((16, 24, 24), 0, Steps(4))
    order = [sizes.of(n)[0] for n in range(0, 240, 4)]
    cycles = [tuple(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(cycle) == [16, 24, 24] for cycle in cycles) and len(set(cycles)) == 3
    assert all(sizes.of(n) == sizes.of(n - n % 4) for n in range(240))
    again = Sizes((16, 24, 24), 0, Steps(4, first=8))
    assert [again.of(n) for n in range(8, 60)] == [sizes.of(n) for n in range(8, 60)]


def test_the_order_of_images_does_not_depend_on_the_resolutions(shapes):
    several = taken(shapes, 6, resolution=(16, 32), too_small="enlarge")
    one = taken(shapes, 6, resolution=16, too_small="enlarge")
    assert {image.shape[1] for image, _ in several.values()} == {16, 32}
    assert all(which(several[n][0][None]) == which(one[n][0][None]) for n in one)


def test_a_stream_has_several_resolutions_too(shard_server):
    source = shard_server.url + "/shard-{000..007}.tar"
    values = {"resolution": (16, 32), "streaming": True, "image_column": "png"}
    seen = taken(source, 4, **values)
    assert {image.shape[1] for image, _ in seen.values()} == {16, 32}
    assert all(len({image.shape for image, of in seen.values() if of == step}) == 1 for step in range(4))
    again = taken(source, 2, start=8, **values)
    assert all(again[n][0].equal(seen[n][0]) for n in again)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Noise of two shapes, twelve of each."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("mixed")
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in 12 * [(48, 72), (72, 48)]]
    return folder_of(folder, ((i, Image.fromarray(image)) for i, image in enumerate(images)))


def varied(source, folder, batch_size=4, **sections):
    data = {"resolution": [32, 48], "buckets": True, "too_small": "enlarge", "batch_size": batch_size}
    return small_config(source, folder, train={"steps": 4}, data=data, **sections)


def train_ranks(source, folder, batch_size):
    """Run in each of several ranks."""
    run(varied(source, folder, batch_size))
    return 0


def test_a_run_of_buckets_goes_on_to_the_same_weights_and_two_ranks_are_one(mixed, tmp_path, capsys):
    run(varied(mixed, tmp_path / "whole", checkpoint={"every": 2, "keep_last": 9}))
    assert "crops of 2 buckets, one for the 4 samples of a step" in capsys.readouterr().out
    first = tmp_path / "whole" / "checkpoints" / "step-000002"
    shutil.copytree(first, tmp_path / "again" / "checkpoints" / first.name)
    run(varied(mixed, tmp_path / "again"))
    a, b = last(tmp_path / "whole"), last(tmp_path / "again")
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]

    log = tmp_path / "ranks.txt"
    processes = start_ranks(2, log, train_ranks, mixed, tmp_path / "two", 2)
    assert finish(*processes) == [0, 0], log.read_text()
    assert_ranks_equal_one_process(last(tmp_path / "two"), a)


def test_keys_that_exclude_buckets_and_wrong_resolutions_are_refused(shapes, tmp_path):
    with pytest.raises(ValueError, match=r"data\.buckets: true with data\.streaming; allowed: false"):
        config(shapes, buckets=True, streaming=True)
    for value, message in (
        ([], r"data\.resolution: \[\]; allowed: a whole number, or a list of them"),
        ([256, 0], r"data\.resolution\[1\]: 0; allowed: at least 1 and at most 8,192"),
        ("a", r"data\.resolution: 'a'; allowed: a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            build(AutoencoderConfig, {"output_dir": "x", "data": {"train": "x", "resolution": value}})
    with pytest.raises(
        ValueError, match=r"data\.resolution: 128, larger than the 17 .*; allowed: at most \d+"
    ):
        TrainingData(config(shapes, resolution=128, buckets=True), 0, None, 8)
    view = {"view": {"kind": "equivariance"}}
    with pytest.raises(
        ValueError, match=r"data\.buckets: true; allowed with loss\.view\.kind=equivariance.*false"
    ):
        run(varied(shapes, tmp_path, loss=view))
    with pytest.raises(ValueError, match=r"data\.resolution: 31; allowed: a multiple of"):
        run(small_config(shapes, tmp_path / "b", data={"resolution": [32, 31]}))
