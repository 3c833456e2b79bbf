"""Files hold what was packed; damaged, truncated and other files are refused in one line."""

import random
import zlib
from dataclasses import replace

import pytest

from kl_autoencoder.codec import container
from kl_autoencoder.codec.container import Header, pack, unpack
from tests.codec.damage import damaged

HEADER = Header(60, "compact", b"abcdef", b"wxyz", 512, 700, b"side")
CHUNKS = [b"first", b"", bytes(300)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"entropy_hash": b"", "side": b""},
        {"height": 1, "width": 1},
        {"model_name": "é" * 40, "quality": 1},
    ],
)
@pytest.mark.parametrize("chunks", [CHUNKS, [b"x"]])
def test_unpack_is_the_inverse(changes, chunks):
    header = replace(HEADER, **changes)
    found, read = unpack(pack(header, chunks))
    assert read == chunks
    assert found == replace(header, model_name=header.model_name[:32])  # 64 bytes of UTF-8


@pytest.mark.parametrize(("name", "length"), [("compact", 0), ("compact-codec", 1), ("other", 5)])
def test_the_names_of_packaged_models_are_stored_in_short(name, length):
    packed = pack(replace(HEADER, model_name=name), CHUNKS)
    assert len(packed) == len(pack(HEADER, CHUNKS)) + length and unpack(packed)[0].model_name == name


def test_the_bytes_are_those_of_the_format():
    assert pack(replace(HEADER, side=b"", model_name="a-b"), [b"ab"]) == b"".join(
        [
            *(b"KLC\x01", bytes([60]), b"abcdef", b"\x03a-b", b"\x04wxyz"),
            *(b"\x80\x04", b"\xbc\x05", b"\x00", b"\x01", b"\x02", zlib.crc32(b"ab").to_bytes(4, "little")),
            *(bytes.fromhex("5ab5738c"), b"ab"),
        ]
    )


def test_every_flipped_bit_and_every_shorter_file_is_refused():
    data = pack(HEADER, [b"some bytes", b"more"])
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError):
            unpack(bytes(changed))
    for length in range(len(data)):
        with pytest.raises(ValueError):
            unpack(data[:length])
    with pytest.raises(ValueError, match="3 bytes behind its end"):
        unpack(data + b"end")


def test_damage_is_reported_in_one_line():
    chance, data = random.Random(0), pack(HEADER, CHUNKS)
    for _ in range(500):
        with pytest.raises(ValueError) as told:
            unpack(damaged(data, chance))
        assert "\n" not in str(told.value) and len(str(told.value)) < 160


@pytest.mark.parametrize(
    ("size", "told"),
    [((0, 5), "5x0 pixels"), ((1 << 20, 1 << 20), "1048576x1048576 pixels; allowed: 1 to 268,435,456")],
)
def test_absurd_sizes_are_refused(size, told):
    """Even where all checksums are right."""
    data = pack(replace(HEADER, height=1, width=1), [b"x"])
    fields = data[: data.index(b"\x01\x01\x04side")], data[data.index(b"\x04side") : -5]
    head = fields[0] + container.number(size[0]) + container.number(size[1]) + fields[1]
    with pytest.raises(ValueError, match=told):
        unpack(head + container.crc(head) + b"x")
    with pytest.raises(ValueError, match="allowed: up to 268,435,456"):
        pack(replace(HEADER, height=1 << 20, width=1 << 20), [b"x"])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n", r"not a file of `kl-autoencoder compress` \(begins with b'\\x89PNG'\)"),
        (b"KLC\x02abc", "version 2 of the format, or damaged; this program reads version 1"),
        (b"KLC", "version none"),
        (b"KLC\x01", "truncated: 1 bytes are wanted where 0 are left"),
        (b"KLC\x01" + b"\xff" * 50, "bits"),
    ],
)
def test_other_files_are_refused(data, told):
    with pytest.raises(ValueError, match=told):
        unpack(data)
