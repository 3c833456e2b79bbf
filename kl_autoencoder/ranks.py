"""Several processes at one task, by accelerate: what all of them are to know."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


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
