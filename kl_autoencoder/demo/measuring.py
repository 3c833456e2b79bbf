"""What a computation costs: seconds, and the most memory that it held at once."""

import ctypes
import threading
import time
from types import TracebackType

import psutil
import torch

INTERVAL = 0.002  # seconds between two looks at the memory that the process holds


class Meter:
    """`with Meter(device) as meter:` ...; then `meter.seconds` and `meter.peak_bytes`.

    `peak_bytes` is what was held at most beyond what was held before: of torch's allocator on a CUDA device; of the
    process (looked at every two milliseconds) on the CPU; None on other devices.
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
            self._watch = threading.Thread(target=self._look, name="memory", daemon=True)
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

    def _look(self) -> None:
        while True:
            self._most = max(self._most, _held_memory())
            if self._done.wait(INTERVAL):
                return


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc; the names of its fields are those of its manual."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")),
        *((name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _held_memory() -> int:
    """Bytes that the process holds: what glibc has given out, or resident memory where there is no glibc.

    Resident memory is the coarser figure: freed memory that stays resident is used again unseen.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33 and later
    if mallinfo2 is None:
        return psutil.Process().memory_info().rss
    mallinfo2.restype = _MallocInfo
    given_out = mallinfo2()
    return given_out.uordblks + given_out.hblkhd
