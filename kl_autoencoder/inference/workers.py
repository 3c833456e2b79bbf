"""Threads that execute pieces at the same time, each with its own CUDA stream.

On a GPU one thread's copies from and to host memory overlap with another's computations. On a CPU a single worker
is used and torch's own threads share each operation: Python threads take turns between these short operations, and
on two idle cores they decoded no faster and encoded an eighth slower. (`latents/shard_encoder.py` gives each thread
its own images, so that the number of threads does not change the result in any bit.)
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch


class Workers:
    """A pool of `count` threads; one worker is the calling thread itself.

    Use: `with Workers(count, device) as workers: workers.run(task, items)`.
    """

    def __init__(self, count: int, device: torch.device):
        self.count, self.device, self.pool = count, device, None
        self.streams = threading.local()

    def __enter__(self) -> "Workers":
        if self.count > 1:
            threads = torch.get_num_threads()
            self.pool = ThreadPoolExecutor(self.count)
            started = threading.Barrier(self.count)
            list(self.pool.map(lambda _: _make_single_threaded(started), range(self.count)))
            torch.set_num_threads(threads)  # restores the setting that threads started later inherit
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def submit(self, task: Callable, *arguments) -> Future:
        """Run task(*arguments) when a thread is free, without gradients; a lone worker runs it at once."""
        if self.pool is None:
            done = Future()
            done.set_result(task(*arguments))
            return done
        inference = torch.is_inference_mode_enabled()  # a setting of the calling thread, as no_grad is

        def one():
            with torch.inference_mode(inference), torch.no_grad(), self.stream():
                return task(*arguments)

        return self.pool.submit(one)

    def run(self, task: Callable, items: Iterable) -> None:
        """Run task(item) for all items, started in order, and wait.

        Raises the exception of the first that fails.
        """
        if self.device.type == "cuda" and self.pool is not None:
            torch.cuda.current_stream(self.device).synchronize()
        for done in [self.submit(task, item) for item in items]:
            done.result()

    @contextmanager
    def stream(self):
        """Compute on the calling thread's own CUDA stream, and wait for it at the end; on a CPU do nothing."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self.streams, "own"):
            self.streams.own = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.streams.own):
            yield
        self.streams.own.synchronize()


def _make_single_threaded(started: threading.Barrier) -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # without this first call, a later one would replace the setting by the process's
    started.wait()
