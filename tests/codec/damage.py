"""Damage a compressed file as disks, networks and people do; the result is never the file itself.

`python -m tests.codec.damage [COUNT]` decompresses COUNT damaged files (10,000) and counts the errors.
"""

import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes after damage of one kind, drawn by chance."""
    while True:
        found = chance.choice((flipped, truncated, overwritten, inserted, repeated, zeroed, spliced))(
            data, chance
        )
        if found != data:
            return found


def flipped(data: bytes, chance: random.Random) -> bytes:
    """With one to eight bits flipped."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def overwritten(data: bytes, chance: random.Random) -> bytes:
    """With random bytes in place of some."""
    start, length = chance.randrange(len(data)), chance.randint(1, 40)
    return data[:start] + chance.randbytes(length) + data[start + length :]


def inserted(data: bytes, chance: random.Random) -> bytes:
    place = chance.randint(0, len(data))
    return data[:place] + chance.randbytes(chance.randint(1, 40)) + data[place:]


def repeated(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start:] * chance.randint(2, 3)


def zeroed(data: bytes, chance: random.Random) -> bytes:
    """With a stretch of zeros or of ones, as lost sectors read."""
    start, length = chance.randrange(len(data)), chance.randint(1, 200)
    fill = chance.choice((b"\0", b"\xff"))
    return (data[:start] + fill * length + data[start + length :])[: len(data)]


def spliced(data: bytes, chance: random.Random) -> bytes:
    """Without a stretch in the middle."""
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randint(1, 60) :]


def main() -> None:
    from skimage import data

    from kl_autoencoder.cli.commands.codec import decompress_file
    from kl_autoencoder.codec.public import codec_of

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    codec, chance, said, longest = codec_of("compact-codec"), random.Random(0), Counter(), 0.0
    whole = codec.compress(Image.fromarray(data.astronaut()[:160, :200]), 60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.klc"
        for _ in range(count):
            path.write_bytes(damaged(whole, chance))
            start = time.perf_counter()
            try:
                decompress_file(lambda header: codec, path)
                said["no error"] += 1
            except ValueError as error:
                clear = (
                    str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 200
                )
                said["a clear error" if clear else f"unclear: {error}"] += 1
            longest = max(longest, time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{dict(said)}; the longest took {longest:.3f} s, memory grew by {grown / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
