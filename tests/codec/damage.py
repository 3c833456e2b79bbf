"""Damage to a compressed file, as disks, wires and people do it. Never none."""

import random


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one kind of damage."""
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
