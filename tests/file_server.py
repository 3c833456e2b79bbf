"""A local HTTP server of files with byte ranges, as object storage has them, and tar files to serve."""

import io
import re
import tarfile
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer:
    """`with FileServer(folder) as server`: the files of a folder at `server.url`, from another thread.

    `requests` lists (method, file, first byte) of all that was asked for. The files in `missing` are answered with
    404 though they are there; of those in `broken` half is sent, and then the connection is closed.
    """

    def __init__(self, folder: Path):
        self.folder, self.requests, self.missing, self.broken = folder, [], set(), set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self):
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer()

            do_HEAD = do_GET

            def answer(self):
                name = self.path.lstrip("/")
                path = files.folder / name
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                files.requests.append((self.command, name, int(wanted[1]) if wanted else 0))
                if not path.is_file() or name in files.missing:
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = path.read_bytes()
                first = int(wanted[1]) if wanted else 0
                last = min(int(wanted[2]), len(data) - 1) if wanted and wanted[2] else len(data) - 1
                part = data[first : last + 1]
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                if self.command == "GET" and name in files.broken:
                    self.wfile.write(part[: len(part) // 2])
                    self.close_connection = True
                elif self.command == "GET":
                    self.wfile.write(part)

            def log_message(self, *_): ...

        return Handler


def write_tar(path: Path, entries: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar file of (name, contents)."""
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
