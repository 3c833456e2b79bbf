"""Remote files in processes that are forked from one that reads them."""

import gc
import multiprocessing
import threading

from kl_autoencoder.data.remote import open_file
from tests.file_server import FileServer


def first_byte_from(url: str, position: int) -> bytes:
    with open_file(url) as file:
        file.seek(position)
        gc.collect()  # whatever fsspec has dropped
        return file.read(1)


def test_a_forked_reader_leaves_the_connections_of_its_parent_alone(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 2**16)  # several blocks
    with FileServer(tmp_path) as server:
        url = f"{server.url}/a.bin"
        assert first_byte_from(url, 1) == b"\x01"  # leaves an open connection in the pool
        child = multiprocessing.get_context("fork").Process(target=first_byte_from, args=(url, 2))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        read = []
        thread = threading.Thread(target=lambda: read.append(first_byte_from(url, 2**23 + 3)), daemon=True)
        thread.start()
        thread.join(60)
        assert read == [b"\x03"], "the parent waits for an answer"
