"""Several processes at one task: how they are started on CPUs, and what all of them are to know."""

import os
import sys
from itertools import pairwise

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

OTHER_LAUNCHERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_all_cpu_processes(module: str, arguments: list[str]) -> None:
    """Become N processes of `python -m module` if this is the only one of `accelerate launch --cpu -n N`.

    On CPUs accelerate starts a single process whatever `--num_processes` says, expecting mpirun to have started
    the rest; it would then do all the work and say nothing. Torch's launcher starts them here instead. Returns,
    having done nothing, wherever the number of processes is already right.
    """
    alone = "MASTER_PORT" in os.environ and not any(name in os.environ for name in OTHER_LAUNCHERS)
    if not alone or os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return
    processes = _asked_for(psutil.Process().parent().cmdline())
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *launcher, "-m", module, *arguments])


def _asked_for(command: list[str]) -> int:
    """The --num_processes of an accelerate command line."""
    words = [word for part in command for word in part.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return 1


def ranks_on_cpus() -> bool:
    """Whether this is one of several processes and there are only CPUs.

    accelerate must be told: else each process that torchrun started on CPUs is alone, and all do the same.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def join(device: str | None = None) -> PartialState:
    """This process's place among those that accelerate or torchrun started: alone, if they did not.

    `.process_index`, `.num_processes`, and `.device`, which is the rank's own; the CPU if `device` says so.
    """
    return PartialState(cpu=device == "cpu" or ranks_on_cpus())


def gather(items: list) -> list:
    """The lists of all ranks one after another, on every rank, after `join`. Anything that can be pickled."""
    return gather_object(items)
