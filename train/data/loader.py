"""Batches from worker processes, as float32 on a device; a worker that fails ends them with `LoaderFailed`."""

import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kl_autoencoder.distributed import end_with_the_parent


class LoaderFailed(RuntimeError):
    """The training data cannot be read any further; the message is one line."""


class TrainLoader:
    """The batches of a `DataLoader`, whose workers end with the iteration and with this process, however it ends.

    `next` raises LoaderFailed for any failure in a worker, also if a worker was killed. The other workers are then
    killed: they ignore SIGTERM (see `start_worker`), and multiprocessing would wait for them for ever.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device | str = "cpu",
        parts: int = 1,
        lengths: dict[str, int] | None = None,
    ):
        self.loader, self.dataset, self.device = loader, loader.dataset, torch.device(device)
        self.parts = parts  # how many parts a batch comes in: of a stream one from each worker
        self.lengths = {} if lengths is None else lengths  # of the shards that workers have read to the end

    def __iter__(self) -> Iterator[dict]:
        others = multiprocessing.active_children()
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(self.loader)
        # torch's handler would raise a worker's death in the middle of a step; `next` notices within 5 seconds.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        # The priority lets it run before multiprocessing, at the end of this process, would wait for the workers.
        end = Finalize(None, _kill, args=(workers,), exitpriority=1)
        try:
            while True:
                failure = None
                try:
                    batch = join_parts([next(batches) for _ in range(self.parts)])
                except Exception as error:  # torch's, for a worker that was killed
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
        """uint8 from a worker -> float32 in [-1, 1] on the device, the same values as `image_to_tensor` gives."""
        return images.to(self.device, non_blocking=True).float().div_(127.5).sub_(1)


def join_parts(parts: list[dict]) -> dict:
    """Join the parts of a micro-batch, in the order of its samples; or return the first failure among them."""
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
    """The last line that is not blank: before it torch puts the traceback of the worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def start_worker(worker: int) -> None:
    """Prepare a worker: ignore SIGINT and SIGTERM, which are for the trainer, and end when the trainer ends."""
    end_with_the_parent()
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler signals every process of a job
        signal.signal(number, signal.SIG_IGN)
