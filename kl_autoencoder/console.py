"""What programs say: a mistake in one line, and no traceback where nobody reads on."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .files import one_line
from .progress import write

PROGRAM = "kl-autoencoder"
NOBODY_READS = 141  # as shells have it: 128 + SIGPIPE


def say(kind: str, message: object) -> None:
    """Write one line to stderr, whatever the message: `kl-autoencoder: error: ...`."""
    write(f"{PROGRAM}: {kind}: {one_line(message)}", sys.stderr)


def reader_is_gone() -> bool:
    """Whether standard output leads to a program that has ended, such as `head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def quiet_without_a_reader() -> Iterator[None]:
    """Exit with 141, and say nothing, if the block prints and whatever read the standard output is gone.

    Python would notice some of it when it flushes at its own exit, and print a traceback there.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(NOBODY_READS)
