"""What a run writes down: metrics.jsonl, TensorBoard, and the sums between two lines of them."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor


class Journal:
    """Scalars are summed on the device and leave it only when a line is written, as means over all ranks."""

    def __init__(self, folder: Path, accelerator: Accelerator, tensorboard: bool):
        self.path, self.accelerator, self.tensorboard = folder / "metrics.jsonl", accelerator, tensorboard
        if tensorboard and accelerator.is_main_process:
            (folder / "logs").mkdir(exist_ok=True)
        accelerator.init_trackers("logs")
        self.start_window(step=0)

    def start_window(self, step: int) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.first_step, self.started = step, time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def close_window(self, step: int) -> tuple[dict[str, float], float]:
        """The means since the window was opened, over all ranks, and the steps a second; opens the next one."""
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        means = self.accelerator.reduce(means, "mean").tolist()
        rate = (step - self.first_step) / (time.perf_counter() - self.started)
        values = dict(zip(self.sums, means, strict=True))
        self.start_window(step)
        return values, rate

    def write(self, step: int, samples: int, values: dict) -> None:
        """A line of metrics.jsonl; numbers go to TensorBoard too."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "samples": samples, **values}) + "\n")
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
