"""The file format: a header with everything that decoding needs, then chunks of coded latents with checksums.

    magic and version   b"KLC", 1
    quality             1 byte
    model               the first 6 bytes of the SHA-256 of its weights; then its name, for people, as a length and
                        UTF-8; "" stands for compact and "+" for compact-codec, the models in the package
    entropy model       a length, and the first 4 bytes of its SHA-256; the length is 0 for static tables
    height, width       of the image in pixels
    side information    of the entropy model: a length and the bytes
    chunks              their number; for each, its length and the CRC-32 of its bytes
    CRC-32              of everything before
    the chunks

Lengths, counts and sizes are unsigned LEB128: 7 bits in each byte, lowest first, with the highest bit set if
another byte follows. CRCs are 4 bytes, little-endian.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import clipped
from ..models.packaged import COMPACT, COMPACT_CODEC, PACKAGED

SUFFIX = ".klc"  # of compressed files
MAGIC, VERSION = b"KLC", 1
MODEL_BYTES, ENTROPY_BYTES = 6, 4  # stored bytes of the hashes of both models
LONGEST_NAME = 64  # bytes of a model's name, at most
STORED_NAMES = {COMPACT.name: "", COMPACT_CODEC.name: "+"}  # names as they are stored
NAMES = {stored: name for name, stored in STORED_NAMES.items()}
MOST_SIDE = 4096  # bytes of side information, at most
MOST_PIXELS = 1 << 28  # of an image, at most: 268 million
MOST_BYTES = 1 << 30  # of a file, at most
NOT_OURS = "not a file of `kl-autoencoder compress`"


@dataclass(frozen=True)
class Header:
    """The header of a compressed file.

    model_hash, entropy_hash: first bytes of the SHA-256 of the weights; entropy_hash is b"" for static tables.
    height, width: of the image in pixels. side: side information of the entropy model.
    """

    quality: int
    model_name: str
    model_hash: bytes
    entropy_hash: bytes
    height: int
    width: int
    side: bytes = b""


def pack(header: Header, chunks: Sequence[bytes]) -> bytes:
    """Return the bytes of a file with this header and these chunks. Raises ValueError for more than MOST_PIXELS."""
    if header.height * header.width > MOST_PIXELS:
        raise ValueError(f"{header.width}x{header.height} pixels; allowed: up to {MOST_PIXELS:,}")
    name = STORED_NAMES.get(header.model_name, header.model_name)
    stored = name.encode()[:LONGEST_NAME].decode(errors="ignore").encode()
    parts = [
        MAGIC,
        bytes([VERSION, header.quality]),
        header.model_hash,
        *(number(len(field)) + field for field in (stored, header.entropy_hash)),
        number(header.height) + number(header.width),
        number(len(header.side)) + header.side,
        number(len(chunks)),
        *(number(len(chunk)) + crc(chunk) for chunk in chunks),
    ]
    head = b"".join(parts)
    return b"".join([head, crc(head), *chunks])


def unpack(data: bytes) -> tuple[Header, list[bytes]]:
    """Parse a file: its header and its chunks. Raises ValueError for anything that `pack` has not written.

    Every length is compared with the bytes that are left before anything of that length is allocated.
    """
    check_magic(data)
    fields = _Fields(data, len(MAGIC) + 1)
    quality, model_hash = fields.take(1)[0], fields.take(MODEL_BYTES)
    stored, entropy_hash = fields.field(LONGEST_NAME), fields.field(ENTROPY_BYTES)
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
    name = stored.decode(errors="replace")
    header = Header(quality, NAMES.get(name, name), model_hash, entropy_hash, height, width, side)
    coded = [_checked(fields.take(length), check, i) for i, (length, check) in enumerate(chunks)]
    if fields.left:
        raise ValueError(f"damaged: {fields.left:,} bytes behind its end")
    return header, coded


def model_for(header: Header) -> str:
    """The model that decompresses a file if no other is given: the packaged one that it names, or compact-codec."""
    return header.model_name if header.model_name in PACKAGED else COMPACT_CODEC.name


def read(path: Path) -> bytes:
    """Read a compressed file.

    Raises FileNotFoundError, and ValueError for other kinds of files and those above MOST_BYTES; both name the
    file.
    """
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
    """Raise ValueError unless `data` begins with the magic and the version of this format."""
    if data[: len(MAGIC)] != MAGIC:
        what = f"begins with {data[:4]!r}" if data else "is empty"
        raise ValueError(f"{NOT_OURS} ({what})")
    if data[len(MAGIC) : len(MAGIC) + 1] != bytes([VERSION]):
        found = data[len(MAGIC)] if len(data) > len(MAGIC) else "none"
        raise ValueError(f"version {found} of the format, or damaged; this program reads version {VERSION}")


def number(value: int) -> bytes:
    """Encode a whole number from 0 on as unsigned LEB128."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def crc(data: bytes) -> bytes:
    """The CRC-32 of `data`, 4 bytes, little-endian."""
    return zlib.crc32(data).to_bytes(4, "little")


def _checked(chunk: bytes, check: bytes, index: int) -> bytes:
    if crc(chunk) != check:
        raise ValueError(f"damaged: chunk {index + 1} does not have the checksum that it was written with")
    return chunk


class _Fields:
    """Reads the fields of a header in order, from `position` on. Raises ValueError if bytes are missing."""

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
