"""The file: a header that says all that decoding needs, and chunks of coded latents, each with a checksum.

    magic and version   b"KLC", 1
    quality             1 byte
    model               6 bytes of the SHA-256 of its weights; its name, for people: a length and UTF-8, none for
                        compact, the model in the package
    entropy model       4 bytes of its SHA-256, or none, for static tables: a length and the bytes
    height, width       of the image in pixels
    side information    of the entropy model: a length and the bytes
    chunks              how many; of each its length and the CRC-32 of its bytes
    CRC-32              of everything before
    the chunks

Lengths, counts and sizes are whole numbers of 7 bits a byte, the lowest first, with the highest bit where another
byte follows (LEB128); CRCs are 4 bytes, the lowest first.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import clipped

SUFFIX = ".klc"  # of the files' names
MAGIC, VERSION = b"KLC", 1
MODEL_BYTES, ENTROPY_BYTES = 6, 4  # of hashes
LONGEST_NAME = 64  # bytes
UNNAMED = "compact"  # the model whose name takes no bytes
MOST_SIDE = 4096  # bytes of side information
MOST_PIXELS = 1 << 28  # 268 million
MOST_BYTES = 1 << 30  # of a file
NOT_OURS = "not a file of `kl-autoencoder compress`"


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    model_hash, entropy_hash: the beginnings of the SHA-256 of the weights; entropy_hash is b"" for static tables.
    height, width: of the image, in pixels. side: bytes for the entropy model.
    """

    quality: int
    model_name: str
    model_hash: bytes
    entropy_hash: bytes
    height: int
    width: int
    side: bytes = b""


def pack(header: Header, chunks: Sequence[bytes]) -> bytes:
    """The file. ValueError for an image of more than MOST_PIXELS."""
    if header.height * header.width > MOST_PIXELS:
        raise ValueError(f"{header.width}x{header.height} pixels; allowed: up to {MOST_PIXELS:,}")
    name = header.model_name if header.model_name != UNNAMED else ""
    name = name.encode()[:LONGEST_NAME].decode(errors="ignore").encode()
    parts = [
        MAGIC,
        bytes([VERSION, header.quality]),
        header.model_hash,
        *(number(len(field)) + field for field in (name, header.entropy_hash)),
        number(header.height) + number(header.width),
        number(len(header.side)) + header.side,
        number(len(chunks)),
        *(number(len(chunk)) + crc(chunk) for chunk in chunks),
    ]
    head = b"".join(parts)
    return b"".join([head, crc(head), *chunks])


def unpack(data: bytes) -> tuple[Header, list[bytes]]:
    """The header and the chunks of a file. Raises ValueError for anything that `pack` has not written.

    Nothing is allocated by what the file says: all lengths are compared with its own first.
    """
    check_magic(data)
    fields = _Fields(data, len(MAGIC) + 1)
    quality, model_hash = fields.take(1)[0], fields.take(MODEL_BYTES)
    name, entropy_hash = fields.field(LONGEST_NAME), fields.field(ENTROPY_BYTES)
    height, width = fields.number(), fields.number()
    side = fields.field(MOST_SIDE)
    count = fields.number()
    if count > fields.left:
        raise ValueError("damaged or truncated: more chunks than bytes")
    chunks = [(fields.number(), fields.take(4)) for _ in range(count)]
    head = data[: fields.position]
    if fields.take(4) != crc(head):
        raise ValueError("damaged: its header does not have the checksum that it was written with")
    if not (0 < height * width <= MOST_PIXELS):
        raise ValueError(f"{width}x{height} pixels; allowed: 1 to {MOST_PIXELS:,}")
    header = Header(
        quality, name.decode(errors="replace") or UNNAMED, model_hash, entropy_hash, height, width, side
    )
    coded = [_checked(fields.take(length), check, i) for i, (length, check) in enumerate(chunks)]
    if fields.left:
        raise ValueError(f"damaged: {fields.left:,} bytes behind its end")
    return header, coded


def read(path: Path) -> bytes:
    """The bytes of a file that begins as ours do. Raises FileNotFoundError and ValueError, naming it."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: {NOT_OURS} (is a folder)")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(MAGIC) + 1)
        try:
            check_magic(head)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if size > MOST_BYTES:
            raise ValueError(f"{path}: {size:,} bytes; allowed: up to {MOST_BYTES:,}")
        return head + file.read()


def check_magic(data: bytes) -> None:
    """Refuse what does not begin as our files do; of another version, say so."""
    if data[: len(MAGIC)] != MAGIC:
        what = f"begins with {data[:4]!r}" if data else "is empty"
        raise ValueError(f"{NOT_OURS} ({what})")
    if data[len(MAGIC) : len(MAGIC) + 1] != bytes([VERSION]):
        found = data[len(MAGIC)] if len(data) > len(MAGIC) else "none"
        raise ValueError(f"version {found} of the format, or damaged; this program reads version {VERSION}")


def number(value: int) -> bytes:
    """A whole number from 0 on, in 7 bits a byte."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _checked(chunk: bytes, check: bytes, index: int) -> bytes:
    if crc(chunk) != check:
        raise ValueError(f"damaged: chunk {index + 1} does not have the checksum that it was written with")
    return chunk


class _Fields:
    """Reads a header from `position` on."""

    def __init__(self, data: bytes, position: int):
        self.data, self.position = data, position

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, length: int) -> bytes:
        if length > self.left:
            raise ValueError(f"truncated: {length:,} bytes are wanted where {self.left:,} are left")
        self.position += length
        return self.data[self.position - length : self.position]

    def number(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("damaged: a number of more than 35 bits")

    def field(self, longest: int) -> bytes:
        length = self.number()
        if length > longest:
            raise ValueError(f"damaged: {clipped(str(length), 12)} bytes where at most {longest} are allowed")
        return self.take(length)
