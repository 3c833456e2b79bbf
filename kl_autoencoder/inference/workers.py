"""Threads that execute pieces at the same time, each on a CUDA stream of its own.

So one's copies from and to host memory run beside another's computations. On a CPU torch's own threads share each
operation instead: on two idle cores Python threads, which take turns in Python between these short operations,
decoded no faster and encoded an eighth slower. (`latent_rows` gives each thread an image of its own, so that the
number of threads changes no bit of the result.)
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch


class Workers:
    """`with Workers(n, device) as workers: workers.run(task, items)`; one worker is the calling thread itself."""

    def __init__(self, count: int, device: torch.device):
        self.count, self.device, self.pool = count, device, None
        self.streams = threading.local()

    def __enter__(self) -> "Workers":
        if self.count > 1:
            threads = torch.get_num_threads()
            self.pool = ThreadPoolExecutor(self.count)
            started = threading.Barrier(self.count)
            list(self.pool.map(lambda _: _make_single_threaded(started), range(self.count)))
            torch.set_num_threads(threads)  # a thread's own setting, but also what later threads start with
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def submit(self, task: Callable, *arguments) -> Future:
        """Run task(*arguments) as soon as a thread is free; a lone worker, the calling thread, runs it at once."""
        if self.pool is None:
            done = Future()
            done.set_result(task(*arguments))
            return done
        inference = torch.is_inference_mode_enabled()  # which, like no_grad, is a thread's own

        def one():
            with torch.inference_mode(inference), torch.no_grad(), self.stream():
                return task(*arguments)

        return self.pool.submit(one)

    def run(self, task: Callable, items: Iterable) -> None:
        """Run task(item) for every item, begun in order. Raises the first exception that one raises."""
        if self.device.type == "cuda" and self.pool is not None:
            torch.cuda.current_stream(self.device).synchronize()
        for done in [self.submit(task, item) for item in items]:
            done.result()

    @contextmanager
    def stream(self):
        """The calling thread's stream, and at the end the wait for what was put on it."""
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
    torch.get_num_threads()  # makes it stick: a thread's first look takes the process's setting over
    started.wait()
