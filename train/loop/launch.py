"""What a run needs beyond accelerate: requests to stop, the lock on its folder, agreement of ranks."""

import fcntl
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

from kl_autoencoder.distributed import launched

# `accelerate launch` sets these for engines that replace the parameters after our optimizers were given them
PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor or context parallelism)",
}
ASK_EVERY, MOST_STEPS = 1.0, 1000  # seconds, and most steps, between two exchanges of requests to stop
PATIENCE = 60  # seconds to wait for another run that is about to end to release the folder


def refuse_plugins(environment: Mapping[str, str]) -> None:
    """Raise ValueError where accelerate was told to train by anything but data parallelism (DDP).

    84 M parameters with their moments take 1.3 GB: there is nothing to shard, and each plug-in would replace the
    parameters after the optimizers were given them. A whole-module torch.compile cannot take R1's double gradient.
    """
    for name, plugin in PLUGINS.items():
        if environment.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{plugin} ({name}={environment[name]}): not supported; allowed: `accelerate launch --multi_gpu`, "
                "torchrun, or a single process (an `accelerate config` file may have switched it on)"
            )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", ""):
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend}: not supported; allowed: no, and train.compile=true instead"
        )


def say_threads(threads: int, ranks: int, cores: int, load: float) -> str:
    """A line about the cores that a run on CPUs uses. `load`: runnable processes before it began."""
    line = f"{threads} torch thread{'s' * (threads > 1)} a rank (OMP_NUM_THREADS) on {cores} cores"
    if threads > 1 and load + threads * ranks > cores + 0.5:
        line += (
            f", {min(load, cores):.1f} of which other programs use: OMP_NUM_THREADS=1, or more ranks of one thread "
            "(accelerate launch --cpu --num_processes N), may be faster"
        )
    return line


def hold(folder: Path, say, patience: float = PATIENCE) -> IO:
    """Lock a run's folder until this process ends, however it ends: two runs in it would undo each other's work.

    Raises ValueError if another process has the lock and does not release it within `patience` seconds, OSError if
    the folder cannot be written to. On a file system without locks, nothing is locked.
    """
    file, waiting_since = (folder / ".lock").open("a"), None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError):
            if waiting_since is None:
                waiting_since = time.monotonic()
                say(f"another run is writing to {folder}; waiting for its end")
            if time.monotonic() - waiting_since > patience:
                raise ValueError(
                    f"output_dir: another run is writing to {folder}; allowed: a folder of its own"
                ) from None
            time.sleep(0.2)
        except OSError:
            return file


class StopRequest:
    """`with StopRequest(accelerator) as stop`: SIGTERM or SIGINT (a preempted job, Ctrl-C) is a request to stop.

    The ranks exchange what they have received and all stop after the same step. They do so over gloo, on the hosts,
    so that no device is waited for; since they wait for the slowest rank, only after the first step and then about
    once in ASK_EVERY seconds, at steps that they agree on. A second signal ends the process at once, except under a
    launcher: that passes on a signal which the terminal or scheduler has already sent to every process.
    """

    def __init__(self, accelerator):
        self.received, self.group, self.previous = 0, None, {}
        self.next_step = 0  # of the next exchange between ranks
        self.asked = (0, time.monotonic())  # step and time of the last exchange
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        self.received = number
        if not launched():
            signal.signal(number, signal.SIG_DFL)

    def requested(self, step: int) -> str | None:
        """The name of the signal that any rank has received, or None. All ranks must call it, after each step."""
        number = self.received
        if self.group is not None:
            if step < self.next_step:
                return None
            number = self._agree(step)
        return signal.Signals(number).name if number else None

    def _agree(self, step: int) -> int:
        """The largest signal number of all ranks; sets the step of the next exchange by the pace of the slowest."""
        now, (last_step, last_time) = time.monotonic(), self.asked
        pace = (now - last_time) / max(1, step - last_step)  # seconds a step
        here = torch.tensor([self.received, pace], dtype=torch.float64)
        torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX, group=self.group)
        number, pace = here.tolist()
        self.asked = step, now
        self.next_step = step + max(1, min(round(ASK_EVERY / max(pace, 1e-6)), MOST_STEPS))
        return int(number)


class Agreement:
    """Tells all ranks whether a condition holds on any of them, over gloo, so that no device is waited for."""

    def __init__(self, accelerator):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def start(self, here: bool) -> Callable[[], bool]:
        """Start the exchange; all ranks must call it. The function that is returned waits for the answer."""
        anywhere, work = torch.tensor(int(here)), None
        if self.group is not None:
            most = torch.distributed.ReduceOp.MAX
            work = torch.distributed.all_reduce(anywhere, most, group=self.group, async_op=True)

        def answer() -> bool:
            if work is not None:
                work.wait()
            return bool(anywhere)

        return answer
