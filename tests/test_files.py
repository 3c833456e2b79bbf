"""Files appear whole, with the rights of any new file, and only after their bytes are on the disk."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.files import read_tensors, replacing, save_tensors
from train.loop.checkpoints.files import save_checkpoint


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.safetensors"
    with ThreadPoolExecutor(4) as pool:
        written = [pool.submit(save_tensors, path, {"a": torch.full((999,), i)}, {}) for i in range(60)]
        for one in written:
            one.result()
    assert read_tensors(path)[0]["a"].unique().numel() == 1
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_safetensors_files_honour_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    vae = KLAutoencoder(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    vae.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    vae.save_single_file(tmp_path / "vae.safetensors")
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(2)}}, {})
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) > 6 and {rights(path) for path in files} == {mode}
    with replacing(tmp_path / "notes") as path:
        path.write_text("a")
    assert rights(tmp_path / "notes") == mode


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("named"), replace(*paths)))
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.zeros(2)}, {})
    assert done == [path.stat().st_ino, "named", tmp_path.stat().st_ino]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(FileNotFoundError, match=r"file/b: the folder .*file is missing"),
        replacing(tmp_path / "file" / "b"),
    ):
        pass
    with pytest.raises(OSError, match="too long: '.*/aaaa"), replacing(tmp_path / ("a" * 300)):
        pass
