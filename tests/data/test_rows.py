"""Tar and parquet files by number, in place: the rows that `datasets` makes of a converted copy of them."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kl_autoencoder.data.parquet_files import ParquetRows, mean_group_bytes
from kl_autoencoder.data.sources import Keys, open_source
from kl_autoencoder.data.tar_files import TarRows
from tests.file_server import write_tar


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def test_tars_have_the_rows_of_a_converted_copy(tmp_path, cache):
    for number, rows in enumerate((range(3), range(3, 8))):
        entries = []
        for row in rows:
            fields = {"jpg": b"image %d", "txt": b"caption %d", "json": b'{"width": %d}', "cls": b"%d"}
            entries += [(f"part.one/{row}.{field}", contents % row) for field, contents in fields.items()]
        write_tar(tmp_path / f"{number}.tar", entries)
    files, keep = [str(tmp_path / f"{n}.tar") for n in range(2)], ("txt", "json", "cls")
    ours = TarRows(files, "jpg", keep)
    copied = datasets.load_dataset("webdataset", data_files=files, split="train").select_columns(
        ["jpg", *keep]
    )
    copied = copied.cast_column("jpg", datasets.Image(decode=False))
    assert len(ours) == len(copied) == 8
    assert [ours[row] for row in range(8)] == list(copied)
    assert ours.features == copied.features
    assert ours.image_names() == [f"part.one/{row}.jpg" for row in range(8)]


@pytest.mark.parametrize("nameless", [False, True])
def test_parquet_has_the_rows_of_a_converted_copy(tmp_path, cache, nameless):
    records = [{"bytes": b"image %d" % n, "path": None if nameless else f"{n}.jpg"} for n in range(11)]
    features = datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string")})
    table = pa.table({"photo": records, "caption": [f"caption {n}" for n in range(11)]})
    for number, rows in enumerate((table[:7], table[7:])):
        rows = rows.replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(rows, tmp_path / f"{number}.parquet", row_group_size=3)
    files = [str(tmp_path / f"{n}.parquet") for n in range(2)]
    ours = ParquetRows(files, "photo", ["caption"])
    copied = datasets.load_dataset("parquet", data_files=files, split="train")
    copied = copied.cast_column("photo", datasets.Image(decode=False))
    assert [ours[row] for row in (10, 0, 6, 7, 3)] == [copied[row] for row in (10, 0, 6, 7, 3)]
    assert len(ours) == 11 and ours.features == copied.features
    assert ours.image_names() == [record["path"] for record in records]


def test_large_row_groups_are_copied_for_rows_in_any_order_and_not_for_rows_in_order(tmp_path, cache):
    records = [{"bytes": bytes(2**18), "path": f"{n}.jpg"} for n in range(8)]
    pq.write_table(
        pa.table({"image": records}), tmp_path / "a.parquet", compression="none", use_dictionary=False
    )
    assert mean_group_bytes([str(tmp_path / "a.parquet")], "image") > 8 * 2**18
    keys = Keys("data.train", "data.image_column")
    assert isinstance(open_source(str(tmp_path / "a.parquet"), keys, in_order=True), ParquetRows)
    assert not (tmp_path / "cache").exists()
    assert isinstance(open_source(str(tmp_path / "a.parquet"), keys), datasets.Dataset)
