"""What a computation costs: seconds, and the most memory that it held at once."""

import ctypes
import threading
import time
from types import TracebackType

import psutil
import torch

INTERVAL = 0.002  # seconds between two looks at the process's memory


class Meter:
    """`with Meter(device) as meter:` ...; then `meter.seconds` and `meter.peak_bytes`.

    `peak_bytes` is what was held at most beyond what was held before: of torch's allocator on a CUDA device; of the
    process (resident memory, looked at every two milliseconds) on the CPU; None on other devices.
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
            _give_back_what_is_free()
            self._process, self._done = psutil.Process(), threading.Event()
            self._before = self._most = self._process.memory_info().rss
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
            self._most = max(self._most, self._process.memory_info().rss)
            if self._done.wait(INTERVAL):
                return


def _give_back_what_is_free() -> None:
    """Return what the C library keeps of freed memory, which would be used again unseen; glibc alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
