"""Start real processes in a tenth of a second, by forking one that has already imported everything.

They can be killed, signalled and joined over gloo like processes of `python -m train`. They print to a log file.
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
    """Start a process that runs `function(*arguments)` and exits with what that returns.

    Args:
        log: the file that standard output and error are appended to.
        function: one of a module's top level, since it is pickled by name.
        environment: variables that only this process has.
    """
    ours = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    forkserver.ensure_running()  # the server inherits these variables
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
    # as in a terminal: a shell lets its background jobs ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # data-loader workers start as in a program that was not forked itself
    multiprocessing.set_start_method("fork", force=True)
    sys.exit(function(*arguments))


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a new interpreter, in the project's folder; what it prints is kept as text."""
    command, variables = [sys.executable, "-c", program], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=PATIENCE)


def finish(*processes: multiprocessing.Process) -> list[int]:
    """Wait until all have ended and return their exit codes, -9 for one killed by SIGKILL."""
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
    """Wait until the condition is true or the process has ended; return whether the condition came true."""
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
    """Start `number` ranks with torchrun's variables, by which they find each other over gloo; one log for all."""
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
