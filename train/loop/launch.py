"""What accelerate leaves out of a run: requests to stop, one run a folder."""

import fcntl
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

from kl_autoencoder.distributed import launched

# what `accelerate launch` sets for what takes the parameters out of the hands of the optimizers that are built here
PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor or context parallelism)",
}
PATIENCE = 60  # seconds that a run which is on its way out may still hold its folder


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


def hold(folder: Path, say, patience: float = PATIENCE) -> IO:
    """Keep a run's folder to this process until it ends, however it ends: two runs would undo each other's work.

    Raises ValueError if another process holds it and does not let go within `patience` seconds, OSError if the
    folder cannot be written to. On a file system without locks nothing is held.
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

    All ranks agree on it after each step, over gloo between the hosts, so that no device is waited for. A second
    signal ends the process at once; but not where there is a launcher, for it passes on the signal that a terminal
    or a scheduler has sent to all processes already.
    """

    def __init__(self, accelerator):
        self.received, self.group, self.previous = 0, None, {}
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

    def requested(self) -> str | None:
        """The name of the signal that any rank has received, or None. All ranks must ask together."""
        number = torch.tensor(self.received)
        if self.group is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        return signal.Signals(int(number)).name if number else None


class Agreement:
    """Asks all ranks whether something is so on any of them, over gloo, so that no device is waited for."""

    def __init__(self, accelerator):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def start(self, here: bool) -> Callable[[], bool]:
        """Begin to ask; all ranks must. The answer is waited for when what is returned is called."""
        anywhere, work = torch.tensor(int(here)), None
        if self.group is not None:
            most = torch.distributed.ReduceOp.MAX
            work = torch.distributed.all_reduce(anywhere, most, group=self.group, async_op=True)

        def answer() -> bool:
            if work is not None:
                work.wait()
            return bool(anywhere)

        return answer
