"""Memory for inference: touched once, used again.

The first touch of a page can cost as much as convolving what fits into it, so neither scratch buffers nor
activations go back to the system between layers; only what a smaller level will not need again does.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import psutil
import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
ALIGNMENT = 64


class Workspace:
    """Named scratch buffers that grow to the largest shape asked for; a name's next use overwrites the last.

    The tensors are kept too: making one costs as much Python as a small strip takes to compute.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, Tensor] = {}
        self.tensors: dict[str, dict[tuple, Tensor]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = self.tensors.setdefault(name, {})
        tensor = made.get((shape, dtype))
        if tensor is None:
            size = math.prod(shape) * dtype.itemsize
            if name not in self.buffers or len(self.buffers[name]) < size:
                made.clear()
                self.buffers.pop(name, None)  # freed before its successor is made
                self.buffers[name] = torch.empty(size, device=self.device, dtype=torch.uint8)
            made[shape, dtype] = tensor = self.buffers[name][:size].view(dtype).view(shape)
        return tensor

    def drop(self, name: str) -> None:
        """Give the buffer back, if there is one."""
        self.buffers.pop(name, None)
        self.tensors.pop(name, None)


class DeviceMemory:
    """Tensors from torch's allocator, which on a GPU keeps what it is given back."""

    adopts = True  # a tensor made elsewhere is as good

    def __init__(self, device: torch.device):
        self.device = device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def free(self, tensor: Tensor) -> None:
        """Nothing to do: it is free when nobody refers to it."""

    def trim(self, keep: int) -> None:
        """Nothing to do."""


class Arena:
    """Tensors in host memory, allocated and freed by hand: first fit, neighbours merged, grown by chunks."""

    adopts = False

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self.chunks: list[Tensor | None] = []
        self.free_ranges: list[tuple[int, int, int]] = []  # (chunk, start, stop) in bytes, ascending
        self.used: dict[int, tuple[int, int, int]] = {}  # by the tensor's address
        self.lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        with self.lock:
            chunk, start, stop = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
            tensor = self.chunks[chunk][start : start + size].view(dtype).view(shape)
            self.used[tensor.data_ptr()] = (chunk, start, stop)
        return tensor

    def free(self, tensor: Tensor) -> None:
        with self.lock:
            ranges = sorted([*self.free_ranges, self.used.pop(tensor.data_ptr())])
            self.free_ranges = ranges[:1]
            for chunk, start, stop in ranges[1:]:
                before = self.free_ranges[-1]
                if before[0] == chunk and before[2] == start:
                    self.free_ranges[-1] = (chunk, before[1], stop)
                else:
                    self.free_ranges.append((chunk, start, stop))

    def trim(self, keep: int) -> None:
        """Gives unused chunks back to the system, the last first, until no more than `keep` bytes are held."""
        with self.lock:
            held = sum(len(chunk) for chunk in self.chunks if chunk is not None)
            for unused in self.free_ranges[::-1]:
                chunk, start, stop = unused
                if held > keep and (start, stop) == (0, len(self.chunks[chunk])):
                    self.free_ranges.remove(unused)
                    self.chunks[chunk] = None
                    held -= stop

    def _take(self, size: int) -> tuple[int, int, int]:
        for i, (chunk, start, stop) in enumerate(self.free_ranges):
            if stop - start >= size:
                self.free_ranges[i : i + 1] = [(chunk, start + size, stop)] if stop - start > size else []
                return chunk, start, start + size
        chunk = torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        self.chunks.append(chunk)
        self.free_ranges.append((len(self.chunks) - 1, 0, len(chunk)))
        return self._take(size)


GROUPS, MEMBERSHIPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# of a group: its limit, what it uses, and the line of memory.stat that says what of this can be taken back
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total_host_memory() -> int:
    """Bytes that the machine has, and the container or job (its control group) that this process is in may use."""
    return min(psutil.virtual_memory().total, limit_of_control_group())


def available_host_memory() -> int:
    """Bytes that the machine has left, and the container or job (its control group) that this process is in."""
    return min(psutil.virtual_memory().available, available_in_control_group())


def limit_of_control_group(groups: Path = GROUPS, memberships: Path = MEMBERSHIPS) -> float:
    """The most bytes that this process's control group and those around it may use; infinite where nothing limits.

    Args:
        groups: where the control groups are mounted.
        memberships: the lines "number:controllers:path" of this process.
    """
    return min(
        [_limit(folder / most) for folder, (most, *_) in _control_groups(groups, memberships)] or [math.inf]
    )


def available_in_control_group(groups: Path = GROUPS, memberships: Path = MEMBERSHIPS) -> float:
    """Bytes that this process's control group and those around it have left; infinite where nothing limits them.

    What a group uses includes cached files, whose inactive part the system takes back before anything runs out.
    """
    left = [_left_in(folder, *names) for folder, names in _control_groups(groups, memberships)]
    return max(0, min(left or [math.inf]))


def _control_groups(groups: Path, memberships: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's group and of those around it, with the names that their version has.

    Inside a container the group's path is often that of the host, while the mounted folder begins at the group
    itself: what is not there is skipped by whoever reads it.
    """
    for line in memberships.read_text().splitlines() if memberships.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, VERSION_2
        elif "memory" in controllers.split(","):
            root, names = groups / "memory", VERSION_1
        else:
            continue
        folder = root / path.strip("/")
        yield from ((f, names) for f in (folder, *folder.parents) if f == root or root in f.parents)


def _limit(file: Path) -> float:
    try:
        most = file.read_text().strip()
        return math.inf if most == "max" else int(most)
    except (OSError, ValueError):  # the root has no limit; nor has what cannot be read
        return math.inf


def _left_in(folder: Path, limit: str, used: str, inactive: str) -> float:
    most = _limit(folder / limit)
    if most == math.inf:
        return most
    try:
        statistics = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        cached = [int(line[1]) for line in statistics if line[0] == inactive]
        return most - int((folder / used).read_text()) + (cached or [0])[0]
    except (OSError, ValueError, IndexError):
        return math.inf
