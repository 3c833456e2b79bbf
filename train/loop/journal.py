"""Log a run to metrics.jsonl and to trackers; a line holds the means over the steps since the line before."""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kl_autoencoder.models.run_folder import METRICS_FILE, read_metrics

from .trackers import Trackers

MOST_UNWRITTEN = 10_000  # while the disk is full, at most so many lines are kept in memory, the newest


class Journal:
    """Collects scalars on the device, and writes their means over a window of steps, micro-batches and ranks.

    A window lasts from one line of metrics.jsonl to the next. A value that is not finite is left out of its mean,
    so that a skipped step does not hide the steps around it. trackers: names for `Trackers`. config: the run's,
    nested.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        trackers: tuple[str, ...],
        say: Callable[[str], None] = print,
        config: Mapping[str, Any] | None = None,
    ):
        self.path, self.accelerator = folder / METRICS_FILE, accelerator
        self.say, self.warned = say, False
        self.unwritten: deque[str] = deque(maxlen=MOST_UNWRITTEN)  # lines that wait for room on the disk
        self.trackers = Trackers(folder, accelerator, trackers, say, config)
        self.start_window(step=0)

    def start_window(self, step: int) -> None:
        # (names of the terms) -> for each micro-batch that logged these terms, a vector of their values
        self.window: dict[tuple[str, ...], list[Tensor]] = {}
        self.first_step, self.started, self.seconds_stopped = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time of the `with` block, such as a validation, out of the steps a second."""
        since = time.perf_counter()
        yield
        self.seconds_stopped += time.perf_counter() - since

    def add(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack([value.detach().float() for value in terms.values()])
        self.window.setdefault(tuple(terms), []).append(values)

    def close_window(self, step: int) -> tuple[dict[str, float], float]:
        """Return name -> mean over the window (NaN if no value was finite) and the steps a second; start the next.

        step: how many steps were taken. All ranks must call it, with terms of the same names.
        """
        totals: dict[str, Tensor] = {}  # name: (sum, count) of the finite values
        for names, vectors in self.window.items():
            table = torch.stack(vectors)  # (micro-batches, names)
            finite = table.isfinite()
            pairs = torch.stack([table.where(finite, 0.0).sum(0), finite.sum(0)], dim=1)
            for name, pair in zip(names, pairs, strict=True):
                totals[name] = totals[name] + pair if name in totals else pair
        sums, counts = self.accelerator.reduce(torch.stack(list(totals.values())), "sum").unbind(1)
        means = (sums / counts).tolist()
        rate = (step - self.first_step) / (time.perf_counter() - self.started - self.seconds_stopped)
        self.start_window(step)
        return dict(zip(totals, means, strict=True)), rate

    def write(self, step: int, samples: int, values: dict) -> None:
        """Write a line of metrics.jsonl, and its numbers to the trackers; values that are not finite become null.

        If the line cannot be written (a full disk), a warning is printed once, and the line is kept and written
        together with the next one that can be. Does nothing on other ranks than the main one.
        """
        if not self.accelerator.is_main_process:
            return
        plain = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        self.unwritten.append(json.dumps({"step": step, "samples": samples, **plain}) + "\n")
        try:
            append_whole(self.path, "".join(self.unwritten))
        except OSError as error:
            if not self.warned:  # once: a full disk would fail at every line
                self.say(f"WARNING: {self.path}: cannot be written ({error.strerror}); training goes on")
            self.warned = True
            return
        self.unwritten.clear()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.trackers.log(numbers, step)

    def show(self, name: str, picture: Path, step: int) -> None:
        """Send a picture (an image file) to the trackers."""
        self.trackers.show(name, picture, step)

    def close(self) -> None:
        self.trackers.close()

    def forget_after(self, step: int) -> None:
        """Drop the lines after `step`, whose steps a continued run will take again, and a line that was cut off."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        kept = [line for line in self.lines() if line["step"] <= step]
        beside = self.path.with_suffix(".writing")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        beside.replace(self.path)

    def recorded_start(self, prefix: str) -> dict[str, float]:
        """What an earlier start of this run logged at step 0 under names that begin with `prefix`; {} if nothing.

        The names are returned without the prefix.
        """
        for line in self.lines():
            found = {name.removeprefix(prefix): v for name, v in line.items() if name.startswith(prefix)}
            if line["step"] == 0 and found:
                return found
        return {}

    def lines(self) -> list[dict]:
        """The complete lines of metrics.jsonl."""
        return read_metrics(self.path)


def append_whole(path: Path, text: str) -> None:
    """Append all of `text`, or raise OSError and append nothing: half a line would spoil the one after it."""
    rest = text.encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # a device such as /dev/full cannot be truncated
                os.ftruncate(file.fileno(), before)
            raise
