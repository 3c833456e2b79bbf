"""What a run needs beyond accelerate: requests to stop, a lock on its folder, agreement between ranks."""

import fcntl
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

from kl_autoencoder.distributed import launched

# Environment variables by which `accelerate launch` selects engines other than DDP -> the names of these engines.
PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor or context parallelism)",
}
# seconds between two exchanges of requests to stop, and at most so many steps
ASK_EVERY, MOST_STEPS = 1.0, 1000
PATIENCE = 60  # seconds to wait until another run, which may be about to end, releases the folder


def refuse_plugins(environment: Mapping[str, str]) -> None:
    """Raise ValueError if accelerate was told to train by anything but data parallelism (DDP).

    84 M parameters with their moments take 1.3 GB, so there is nothing to shard, and each of these engines would
    replace the parameters that the optimizers already hold. accelerate's torch.compile is refused, too: a compiled
    module cannot compute the double gradient of the R1 penalty.
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
    """A line about the cores that a run on CPUs uses.

    threads: torch threads of a rank. load: the number of runnable processes before the run began.
    """
    line = f"{threads} torch thread{'s' * (threads > 1)} a rank (OMP_NUM_THREADS) on {cores} cores"
    if threads > 1 and load + threads * ranks > cores + 0.5:
        line += (
            f", {min(load, cores):.1f} of which other programs use: OMP_NUM_THREADS=1, or more ranks of one thread "
            "(accelerate launch --cpu --num_processes N), may be faster"
        )
    return line


def lock_folder(folder: Path, say, patience: float = PATIENCE) -> IO:
    """Lock a run's folder until this process ends, however it ends: two runs in it would overwrite each other.

    Returns the lock file, which must stay open. `say` is called with a line if another process has the lock. Raises
    ValueError if it is not released within `patience` seconds, OSError if the folder cannot be written to. On a
    file system without locks, nothing is locked.
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
    """Within `with StopRequest(accelerator) as stop`, SIGTERM and SIGINT (a preempted job, Ctrl-C) request a stop.

    The ranks exchange the signals that they have received, so that all stop after the same step. The exchange is
    over gloo, on the hosts, and so waits for no device. But it waits for the slowest rank; therefore it takes place
    after the first step and then about once in ASK_EVERY seconds, at steps that the ranks agree on.

    A second signal ends the process at once, except under a launcher: a launcher passes on a signal that the
    terminal or the scheduler has already sent to each process, which would count as the second.
    """

    def __init__(self, accelerator):
        self.received, self.group, self.previous = 0, None, {}
        self.next_step = 0  # step of the next exchange between ranks
        self.last_exchange = (0, time.monotonic())  # step and time of the last exchange
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
        """The name of a signal that some rank has received, or None. All ranks must call it, after each step.

        step: how many steps were taken.
        """
        number = self.received
        if self.group is not None:
            if step < self.next_step:
                return None
            number = self._agree(step)
        return signal.Signals(number).name if number else None

    def _agree(self, step: int) -> int:
        """The largest signal number of all ranks (0: none); plans the next exchange by the pace of the slowest."""
        now, (last_step, last_time) = time.monotonic(), self.last_exchange
        pace = (now - last_time) / max(1, step - last_step)  # seconds a step
        here = torch.tensor([self.received, pace], dtype=torch.float64)
        torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX, group=self.group)
        number, pace = here.tolist()
        self.last_exchange = step, now
        self.next_step = step + max(1, min(round(ASK_EVERY / max(pace, 1e-6)), MOST_STEPS))
        return int(number)


class Agreement:
    """Tells all ranks whether a condition holds on any of them, over gloo on the hosts, waiting for no device."""

    def __init__(self, accelerator):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def start(self, here: bool) -> Callable[[], bool]:
        """Start the exchange; returns a function that waits for the answer. All ranks must call both.

        here: whether the condition holds on this rank.
        """
        anywhere, work = torch.tensor(int(here)), None
        if self.group is not None:
            most = torch.distributed.ReduceOp.MAX
            work = torch.distributed.all_reduce(anywhere, most, group=self.group, async_op=True)

        def answer() -> bool:
            if work is not None:
                work.wait()
            return bool(anywhere)

        return answer
