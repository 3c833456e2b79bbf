"""Real processes that start in a tenth of a second: forked from one that has imported everything already.

Each can be killed, signalled and joined to others over gloo as a process of `python -m train` can. What it prints
goes to a file.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path

from tests.conftest import ROOT

PATIENCE = 240  # seconds after which a process counts as hanging; nothing here is a measure of speed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.train.test_checkpoint",
        "tests.train.test_adversarial",
        "tests.train.test_safe_numbers",
        "tests.latents.test_encode_dataset",
        "torch._inductor.compile_fx",  # and networkx: what the first torch.compile imports, with any backend
        "networkx",
    ]
)


def start(log: Path, function: Callable, *arguments, **environment: str) -> multiprocessing.Process:
    """A process that runs `function`, of a module's top level, and exits with what it returns."""
    ours = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    forkserver.ensure_running()  # inherits these
    os.environ |= {name: value for name, value in ours.items() if value is not None}
    for name in [name for name, value in ours.items() if value is None]:
        del os.environ[name]
    process = _context.Process(target=_run, args=(str(log), environment, function, arguments))
    process.start()
    return process


def _run(log: str, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    # as at a terminal: of what runs in the background a shell has SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # its workers, as those of a program that was not forked
    sys.exit(function(*arguments))


def finish(*processes: multiprocessing.Process) -> list[int]:
    """Wait for their ends; returns the exit codes, -9 for one killed by SIGKILL."""
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def wait_until(condition: Callable[[], bool], process: multiprocessing.Process | subprocess.Popen) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended = (
            process.poll() is not None if isinstance(process, subprocess.Popen) else not process.is_alive()
        )
        if ended:
            return bool(condition())
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)
    return True


def start_ranks(number: int, log: Path, function: Callable, *arguments) -> list[multiprocessing.Process]:
    """`number` processes that find each other over gloo, as torchrun starts them; the last to end wrote all."""
    [port] = free_ports(1)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number),
              "LOCAL_WORLD_SIZE": str(number)}  # fmt: skip
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [start(log, function, *arguments, **common, **rank) for rank in ranks]


def free_ports(number: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
