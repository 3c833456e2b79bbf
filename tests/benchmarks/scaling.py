"""How encoding and decoding scale with threads: ours against diffusers' AutoencoderKL.

    python tests/benchmarks/scaling.py --cases decode:256 encode:256 decode:512 encode:512
    python tests/benchmarks/scaling.py --model compact --cases decode:512 --busy
    python tests/benchmarks/scaling.py --profile --cases decode:256

The serial share s comes from the seconds with one and with two threads, T2 / T1 = s + (1 - s) / 2 (Amdahl 1967).
Both are the smallest of all rounds, those that nothing disturbed: whatever else runs for a moment takes one of two
cores from T2 but none from T1, and looks like a serial share. Two idle cores are needed all the same. With --busy
another process computes on one of them meanwhile; seconds are medians then and the share means nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.benchmarks.inference import build, call, example  # noqa: E402

CHANNELS = 4  # of the latents of both models
CONTENDERS = ("diffusers", "ours")
BUSY = "while True: sum(range(10**6))"


@torch.inference_mode()
def measure(model: str, direction: str, size: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds by contender and number of threads, taken in turn."""
    x = example(direction, 1, size, "cpu", torch.float32, CHANNELS)
    models = {name: build(name, "cpu", torch.float32, model) for name in CONTENDERS}
    seconds = {name: {1: [], 2: []} for name in CONTENDERS}
    for number in range(rounds + 1):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, vae in models.items():
                start = time.perf_counter()
                call(vae, direction, x)
                if number:  # the first warms up
                    seconds[name][threads].append(time.perf_counter() - start)
    return seconds


def serial_share(one: float, two: float) -> float:
    return 2 * two / one - 1


def row(case: str, seconds: dict[str, dict[int, list[float]]], typical=min) -> str:
    share, cells = {}, []
    for name in CONTENDERS:
        one, two = (seconds[name][threads] for threads in (1, 2))
        share[name] = serial_share(typical(one), typical(two))
        cells += [f"{typical(one):.3f}", f"{typical(two):.3f}", f"{share[name]:.2f}"]
    best = {name: {n: typical(seconds[name][n]) for n in (1, 2)} for name in CONTENDERS}
    on_16 = {name: best[name][1] * (share[name] + (1 - share[name]) / 16) for name in CONTENDERS}
    faster = [best["diffusers"][n] / best["ours"][n] for n in (1, 2)]
    cells += [f"{ratio:.2f}" for ratio in (*faster, on_16["diffusers"] / on_16["ours"])]
    return f"| {case} | " + " | ".join(cells) + " |"


@torch.inference_mode()
def by_operation(model: str, direction: str, size: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of our execution with one and two threads, by operation; the quickest of `rounds`."""
    vae = build("ours", "cpu", torch.float32, model)
    x = example(direction, 1, size, "cpu", torch.float32, CHANNELS)
    spent: dict[str, list[float]] = {}
    for place, threads in enumerate((1, 2)):
        torch.set_num_threads(threads)
        call(vae, direction, x)
        quickest = min((profiled(vae, direction, x) for _ in range(rounds)), key=lambda one: one["all"])
        for name, milliseconds in quickest.items():
            spent.setdefault(name, [0.0, 0.0])[place] = milliseconds
    return spent


def profiled(vae, direction: str, x: torch.Tensor) -> dict[str, float]:
    """Milliseconds of one call in each operation itself, in all, and outside of operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        call(vae, direction, x)
        wall = 1000 * (time.perf_counter() - start)
    inside = {
        event.key: event.self_cpu_time_total / 1000
        for event in profile.key_averages()
        if event.key.startswith(("aten::", "mkldnn"))
    }
    return {"all": wall, "outside of operations": wall - sum(inside.values()), **inside}


def print_profile(spent: dict[str, list[float]], least: float = 10.0) -> None:
    """A line for each operation that takes over `least` ms more on two threads than half of one thread's time."""
    for name, (one, two) in sorted(spent.items(), key=lambda item: item[1][0] / 2 - item[1][1]):
        if two - one / 2 > least:
            print(f"| {name} | {one:.0f} | {two:.0f} | {two - one / 2:.0f} |")


HEADER = [
    "case",
    *(f"{name}, {what}" for name in CONTENDERS for what in ("1 thread, s", "2 threads, s", "serial share")),
    *("faster, 1 thread", "faster, 2 threads", "faster, 16 threads (Amdahl)"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["decode:256", "encode:256"], metavar="DIRECTION:SIZE")
    parser.add_argument("--model", default="sd", choices=["sd", "compact"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", action="store_true", help="beside a process that computes on one core")
    parser.add_argument("--profile", action="store_true", help="ours by operation, instead of seconds")
    parser.add_argument("-o", "--output", help="a .json that the seconds are added to")
    options = parser.parse_args()
    if options.profile:
        for case in options.cases:
            direction, size = case.split(":")
            print(f"\n| {options.model}, {direction} 1x{size} | 1 thread | 2 threads | beyond half |")
            print_profile(by_operation(options.model, direction, int(size), options.rounds))
        return
    beside = subprocess.Popen([sys.executable, "-c", BUSY]) if options.busy else None
    try:
        print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER))
        for case in options.cases:
            direction, size = case.split(":")
            seconds = measure(options.model, direction, int(size), options.rounds)
            name = f"{options.model}, {direction} 1x{size}" + (", beside a process" if options.busy else "")
            print(row(name, seconds, statistics.median if options.busy else min), flush=True)
            if options.output:
                path = Path(options.output)
                known = json.loads(path.read_text()) if path.exists() else {}
                path.write_text(json.dumps(known | {name: seconds}, indent=1) + "\n")
    finally:
        if beside:
            beside.kill()


if __name__ == "__main__":
    main()
