"""Damage the inputs of commands, and run the commands one after another in a process with limits.

A command must end with success, or with a code other than zero and one short line that says what is wrong.
"""

import contextlib
import io
import json
import random
import re
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kl_autoencoder.cli.main import main
from tests import processes
from train.__main__ import main as train

MEMORY = 2 << 30  # bytes that a command may ask for beyond what the process has
SECONDS = 20
LONGEST = 300  # characters of the one line
RAW = re.compile(r"error: \w*(Error|Exception|Warning|Interrupt|Exit): |Traceback|Errno (?!2\b|28\b)")
NO_MEMORY = re.compile(r"allocat|out of memory|MemoryError", re.IGNORECASE)
STRANGE = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        255,
        65536,
        2**30,
        2**31,
        2**63,
        10**400,
        -(2**63),
        0.0,
        0.5,
        -2.5,
    ),
    *(
        1e-320,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "8",
        "null",
        "../..",
        "a" * 5000,
        "\x00",
        "\ud800",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [1],
        [8, 8],
        [0, 0, 0],
        ["x"] * 4,
        {"a": 1},
        [1e308] * 4,
        [16384] * 4,
        [[1, 2]] * 3,
    ),
)


@dataclass
class Outcome:
    """How a command ended: its code, what it said on stderr, its seconds, and what escaped from it if anything."""

    name: str
    code: int | None
    said: str
    seconds: float
    escaped: str = ""

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        errors = [line for line in self.said.splitlines() if "error:" in line]
        if self.escaped:
            return f"raised {self.escaped}"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.0f} s"
        if NO_MEMORY.search(self.said):
            return f"asked for more than {MEMORY >> 30} GB: {self.said}"
        if RAW.search(self.said):
            return f"gave an exception that is not meant for users: {self.said}"
        if bool(self.code) != bool(errors) or len(errors) > 1:
            return f"code {self.code} with {len(errors)} lines of error: {self.said}"
        long = [line for line in self.said.splitlines() if len(line) >= LONGEST]
        return f"a line of {len(long[0])} characters: {long[0]}" if long else None


def run_all(
    folder: Path, cases: Callable[..., Iterator[tuple[str, Sequence[str]]]], *arguments
) -> list[Outcome]:
    """What became of each (name, command line) that `cases(folder, *arguments)` yields.

    A command line that begins with "train" is one of the trainer.

    `cases`, of a module's top level, writes what a command reads right before it yields the command.
    """
    results, log = folder / "outcomes.jsonl", folder / "log"
    assert processes.finish(processes.start(log, _run, results, cases, folder, *arguments)) == [0], (
        log.read_text()
    )
    return [Outcome(**json.loads(line)) for line in results.read_text().splitlines()]


def _run(results: Path, cases: Callable, folder: Path, *arguments) -> int:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _too_long)
    with results.open("w") as file:
        for name, argv in cases(folder, *arguments):
            print(json.dumps(asdict(_outcome(name, argv))), file=file, flush=True)
    return 0


def _outcome(name: str, argv: Sequence[str]) -> Outcome:
    said, code, escaped = io.StringIO(), None, ""
    started = time.monotonic()
    signal.alarm(SECONDS + 1)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            words = [str(argument) for argument in argv]
            code = train(words[1:]) if words[0] == "train" else main(words)
    except BaseException as error:
        escaped = f"{type(error).__name__}: {error}"[:2000]
    finally:
        signal.alarm(0)
    return Outcome(name, code, said.getvalue()[:5000], time.monotonic() - started, escaped)


def _too_long(*_) -> None:
    raise SystemExit("too long")


# -------------------------------------------------------------------- damage


def damaged_bytes(content: bytes, chance: random.Random, most: int | None = None) -> bytes:
    """`content` cut short, or with bytes changed, put in, taken out or repeated, among the first `most`."""
    at = chance.randrange(min(len(content), most or len(content)))
    span = chance.choice((1, 2, 8, 64, 1000))
    return chance.choice((
        content[:at],
        content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :],
        content[:at] + chance.randbytes(span) + content[at + span :],
        content[:at] + bytes(span) + content[at + span :],
        content[:at] + b"\xff" * span + content[at + span :],
        content[:at] + chance.randbytes(span) + content[at:],
        content[:at] + content[at + span :],
        content[:at] + content[at : at + span] * 3 + content[at + span :],
    ))  # fmt: skip


def damaged_tree(tree, chance: random.Random):
    """A copy of a JSON value in which one part, at any depth, is another, missing, doubled or renamed."""
    if not isinstance(tree, (dict, list)) or not tree or chance.random() < 0.03:
        return chance.choice(STRANGE)
    tree = tree.copy()
    key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    damage = chance.random()
    if damage < 0.1:
        del tree[key]
    elif damage < 0.15 and isinstance(tree, list):
        tree.insert(key, tree[key])
    elif damage < 0.2 and isinstance(tree, dict):
        tree[key + chance.choice(" x_0")] = tree.pop(key)
    elif damage < 0.25:
        tree[key] = [tree[key]]
    elif damage < 0.35 and isinstance(tree[key], (int, float)) and not isinstance(tree[key], bool):
        tree[key] = chance.choice(
            (-tree[key], tree[key] + 1, tree[key] * 1000, str(tree[key]), 2 * tree[key])
        )
    else:
        tree[key] = damaged_tree(tree[key], chance)
    return tree


def damaged_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A .safetensors file damaged in its bytes, in those of its header, or in what its header says."""
    length = struct.unpack("<Q", content[:8])[0]
    kind = chance.random()
    if kind < 0.5:
        return damaged_bytes(content, chance, most=None if kind < 0.2 else 8 + length)
    header = json.dumps(damaged_tree(json.loads(content[8 : 8 + length]), chance)).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
