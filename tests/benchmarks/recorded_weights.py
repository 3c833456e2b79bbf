"""SHA-256 of the weights after 20 CPU steps of five short runs: a refactor must leave each of them as it is.

    python -m tests.benchmarks.recorded_weights                         # print the hashes
    python -m tests.benchmarks.recorded_weights --compare FILE.json     # ... beside those that FILE recorded

Rounding depends on the processor and on the version of torch, so hashes are compared on one machine: record before
the change, compare after it. The result names both.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1"}  # a sum over two threads is another sum

ROOT = Path(__file__).parents[2]
SMALL = """
output_dir: {folder}
model: {{block_out_channels: [16, 32, 32], layers_per_block: 1, norm_num_groups: 4}}
data: {{train: sample-photographs, validation: sample-photographs, validation_resolution: 64, resolution: 32,
       batch_size: 2, num_workers: 0}}
loss: {{reconstruction: l1, perceptual: {{weight: 0}}}}
train: {{steps: 20}}
validation: {{every: 0}}
checkpoint: {{every: 10, keep_last: 3}}
log: {{tensorboard: false}}
"""
RUNS = {
    "l1": [],
    "gaussian, free bits": ["loss.reconstruction=gaussian", "loss.kl.weight=1", "loss.kl.free_bits=0.1"],
    "perceptual": ["loss.perceptual.weight=1", "loss.perceptual.net=squeeze"],
    "adversarial, accumulation": [
        "train.gradient_accumulation=2", "loss.adversarial.weight=0.5", "loss.adversarial.disc_start=5",
        "loss.adversarial.channels=8", "loss.adversarial.layers=1", "loss.adversarial.lecam_weight=0.01",
        "loss.adversarial.r1_weight=0.1", "loss.adversarial.r1_every=4",
    ],
    "resumed at step 10": [],
}  # fmt: skip


def weights_hash(checkpoint: Path) -> str:
    """The SHA-256 over the trained weights and their moving average."""
    digest = hashlib.sha256()
    for name in ("model", "ema"):
        digest.update((checkpoint / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()


def run(folder: Path, overrides: list[str]) -> None:
    config = folder.with_suffix(".yaml")
    config.write_text(SMALL.format(folder=folder))
    command = [sys.executable, "-m", "train", str(config), *overrides]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stderr}")


def record() -> dict:
    import torch

    hashes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, overrides) in enumerate(RUNS.items()):
            folder = Path(scratch) / f"run{number}"
            run(folder, overrides)
            last = folder / "checkpoints" / "step-000020"
            if "resumed" in name:
                for path in last.iterdir():  # as if the run had ended at step 10
                    path.unlink()
                last.rmdir()
                run(folder, overrides)
            hashes[name] = weights_hash(last)
            print(f"{name:<28}{hashes[name]}", flush=True)
    return {"torch": torch.__version__, "processor": processor(), "sha256": hashes}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for the hashes")
    parser.add_argument("--compare", type=Path, metavar="FILE.json", help="what an earlier call wrote")
    arguments = parser.parse_args()
    found = record()
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.compare:
        return 0
    before = json.loads(arguments.compare.read_text())
    for key in ("torch", "processor"):
        if before[key] != found[key]:
            print(
                f"recorded with {key} {before[key]}, now {found[key]}: the hashes may differ for that alone"
            )
    changed = [name for name, value in found["sha256"].items() if before["sha256"].get(name) != value]
    print("changed: " + ", ".join(changed) if changed else "all as recorded")
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
