"""Stop a small run of two ranks at hundreds of random moments, and hold its weights to those of an undisturbed one.

    python -m tests.benchmarks.soak FOLDER -o tests/benchmarks/results/soak.json        # 300 stops
    python -m tests.benchmarks.soak FOLDER --stops 20 --seed 7

The run has everything that a restart could lose: two micro-batches a step, a learned likelihood scale, the
discriminator with its delays, LeCam and R1, a moving average, a cosine. Each stop is one of `STOPS`, at a moment
drawn from all of a life: while it starts, in a step, while a checkpoint is written, while it exports. When a run
comes to its end, every tensor of its last checkpoint and every loss it wrote are compared, and another is begun.
Called again, it goes on counting in FOLDER. Where 64 MB can be mounted as a disk, the full disk is a real one.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from tests.photograph_tiles import write_photographs
from tests.processes import start_ranks
from tests.train.runs import small_config
from tests.train.test_restart import EVERYTHING, assert_same, command, final, records, train
from train.__main__ import STOPPED

RANKS, STEPS, EVERY = 2, 40, 2
STOPS = (
    "kill one rank",
    "kill all",
    "terminate one rank",
    "terminate all",
    "full disk",
    "damaged checkpoint",
)
LAUNCHER = 1.0  # seconds after which a launcher tells the other ranks that one has failed
HANGING = 60.0  # seconds after which a rank that was told counts as hanging
FINE = {0, 1, 2, STOPPED, -signal.SIGKILL, -signal.SIGTERM}


class Soak:
    """The state of the whole test: what was done so far, kept in FOLDER/soak.json after every stop."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.disk, self.log = folder, folder / "disk", folder / "log.txt"
        self.disk.mkdir(parents=True, exist_ok=True)
        self.real_disk = self._mount()
        self.state = {"stops": {}, "completed": 0, "lives": 0, "slowest_end_s": 0.0, "seconds": 0.0}
        if (folder / "soak.json").exists():
            self.state = json.loads((folder / "soak.json").read_text())
        self.rng = random.Random(f"{seed}/{sum(self.state['stops'].values())}")
        self.duration = 4.0  # of a whole life, as measured last

    def _mount(self) -> bool:
        if os.path.ismount(self.disk):
            return True
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(self.disk)]
        return shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode

    # ---------------------------------------------------------------- runs

    def arguments(self, name: str) -> list[str]:
        pictures = self.folder / "photographs"
        if not pictures.exists():
            write_photographs(pictures)
        config = small_config(
            pictures,
            self.disk / name,
            **EVERYTHING,
            train={"steps": STEPS, "gradient_accumulation": 2},
            checkpoint={"every": EVERY, "keep_last": 2},
        )
        return command(config, self.folder / f"{name}.yaml")

    def undisturbed(self) -> Path:
        """The folder of the run that nothing happens to, made where it is missing."""
        kept = self.folder / "undisturbed"
        if not kept.exists():
            began = time.monotonic()
            ranks = start_ranks(RANKS, self.log, train, self.arguments("undisturbed"))
            if self.end(ranks, told=True) != [0] * RANKS:
                raise SystemExit(f"the undisturbed run failed, see {self.log}")
            self.duration = time.monotonic() - began
            shutil.move(self.disk / "undisturbed", kept)
        return kept

    def life(self) -> str | None:
        """Start the run, stop it at a random moment; what was done, or None if it came to its end before."""
        run, kind = self.disk / "run", self.rng.choice(STOPS)
        began, until = time.monotonic(), self.rng.uniform(0, 1.1 * self.duration)
        writing = self.rng.random() < 1 / 3
        ranks = start_ranks(RANKS, self.log, train, self.arguments("run"))
        while time.monotonic() < began + until and any(rank.is_alive() for rank in ranks):
            time.sleep(0.005)
        while writing and all(rank.is_alive() for rank in ranks) and not _half_written(run):
            time.sleep(0.0002)
        if not all(rank.is_alive() for rank in ranks):  # on the way out already
            kind = None
        if kind:
            getattr(self, "do_" + kind.replace(" ", "_"))(ranks, run)
        codes = self.end(ranks, told=kind is None)
        (self.disk / "ballast").unlink(missing_ok=True)
        if kind == "damaged checkpoint":
            self.damage(run)
        self.state["lives"] += 1
        if not set(codes) <= FINE:
            raise SystemExit(f"exit codes {codes} after '{kind}', see {self.log}")
        if codes == [0] * RANKS:
            self.duration = max(0.5 * self.duration, time.monotonic() - began)
            self.compare(run)
        return kind

    def end(self, ranks: list, told: bool) -> list[int]:
        """Wait for all as a launcher does: where one failed, the others are told. A rank that hangs ends it."""
        failed_at, now, last = None, 0.0, time.monotonic()
        while any(rank.is_alive() for rank in ranks):
            moment = time.monotonic()
            # without the time that all of this is suspended
            now, last = now + min(moment - last, 0.1), moment
            if failed_at is None and (not told or any(rank.exitcode for rank in ranks)):
                failed_at = now
            if failed_at is not None and not told and now > failed_at + LAUNCHER:
                told = True
                if any(rank.exitcode for rank in ranks):
                    for rank in ranks:
                        _signal(rank, signal.SIGTERM)
            if now > (failed_at or now) + HANGING:
                for rank in ranks:
                    _signal(rank, signal.SIGABRT)  # faulthandler's traceback, where it is on
                raise SystemExit(f"a rank hangs {HANGING:.0f} s after the other has ended, see {self.log}")
            time.sleep(0.005)
        if failed_at is not None:
            slowest = max(self.state["slowest_end_s"], now - failed_at)
            self.state["slowest_end_s"] = round(slowest, 1)
        return [rank.exitcode for rank in ranks]

    def compare(self, run: Path) -> None:
        """Every tensor, and every loss that was written down."""
        whole = self.undisturbed()
        try:
            assert_same(final(run, STEPS), final(whole, STEPS))
            for key in ("train/loss", "train/discriminator/loss", "samples"):
                assert records(run, key) == records(whole, key), f"{key} differs"
        except AssertionError as error:
            raise SystemExit(f"after {self.state}: {error}") from None
        self.state["completed"] += 1
        shutil.rmtree(run)

    # ---------------------------------------------------------------- stops

    def do_kill_one_rank(self, ranks: list, _run: Path) -> None:
        _signal(self.rng.choice(ranks), signal.SIGKILL)

    def do_kill_all(self, ranks: list, _run: Path) -> None:
        for rank in self.rng.sample(ranks, len(ranks)):
            _signal(rank, signal.SIGKILL)

    def do_terminate_one_rank(self, ranks: list, _run: Path) -> None:
        _signal(self.rng.choice(ranks), signal.SIGTERM)

    def do_terminate_all(self, ranks: list, _run: Path) -> None:
        for rank in ranks:
            _signal(rank, signal.SIGTERM)

    def do_full_disk(self, ranks: list, run: Path) -> None:
        """Full for up to two seconds; then, in half of the cases each, all are killed, or there is room again."""
        self.fill(ranks)
        time.sleep(self.rng.uniform(0, 2))
        if self.rng.random() < 0.5:
            self.do_kill_all(ranks, run)
        elif self.real_disk:
            (self.disk / "ballast").unlink(missing_ok=True)

    def do_damaged_checkpoint(self, ranks: list, run: Path) -> None:
        self.do_kill_all(ranks, run)

    def fill(self, ranks: list) -> None:
        if not self.real_disk:
            for rank in ranks:
                if rank.is_alive():
                    psutil.Process(rank.pid).rlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return
        with (self.disk / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(b"0" * size)
                except OSError:
                    pass

    def damage(self, run: Path) -> None:
        """Cut a file of the newest checkpoint short, or change a byte of it."""
        found = sorted((run / "checkpoints").glob("step-[0-9]*[0-9]"))
        files = sorted(found[-1].iterdir()) if found else []
        if not files:
            return
        path = self.rng.choice(files)
        content = bytearray(path.read_bytes())
        at = self.rng.randrange(max(len(content), 1))
        if content and self.rng.random() < 0.5:
            content[at] ^= 1 << self.rng.randrange(8)
        else:
            del content[at:]
        path.write_bytes(content)

    # ---------------------------------------------------------------- all of it

    def run(self, stops: int) -> dict:
        self.undisturbed()
        done = Counter(self.state["stops"])
        while done.total() < stops:
            began = time.monotonic()
            kind = self.life()
            if kind is not None:
                done[kind] += 1
            self.state["stops"] = dict(done)
            self.state["seconds"] = round(self.state["seconds"] + time.monotonic() - began, 1)
            (self.folder / "soak.json").write_text(json.dumps(self.state, indent=1))
            if self.log.stat().st_size > 10_000_000:
                self.log.unlink()
            if done.total() % 10 == 0 and kind is not None:
                print(f"{done.total()} stops, {self.state['completed']} runs completed", flush=True)
        while self.state["completed"] < 1 or (self.disk / "run").exists():  # the last one comes to its end
            ranks = start_ranks(RANKS, self.log, train, self.arguments("run"))
            if self.end(ranks, told=True) != [0] * RANKS:
                raise SystemExit(f"the last run failed, see {self.log}")
            self.compare(self.disk / "run")
        (self.folder / "soak.json").write_text(json.dumps(self.state, indent=1))
        return self.state


def _half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*.writing"))


def _signal(rank, number: int) -> None:
    if rank.is_alive():
        os.kill(rank.pid, number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the runs; called again with it, the count goes on")
    parser.add_argument("--stops", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    soak = Soak(arguments.folder, arguments.seed)
    try:
        state = soak.run(arguments.stops)
    finally:
        if soak.real_disk:
            subprocess.run(["umount", "--lazy", str(soak.disk)])
    figures = {"torch": torch.__version__, "ranks": RANKS, "steps": STEPS, "checkpoint_every": EVERY,
               "full_disk": "tmpfs" if soak.real_disk else "RLIMIT_FSIZE",
               "stops_in_all": sum(state["stops"].values()), **state,
               "weights": "bit-equal to the undisturbed run's after each completed run"}  # fmt: skip
    print(json.dumps(figures, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
