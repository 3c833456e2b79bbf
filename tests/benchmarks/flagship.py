"""kl_f8.yaml shrunk in width, compiled by inductor, on two ranks, killed twice: is it the undisturbed run?

    python -m tests.benchmarks.flagship

Some 10 minutes on two cores, most of it inductor's. What it compiles is kept in a folder of its own: a
process that was killed while it compiled may have left half of a library in the common one.
"""

import os
import tempfile
import time
from pathlib import Path

from tests import processes
from tests.photograph_tiles import write_photographs
from tests.train.test_flagship import SOURCES, compare


def main() -> None:
    processes.PATIENCE = 3600
    with tempfile.TemporaryDirectory() as kept:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{kept}/inductor"
        photographs = write_photographs(Path(kept) / "photographs")
        for source in SOURCES:
            scratch, started = Path(kept) / source.__name__, time.perf_counter()
            scratch.mkdir()
            compare(source, photographs, scratch, "inductor", kills=(2, 6))
            print(f"{source.__name__}: all weights equal, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
