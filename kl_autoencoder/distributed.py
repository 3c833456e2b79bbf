"""Launch several processes for one task, find their ranks, and exchange results among them.

torch and accelerate are imported where they are needed: a command that runs alone does not wait for them.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from accelerate import PartialState

OTHER_LAUNCHERS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# variables with the rank, the number of ranks, the rank on this machine: of accelerate and torchrun, mpirun, srun
RANKS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def start_all_cpu_processes(module: str, arguments: list[str]) -> None:
    """Become N processes of `python -m module` if this is the only one of `accelerate launch --cpu -n N`.

    On CPUs accelerate starts a single process whatever `--num_processes` says, expecting mpirun to have started
    the rest; a run then trains on one rank and says nothing. Torch's launcher starts them here instead. Returns,
    having done nothing, wherever the number of processes is already right.
    """
    alone = "MASTER_PORT" in os.environ and not any(name in os.environ for name in OTHER_LAUNCHERS)
    if not alone or os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return
    processes = _num_processes(psutil.Process().parent().cmdline())
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *launcher, "-m", module, *arguments])


def _num_processes(command: list[str]) -> int:
    """The --num_processes of an accelerate command line."""
    words = [word for part in command for word in part.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return 1


def launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def share_the_cores() -> None:
    """Let torch's threads sleep after waiting a few microseconds for one another. Call it before torch is imported.

    By default libgomp lets them spin for milliseconds. Where another program uses a core, each of the thousands of
    waits of a training step lasts that long: measured on two cores, 7 to 10 s a step with two threads where one
    alone takes 0.2 s; 0.5 s with this. No result changes. OMP_WAIT_POLICY and GOMP_SPINCOUNT, where the user has
    set them, are left as they are.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def end_with_the_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies (Linux).

    accelerate does not pass signals on: when it is killed, the run would go on, unseen, and write into its folder.
    """
    if launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_the_parent() -> None:
    """End this process, one that multiprocessing started, as soon as its parent ends, however that ends.

    A loader's worker that is handing over an image waits for ever for a parent that was killed, and holds its
    standard output open. The kernel closes the pipe that multiprocessing keeps to each child
    (`Process.sentinel`, the other way round), which a thread waits for here: on every platform, without polling,
    and whichever thread of the parent started this process.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)  # the main thread may be blocked in a write, where no exception reaches it

    threading.Thread(target=watch, name="ends with the parent", daemon=True).start()


def rank_of(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine) by the variables that a launcher sets; (0, 1, 0) without one."""
    for names in RANKS:
        if all(name in environment for name in names):
            return tuple(int(environment[name]) for name in names)
    return 0, 1, 0


def ranks_on_cpus() -> bool:
    """Whether this is one of several processes on a machine without an accelerator.

    accelerate needs to be told (`cpu=True`): else each process that torchrun started takes itself for the only one.
    """
    import torch

    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()


def join(device: str | None = None) -> "PartialState":
    """Join the processes that accelerate or torchrun started; without them, this is the only one.

    Returns `.process_index`, `.num_processes` and `.device`, this rank's own; the CPU if `device` is "cpu".
    """
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or ranks_on_cpus())


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank if any rank raises in the block; a rank alone would leave the others waiting for it.

    The block itself must not wait for other ranks. Ranks that succeeded raise a ValueError naming one that failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = gather([None if failure is None else str(failure) or type(failure).__name__])
    if failure is not None:
        raise failure
    for rank, reason in enumerate(told):
        if reason is not None:
            raise ValueError(f"rank {rank}: {reason}")


def gather(items: list) -> list:
    """Concatenate the lists of all ranks, on every rank; call `join` before. Items must be picklable."""
    from accelerate.utils import gather_object

    return gather_object(items)
