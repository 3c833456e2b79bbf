"""Read batches so that all ranks stop together when one of them cannot read on."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from accelerate.utils import gather_object
from torch.profiler import record_function

from ..data.loader import LoaderFailed
from .launch import Agreement


class AgreedBatches:
    """Reads groups of batches, one group ahead: whether all ranks have it is exchanged while a step is computed.

    on_failure: called on all ranks when one of them cannot read on; it returns the end of the error message.
    """

    def __init__(self, agreement: Agreement, on_failure: Callable[[], str]):
        self.agreement, self.on_failure = agreement, on_failure

    def grouped(self, loader: Iterable[dict], groups: int, size: int) -> Iterator[list[dict]]:
        """Yield `groups` lists of `size` batches from `loader`, each as soon as every rank has read its own.

        If a rank cannot read a list, all ranks raise LoaderFailed after the last list that every rank could read.
        """
        batches = iter(loader)
        ready, failure = _read(batches, size * bool(groups))
        self._end_if_any(failure, self.agreement.start(failure is not None))
        for remaining in reversed(range(groups)):
            ahead, failure = _read(batches, size * bool(remaining))
            failed = self.agreement.start(failure is not None)
            yield ready
            self._end_if_any(failure, failed)
            ready = ahead

    def _end_if_any(self, failure: str | None, failed: Callable[[], bool]) -> None:
        if failed():
            reasons = [reason for reason in gather_object([failure]) if reason]
            raise LoaderFailed(reasons[0] + self.on_failure())


def _read(batches: Iterator[dict], count: int) -> tuple[list[dict], str | None]:
    """Read the next `count` batches; returns (batches, None), or ([], why they cannot be read)."""
    with record_function("data"):
        try:
            return list(islice(batches, count)), None
        except LoaderFailed as error:
            return [], str(error)
