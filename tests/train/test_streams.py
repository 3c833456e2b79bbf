"""Streams: who reads which file, what a restart skips, and files behind a web server or in fsspec's memory."""

import os
from collections import Counter
from itertools import islice

import datasets
import fsspec
import pytest
import torch

from kl_autoencoder.data.file_streams import FileStream
from kl_autoencoder.data.remote import read_with_retries
from tests.file_server import FileServer, write_tar
from tests.train.test_data import assert_same, config, flat, parquet, png, take, tar, which
from train.data.config import DataConfig
from train.data.samples import RandomCrops
from train.data.sizes import Sizes, Steps
from train.data.streams import Reader, StreamedImages, lane_count, readers_of_a_file
from train.data.training_data import TrainingData

pytestmark = pytest.mark.usefixtures("datasets_cache")


class Counted:
    """A stream of `shards` files of `length` records each, which counts the records read and the files opened."""

    def __init__(self, shards: int, length: int):
        self.num_shards, self.records, self.read_records, self.opened = shards, length, 0, Counter()

    def name(self, shard):
        return f"{shard}.tar"

    def length(self, shard):
        return None

    def size(self, shard):
        return None

    def read(self, shard, start=0):
        self.opened[shard] += 1
        for n in range(start, self.records):
            self.read_records += 1
            yield {"bytes": b"", "path": f"{shard}/{n}"}


def used(stream, ranks, workers, batches, batch_size=4, first=0, lengths=None, seed=0):
    """Sample number -> path of the record it is made of, for `batches` micro-batches of every rank."""
    found = {}
    for rank in range(ranks):
        reader = Reader(rank, ranks, workers=workers)
        crops, sizes = RandomCrops((1.0, 1.0), False), Sizes([8], seed, Steps(1))
        images = StreamedImages(stream, crops, sizes, seed, batch_size, 1000, first, lengths, reader)
        for worker in range(workers):
            for part in islice(images.draws(worker), batches):
                for n, records in part:
                    assert n not in found
                    found[n] = next(records)[0]["path"]
    assert sorted(found) == list(range(first, first + ranks * batches * batch_size))
    return found


