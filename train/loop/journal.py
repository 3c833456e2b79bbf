"""What a run writes down: metrics.jsonl, TensorBoard, and the sums between two lines of them."""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor


class Journal:
    """Scalars stay on the device until a line is written, as means over its steps, micro-batches and ranks.

    A value that is not finite is left out of its mean, so that a skipped step does not hide the steps around it.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, tensorboard: bool):
        self.path, self.accelerator, self.tensorboard = folder / "metrics.jsonl", accelerator, tensorboard
        if tensorboard and accelerator.is_main_process:
            (folder / "logs").mkdir(exist_ok=True)
        accelerator.init_trackers("logs")
        self.start_window(step=0)

    def start_window(self, step: int) -> None:
        self.window: dict[tuple[str, ...], list[Tensor]] = {}  # names: a vector of their values a micro-batch
        self.first_step, self.started = step, time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        values = torch.stack([value.detach().float() for value in terms.values()])
        self.window.setdefault(tuple(terms), []).append(values)

    def close_window(self, step: int) -> tuple[dict[str, float], float]:
        """The means since the window was opened (NaN if no value was finite), and the steps a second.

        Opens the next window.
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
        rate = (step - self.first_step) / (time.perf_counter() - self.started)
        self.start_window(step)
        return dict(zip(totals, means, strict=True)), rate

    def write(self, step: int, samples: int, values: dict) -> None:
        """A line of metrics.jsonl, null for what is not finite; numbers go to TensorBoard too.

        Raises OSError naming the file if it cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        plain = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "samples": samples, **plain}) + "\n")
        except OSError as error:  # one from a full disk does not name its file
            raise OSError(f"{self.path}: cannot be written ({error.strerror})") from error
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)

    def show(self, name: str, picture: Path, step: int) -> None:
        if self.tensorboard and self.accelerator.is_main_process:
            writer = self.accelerator.get_tracker("tensorboard").writer
            writer.add_image(name, np.asarray(Image.open(picture)), step, dataformats="HWC")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that a continued run will take again, and a line that was cut off."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        kept = [line for line in self.lines() if line["step"] <= step]
        beside = self.path.with_suffix(".writing")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        beside.replace(self.path)

    def lines(self) -> list[dict]:
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:  # the run was killed while it wrote this one
                continue
        return found
