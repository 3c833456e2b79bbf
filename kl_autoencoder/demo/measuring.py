"""Measure what a computation costs: its seconds and its peak memory."""

import ctypes
import threading
import time
from types import TracebackType

import psutil
import torch

INTERVAL = 0.002  # seconds between two readings of the memory that the process holds


class Meter:
    """Context manager that measures its block: afterwards read `seconds` and `peak_bytes`.

    `peak_bytes` is the peak memory minus the memory at the start: of torch's allocator on a CUDA device, of the
    process, read every two milliseconds, on the CPU. It is None on other devices.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.peak_bytes: int | None = None

    def __enter__(self) -> "Meter":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._done = threading.Event()
            self._before = self._most = _held_memory()
            self._watch = threading.Thread(target=self._watch_memory, name="memory", daemon=True)
            self._watch.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self.device.type == "cpu":
            self._done.set()
            self._watch.join()
            self.peak_bytes = self._most - self._before

    def _watch_memory(self) -> None:
        while True:
            self._most = max(self._most, _held_memory())
            if self._done.wait(INTERVAL):
                return


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc, with its field names."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")),
        *((name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _held_memory() -> int:
    """Bytes that the process holds: those that glibc has allocated, or resident memory on systems without glibc.

    Resident memory is less precise: freed memory may stay resident, and using it again does not show.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33 and later
    if mallinfo2 is None:
        return psutil.Process().memory_info().rss
    mallinfo2.restype = _MallocInfo
    given_out = mallinfo2()
    return given_out.uordblks + given_out.hblkhd
