"""The model in the package in every runtime that it can be exported to: milliseconds of each, in one run.

    kl-autoencoder export compact -o programs --torch-export && kl-autoencoder export compact -o graphs --onnx
    python tests/benchmarks/runtimes.py --programs programs --graphs graphs --sizes 256 -o runtimes-cpu
    python tests/benchmarks/runtimes.py --programs programs --graphs graphs --sizes 512 -o runtimes-cpu

In one process, in turn (A B C D A B C D ...), float32 on the CPU, one image, one thread:

- diffusers: its AutoencoderKL as users get it;
- ours: the same after optimize();
- torch.export: the program, loaded from its .pt2 file and run by torch, operator by operator;
- onnxruntime: the graph, with its CPU provider.

A figure is the processor's time (others may use the machine too), the median of the rounds, with the smallest and
the largest. Differences are from diffusers, relative to the range of its output. A second call with the same -o
adds to its tables.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.benchmarks.inference import build, call, example, processor  # noqa: E402

FOLDERS = {"encode": "vae_encoder", "decode": "vae_decoder"}
Run = Callable[[Tensor], Tensor]


def contenders(direction: str, programs: Path, graphs: Path) -> dict[str, Run]:
    """Name -> what computes moments from images, or images from latents, on one thread."""
    theirs, ours = (build(name, "cpu", torch.float32, "compact") for name in ("diffusers", "ours"))
    program = torch.export.load(programs / FOLDERS[direction] / "model.pt2").module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = onnxruntime.InferenceSession(
        graphs / FOLDERS[direction] / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    name = graph.get_inputs()[0].name
    return {
        "diffusers": lambda x: call(theirs, direction, x),
        "ours": lambda x: call(ours, direction, x),
        "torch.export": program,
        "onnxruntime": lambda x: torch.from_numpy(graph.run(None, {name: x.numpy()})[0]),
    }


@torch.no_grad()
def measure(direction: str, size: int, runs: dict[str, Run], rounds: int) -> dict[str, dict]:
    """By contender: milliseconds of every round, and the largest difference from diffusers."""
    x = example(direction, 1, size, "cpu", torch.float32, 4)
    wanted = runs["diffusers"](x)
    scale = wanted.max() - wanted.min()
    found = {
        name: {"ms": [], "difference": float((run(x) - wanted).abs().max() / scale)}
        for name, run in runs.items()
    }
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run(x)
            found[name]["ms"].append(round(1000 * (time.process_time() - start), 2))
    return found


def table(cases: dict[str, dict[str, dict]]) -> str:
    names = list(next(iter(cases.values())))
    lines = [f"| | {' | '.join(names)} | largest differences |", "|---" * (len(names) + 2) + "|"]
    for case, found in sorted(cases.items()):
        cells = [_cell(found[name]["ms"]) for name in names]
        differences = [
            f"{name} {found[name]['difference']:.1e}" for name in names if found[name]["difference"]
        ]
        lines.append(f"| {case} | {' | '.join(cells)} | {', '.join(differences)} |")
    return "\n".join(lines)


def _cell(ms: list[float]) -> str:
    return f"{statistics.median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f})"


def write(output: Path, cases: dict[str, dict[str, dict]]) -> None:
    """Add `cases` to the .json file of `output`, and write the table of all beside it, as .md."""
    file = output.with_suffix(".json")
    held = json.loads(file.read_text()) if file.is_file() else {"commands": [], "cases": {}}
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    held["commands"].append(f"python tests/benchmarks/runtimes.py {shlex.join(words)}")
    held["cases"] |= cases
    versions = (
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    name = processor("cpu").rpartition(",")[0]  # without the number of threads
    held["machine"] = f"{name}; {versions}, Python {platform.python_version()}; {date.today()}"
    file.write_text(json.dumps(held, indent=1) + "\n")
    commands = "\n".join(f"    {command}" for command in held["commands"])
    about = "Milliseconds of the processor, one thread, float32; median of the rounds (smallest-largest)."
    text = f"{commands}\n\n{held['machine']}.\n{about}\n\n"
    output.with_suffix(".md").write_text(text + table(held["cases"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=Path, required=True, help="what export --torch-export wrote")
    parser.add_argument("--graphs", type=Path, required=True, help="what export --onnx wrote")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path, help="add to OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for direction in FOLDERS:
        runs = contenders(direction, arguments.programs, arguments.graphs)
        for size in arguments.sizes:
            cases[f"{direction} 1x{size}"] = measure(direction, size, runs, arguments.rounds)
    print(table(cases))
    if arguments.output:
        write(arguments.output, cases)


if __name__ == "__main__":
    main()
