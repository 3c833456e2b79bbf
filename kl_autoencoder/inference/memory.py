"""Reusable memory for inference: scratch buffers and activations; and how much host memory there is.

The first access to a page of memory can take as long as a convolution of the values it holds. So scratch buffers
and activations are not returned to the system between layers; only before a smaller level is what it will not need.
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
    """Named scratch buffers, each as large as the largest tensor asked for by its name.

    Tensors of the same name share memory: using the next one overwrites the one before. Tensor objects are cached
    too, since making one takes as long in Python as computing a small strip.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, Tensor] = {}
        self.tensors: dict[str, dict[tuple, Tensor]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor in the buffer `name`, its values undefined; the buffer grows if it is too small."""
        made = self.tensors.setdefault(name, {})
        tensor = made.get((shape, dtype))
        if tensor is None:
            size = math.prod(shape) * dtype.itemsize
            if name not in self.buffers or len(self.buffers[name]) < size:
                made.clear()
                self.buffers.pop(name, None)  # freed before the larger one is allocated
                self.buffers[name] = torch.empty(size, device=self.device, dtype=torch.uint8)
            made[shape, dtype] = tensor = self.buffers[name][:size].view(dtype).view(shape)
        return tensor

    def drop(self, name: str) -> None:
        """Free the buffer `name`, if there is one."""
        self.buffers.pop(name, None)
        self.tensors.pop(name, None)


class DeviceMemory:
    """Memory for strips from torch's allocator, which on a GPU reuses freed memory by itself."""

    adopts = True  # a tensor allocated elsewhere may become a strip, without a copy

    def __init__(self, device: torch.device):
        self.device = device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def free(self, tensor: Tensor) -> None:
        """Do nothing: torch frees the tensor with its last reference."""

    def trim(self, keep: int) -> None:
        """Do nothing: torch manages the memory."""


class Arena:
    """Memory for strips on the host, allocated and freed explicitly: first fit, adjacent free ranges merged.

    It grows by chunks of at least 16 MiB. `pinned`: page-locked memory, for copies to and from a GPU.
    """

    adopts = False

    def __init__(self, pinned: bool = False):
        self.pinned = pinned
        self.chunks: list[Tensor | None] = []
        self.free_ranges: list[tuple[int, int, int]] = []  # (chunk, start, stop) in bytes, ascending
        self.used: dict[int, tuple[int, int, int]] = {}  # address of a tensor -> its range
        self.lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, which stays allocated until `free`."""
        size = math.prod(shape) * dtype.itemsize
        with self.lock:
            chunk, start, stop = self._take(-(-size // ALIGNMENT) * ALIGNMENT)
            tensor = self.chunks[chunk][start : start + size].view(dtype).view(shape)
            self.used[tensor.data_ptr()] = (chunk, start, stop)
        return tensor

    def free(self, tensor: Tensor) -> None:
        """Make the range of a tensor from `empty` available again."""
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
        """Return unused chunks to the system, last ones first, until at most `keep` bytes are held, used or not."""
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
# Names in the folder of a control group: the files of its limit and its usage, and the line of memory.stat with the
# cached file bytes, which count as used but can be reclaimed.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total_host_memory() -> int:
    """Return the bytes of host memory that this process may use: all, or less if its container has a limit."""
    return min(psutil.virtual_memory().total, limit_of_control_group())


def available_host_memory() -> int:
    """Return the bytes of host memory that are free: on the machine, or less by what its container has left."""
    return min(psutil.virtual_memory().available, available_in_control_group())


def limit_of_control_group(groups: Path = GROUPS, memberships: Path = MEMBERSHIPS) -> float:
    """Return the smallest memory limit, in bytes, of this process's control group and its parents; inf without one.

    Args:
        groups: the folder where control groups are mounted.
        memberships: the file that lists this process's groups, in lines "number:controllers:path".
    """
    return min(
        [_limit(folder / most) for folder, (most, *_) in _control_groups(groups, memberships)] or [math.inf]
    )


def available_in_control_group(groups: Path = GROUPS, memberships: Path = MEMBERSHIPS) -> float:
    """Return the bytes that this process's control group and its parents have left; inf without a limit.

    Inactive cached file pages count as left: the system reclaims them before memory runs out. Arguments as in
    `limit_of_control_group`.
    """
    left = [_left_in(folder, *names) for folder, names in _control_groups(groups, memberships)]
    return max(0, min(left or [math.inf]))


def _control_groups(groups: Path, memberships: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of this process's group and its parents, each with the file names of its version.

    Not every folder exists: in a container the path is often the host's, while the mounted folder begins at the
    group itself. Callers skip folders that cannot be read.
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
    """Return the limit that a file of a control group holds, in bytes; inf if there is none."""
    try:
        most = file.read_text().strip()
        return math.inf if most == "max" else int(most)
    except (OSError, ValueError):  # the root has no such file, nor has a folder that does not exist
        return math.inf


def _left_in(folder: Path, limit: str, used: str, inactive: str) -> float:
    """Return the bytes that one control group has left; inf without a limit."""
    most = _limit(folder / limit)
    if most == math.inf:
        return most
    try:
        statistics = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        cached = [int(line[1]) for line in statistics if line[0] == inactive]
        return most - int((folder / used).read_text()) + (cached or [0])[0]
    except (OSError, ValueError, IndexError):
        return math.inf