@pytest.mark.parametrize(
    ("ranks", "workers", "shards"),
    [(8, 8, 128), (8, 8, 100), (8, 6, 96), (3, 4, 36), (1, 1, 5), (64, 8, 1024)],
)
def test_each_record_is_read_once_however_many_readers_there_are(ranks, workers, shards):
    """A simpler reader read 7.9 records for each one used with 8 ranks of 8 workers, 31 with 64 ranks."""
    records = 50 if shards < 1000 else 20  # so many that few of them are read ahead of the end
    stream = Counted(shards, records)
    batches = max(6 - ranks // 16, 60 // shards) * shards * records // (ranks * 4)
    found = used(stream, ranks, workers, batches)
    assert readers_of_a_file(shards, ranks, workers) == 1
    assert stream.read_records <= 1.05 * len(found)


def test_an_epoch_of_equal_files_holds_each_record_once():
    found = used(Counted(64, 10), 4, 4, 64 * 10 // 16)
    assert len(found) == len(set(found.values())) == 640
    twice = Counter(used(Counted(100, 10), 4, 4, 2 * 1000 // 16 + 20).values())
    assert len(twice) == 1000 and max(twice.values()) <= 3


def test_when_files_are_fewer_than_readers_each_has_as_few_readers_as_possible():
    assert lane_count(10, 8, 8) == 8 and readers_of_a_file(10, 8, 8) == 8
    stream = Counted(10, 40)
    found = used(stream, 8, 8, 50)
    assert stream.read_records / len(found) < 8.5
    assert found == used(Counted(10, 40), 2, 4, 200)  # the same lanes


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 8), (4, 4), (16, 1), (1, 16), (8, 1)])
def test_up_to_sixteen_readers_in_powers_of_two_draw_the_same(ranks, workers):
    assert lane_count(40, ranks, workers) == 16
    assert used(Counted(40, 9), ranks, workers, 640 // ranks // 4) == used(Counted(40, 9), 1, 1, 160)


@pytest.mark.parametrize("first", [1, 63, 200, 1601])
def test_a_restart_skips_the_files_whose_lengths_are_known(first):
    whole, again = Counted(20, 40), Counted(20, 40)
    expected = used(whole, 1, 2, (first + 80) // 4 + 1)
    lengths = {whole.name(shard): 40 for shard in range(20)}
    found = used(again, 1, 2, 20, first=first, lengths=lengths)
    assert all(found[n] == expected[n] for n in found)
    # besides the samples themselves each of the 16 lanes may read two files of 40 records
    assert again.read_records <= 80 + 2 * 16 * 40
    blind = Counted(20, 40)
    assert used(blind, 1, 2, 20, first=first) == found
    assert again.read_records <= blind.read_records


def test_lengths_are_counted_and_a_restart_that_knows_them_has_the_same_samples(tmp_path):
    """After an epoch the lengths of all files are known."""
    for i in range(4):
        tar(tmp_path / f"{i}.tar", range(10 * i, 10 * i + 3 + i))
    data = config(tmp_path / "*.tar", image_column="png", streaming=True, num_workers=2)
    training = TrainingData(data, 3)
    seen = {}
    for batch in islice(training.loader(), 60):
        seen |= dict(zip(batch["sample"].tolist(), batch["images"], strict=True))
    assert training.lengths == {str(tmp_path / f"{i}.tar"): 3 + i for i in range(4)}
    known = TrainingData(data, 3)
    known.lengths.update(training.lengths)
    for batch in islice(known.loader(start_sample=50), 20):
        for n, image in zip(batch["sample"].tolist(), batch["images"], strict=True):
            assert image.equal(seen[n])


def test_many_unusable_images_in_a_row_do_not_end_a_stream(tmp_path):
    """Where no image of a block can be used, images of the following blocks replace them."""
    entries = [(f"{i}.png", png(flat(i, (12, 10) if i < 4 else (4, 4)))) for i in range(64)]
    write_tar(tmp_path / "a.tar", entries)
    stream = config(tmp_path / "a.tar", image_column="png", streaming=True, shuffle_buffer=8)
    images = torch.stack(list(take(stream, 64).values()))
    assert set(which(images)) == set(range(4))


# ---------------------------------------------------------------- URLs


def served(shard_server, **values) -> DataConfig:
    values = {"image_column": "png", "streaming": True, **values}
    return config(f"{shard_server.url}/shard-{{000..007}}.tar", **values)


def test_shards_from_a_web_server_are_those_on_the_disk(shard_server):
    local = config(shard_server.folder / "shard-*.tar", image_column="png", streaming=True)
    remote = take(served(shard_server, num_workers=2), 48, ranks=2)
    assert_same(take(local, 48), remote)
    assert len({image.numpy().tobytes() for image in remote.values()}) == 48


def test_remote_shards_read_by_number_are_downloaded_once_and_announced(shard_server, caplog):
    values = {"streaming": False, "validation": None, "validation_images": 8}
    data = served(shard_server, **values)
    before = len(shard_server.requests)
    downloaded = TrainingData(data, 0)
    assert "downloading 8 files" in caplog.text and "GB" in caplog.text
    asked = len(shard_server.requests)
    local = config(shard_server.folder / "shard-*.tar", image_column="png", **values)
    assert asked > before and len(downloaded.rows) == 40
    assert downloaded.fingerprint() == TrainingData(local, 0).fingerprint()
    assert_same(take(local, 16), take(data, 16))
    assert all(method == "HEAD" for method, *_ in shard_server.requests[asked:])


def test_a_shard_whose_download_breaks_off_is_read_on_from_there(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", png(flat(i, (40, 40)))) for i in range(9)])
    with FileServer(tmp_path) as server:
        path, waits = f"{server.url}/a.tar", []
        stream = FileStream("webdataset", [path], "png")
        server.broken.add("a.tar")

        def heal(attempt):
            waits.append(attempt)
            server.broken.discard("a.tar")

        read = lambda n: stream._read(path, n)  # noqa: E731
        records = list(read_with_retries(read, path, 2, heal))
        assert waits == [1] and [record["path"] for record in records] == [f"{i}.png" for i in range(2, 9)]
        server.broken.add("a.tar")
        with pytest.raises(OSError, match="a.tar: .* after record 0") as error:
            list(read_with_retries(read, path, 0, waits.append))
        assert waits == [1, 1, 2, 3] and "\n" not in str(error.value)
        server.missing.add("a.tar")
        with pytest.raises(OSError, match=r"a\.tar"):
            list(read_with_retries(read, path, 0, waits.append))
        assert len(waits) == 4  # a file that is not there is not asked for again


def test_tars_tables_and_images_are_read_from_an_fsspec_file_system(tmp_path):
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/bucket/{i}.tar", tar(tmp_path / f"{i}.tar", range(4 * i, 4 * i + 4)).read_bytes())
        memory.pipe(
            f"/tables/{i}.parquet", parquet(tmp_path / f"{i}.parquet", range(4 * i, 4 * i + 4)).read_bytes()
        )
        memory.pipe(f"/photos/a/{i}.png", png(flat(i)))
    memory.pipe("/photos/.hidden/x.png", png(flat(99)))
    for source, column in (
        ("memory://bucket/*.tar", "png"), ("memory://bucket/{0..2}.tar", "png"), ("memory://bucket", "png"),
        ("memory://tables/*.parquet", "image"),
    ):  # fmt: skip
        for streaming in (True, False):
            seen = take(config(source, image_column=column, streaming=streaming), 24 if streaming else 12)
            assert sorted(set(which(torch.stack(list(seen.values()))))) == list(range(12))
    photos = take(config("memory://photos", batch_size=3), 3)
    assert sorted(which(torch.stack(list(photos.values())))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{url}/none-{{0..3}}.tar", r"data\.train: http.*none-.*\.tar: no such file"),
        ("memory://nowhere/", r"data\.train: memory://nowhere/: no images and no data files there"),
        ("memory://nowhere/*.tar", r"data\.train: memory://nowhere/\*\.tar: nothing there"),
        ("nosuch://bucket/a.tar", r"data\.train: nosuch://bucket/a\.tar.*nosuch"),
        ("{folder}/shard-{{000..011}}.tar", r"shard-008\.tar: no such file, one of the 12 of"),
        ("{folder}/shard-{{000..011.tar", r"its braces do not close"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_urls_and_patterns_that_lead_nowhere(source, message, streaming, shard_server):
    source = source.format(url=shard_server.url, folder=shard_server.folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        TrainingData(config(source, image_column="png", streaming=streaming), 0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_local_files_are_not_copied_into_a_cache(tmp_path):
    for i in range(3):
        tar(tmp_path / f"{i}.tar", range(4 * i, 4 * i + 4))
        parquet(tmp_path / f"{i}.parquet", range(4 * i, 4 * i + 4))
    for source, column in (("*.tar", "png"), ("*.parquet", "image")):
        take(config(tmp_path / source, image_column=column), 12)
        take(config(tmp_path / source, image_column=column, streaming=True), 12)
    assert not os.path.exists(datasets.config.HF_DATASETS_CACHE) or not os.listdir(
        datasets.config.HF_DATASETS_CACHE
    )
