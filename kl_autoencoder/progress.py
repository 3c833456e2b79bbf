"""Show the progress of long work on stderr.

On a terminal: a bar, from the third second on, which is removed at the end. In a file or a pipe: a line every 20
seconds.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TextIO, TypeVar

from .distributed import rank_of

Item = TypeVar("Item")

# Seconds until something is shown, and between updates.
ON_A_TERMINAL, IN_A_FILE = (2.0, 1.0), (20.0, 20.0)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} {unit}, {elapsed}<{remaining}"
LINE = "{desc}: {percentage:3.0f}%, {n:.0f}/{total_fmt} {unit}, {elapsed}<{remaining}"
WITHOUT_TOTAL = "{desc}, {elapsed}"


class Progress:
    """`with Progress("encoding", 12, "images") as progress:` ... `progress.update()` after each of the 12.

    A thread draws it, so that it appears while the first item is still being worked on. Without `total` it shows
    the time that has passed. Of several ranks only the first shows anything.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str = "", initial: float = 0, shown: bool = True
    ):
        self.what, self.total, self.unit = what, total, unit
        self.shown = shown and rank_of(os.environ)[0] == 0
        self.n = self.initial = initial
        self.start, self._end = time.time(), threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        if self.shown:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self.shown:
            self._thread.join()

    def update(self, n: float = 1) -> None:
        """Count `n` more of `total` as done."""
        self.n += n

    def up_to(self, n: float) -> None:
        """Raise the count to `n`, where other processes work on the same items."""
        self.n = max(self.n, n)

    def _draw(self) -> None:
        terminal = sys.stderr.isatty()
        wait, interval = ON_A_TERMINAL if terminal else IN_A_FILE
        if self._end.wait(wait):
            return
        bar = self._bar(terminal)
        while not self._end.wait(interval):
            bar.n = self.n
            bar.refresh()
        bar.close()

    def _bar(self, terminal: bool):
        from tqdm import tqdm

        form = WITHOUT_TOTAL if self.total is None else BAR if terminal else LINE
        bar = tqdm(
            desc=self.what, total=self.total, unit=self.unit, initial=self.initial, bar_format=form, leave=False,
            file=sys.stderr if terminal else _Lines(sys.stderr), **(_fallback_size() if terminal else {}),
            delay=1e-9,  # it draws nothing as it is made
        )  # fmt: skip
        bar.start_t, bar.n = self.start, self.n
        bar.refresh()
        return bar


def tracked(items: Sequence[Item], what: str, unit: str) -> Iterator[Item]:
    """Iterate over the items, with a `Progress` that counts those the caller has finished with."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.update()


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line (to stdout, or `file`) above the bar, if one is on the terminal.

    In a single write, so that lines of several ranks do not mix.
    """
    file = sys.stdout if file is None else file
    bars = sys.modules["tqdm"].tqdm.external_write_mode(file) if "tqdm" in sys.modules else nullcontext()
    with bars:
        file.write(f"{text}\n")
        file.flush()


def _fallback_size() -> dict[str, int]:
    """Columns and rows for a terminal that reports none (some pseudo-terminals), where tqdm draws nothing."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        size = os.terminal_size((0, 0))
    return {} if size.columns and size.lines else {"ncols": 80, "nrows": 20}


class _Lines:
    """A file in which each update of a bar is a line of its own, instead of overwriting the last one."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        if text := text.strip():
            self.file.write(text + "\n")

    def flush(self) -> None:
        self.file.flush()
