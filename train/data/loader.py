"""`TrainLoader`: batches from worker processes, as float32 on a device; `LoaderFailed` if a worker fails."""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kl_autoencoder.distributed import end_with_the_parent


class LoaderFailed(RuntimeError):
    """Raised when the training data cannot be read any further; the message is one line."""


class TrainLoader:
    """The batches of a `DataLoader`; its workers end with the iteration and with this process, however that ends.

    Any failure in a worker, being killed included, is raised by `next` as LoaderFailed. The other workers are then
    killed: they ignore SIGTERM (see `start_worker`), so multiprocessing would wait for them forever.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device | str = "cpu",
        parts: int = 1,
        lengths: dict[str, int] | None = None,
    ):
        self.loader, self.dataset, self.device = loader, loader.dataset, torch.device(device)
        self.parts = parts  # of a batch; a stream yields one part from each worker
        # Name -> number of records, of the shards of a stream that were read to the end.
        self.lengths = {} if lengths is None else lengths

    def __iter__(self) -> Iterator[dict]:
        others = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(self.loader)
        # torch's handler would raise an error in the middle of a step when a worker dies; without it, `next` raises
        # within 5 seconds.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        # The priority lets this run, at the end of the process, before multiprocessing waits for the workers.
        end = Finalize(None, _kill, args=(workers,), exitpriority=1)
        try:
            while True:
                failure = None
                try:
                    batch = join_parts([next(batches) for _ in range(self.parts)])
                except Exception as error:  # torch raises it if a worker was killed
                    reason = _one_line(error)
                    failure = f"data.num_workers: a worker ended, of too little memory perhaps ({reason})"
                if failure or "failure" in batch:
                    break
                self.lengths.update(batch.pop("lengths", ()))
                yield batch | {"images": self._floats(batch["images"])}
        finally:
            end()
        raise LoaderFailed(failure or batch["failure"])

    def _floats(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 from a worker -> float32 in [-1, 1] on the device, the values of `image_to_tensor`."""
        return images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)


def join_parts(parts: list[dict]) -> dict:
    """Join the parts of a micro-batch in the order of sample numbers, or return the first failure among them."""
    for part in parts:
        if len(parts) == 1 or "failure" in part:
            return part
    numbers = torch.cat([part["sample"] for part in parts])
    order = numbers.argsort()
    images = torch.cat([part["images"] for part in parts if part["images"] is not None])
    joined = {name: [entry for part in parts for entry in part[name]] for name in ("skipped", "lengths")}
    labels = [part["labels"] for part in parts if "labels" in part]
    if labels:
        joined["labels"] = torch.cat(labels)[order]
    return {"images": images[order], "sample": numbers[order], **joined}


def _kill(workers: list[multiprocessing.Process]) -> None:
    for worker in workers:
        worker.kill()


def _one_line(error: BaseException) -> str:
    """The last line of a message that is not blank; torch puts the traceback of the worker before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def start_worker(worker: int) -> None:
    """Prepare worker number `worker`: ignore SIGINT and SIGTERM, which the trainer handles, and end with it."""
    end_with_the_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler signals all processes of a job
        signal.signal(number, signal.SIG_IGN)
