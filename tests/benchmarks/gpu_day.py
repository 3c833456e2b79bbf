"""Everything that is to be known of one GPU in 25 minutes: is it right, is it fast, and train with what is left.

    python tests/benchmarks/gpu_day.py -o OUT --data FOLDER
    python tests/benchmarks/gpu_day.py -o OUT --rehearse      # the same parts on a CPU, at toy sizes

1. `equality`: each CUDA and Triton path beside a float64 reference and beside diffusers, in float32, bfloat16 and
   float16: in pieces, tiled, offloaded, compiled; the kernels of GroupNorm alone; the gradients of a training step.
2. `inference-*`: tests/benchmarks/inference.py, ratios against diffusers in the same run.
3. `training-*`: tests/benchmarks/training.py, against a plain loop of diffusers and lpips.
4. `recipe` and `compact`: kl_f8 through all of its phases at toy size; the model in the package, trained on.

Each part is a process with a limit of its own. What it prints is OUT/PART.txt; its other files are beside it. The
same command goes on after any cut: parts that ended are not run again. OUT/gpu-day.md says what has been done.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from kl_autoencoder import KLAutoencoder  # noqa: E402
from kl_autoencoder.files import replacing  # noqa: E402
from kl_autoencoder.inference.dispatch import infer_in_pieces  # noqa: E402
from kl_autoencoder.inference.group_norm import Normalization, Statistics  # noqa: E402
from kl_autoencoder.inference.memory import Workspace  # noqa: E402
from kl_autoencoder.networks.bottlenecks import KLBottleneck  # noqa: E402
from tests.benchmarks.inference import call  # noqa: E402
from tests.published import PUBLISHED, reduced  # noqa: E402
from train.autoencoder.model import TrainedModel, choose_backward  # noqa: E402

# Largest relative error ||y - truth|| / ||truth|| of what is right, where diffusers' own is no larger.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
BESIDE_DIFFUSERS = 2.0  # and the most of diffusers' own error


# -------------------------------------------------------------------- the parts


@dataclass(frozen=True)
class Part:
    """A command, how many seconds it may take, and whether SIGTERM after these is its proper end."""

    name: str
    command: list[str]
    seconds: float
    stopped: bool = False


def parts(options) -> list[Part]:
    python = sys.executable
    equality = [python, "tests/benchmarks/gpu_day.py", "--check", "-o", str(options.output)]
    if options.rehearse:
        inference = "--quick --model compact --dtypes float32 --directions decode --contenders diffusers ours"
        training = "--config configs/quickstart.yaml --resolution 32 --batch 2 --rounds 1"
        return [
            Part("equality", [*equality, "--rehearse"], 120),
            Part("inference-float32", _benchmark("inference", options, "inference-float32", inference), 120),
            Part("training", _benchmark("training", options, "", training), 120),
            Part("compact", [python, "-m", "train", "configs/finetune_small.yaml", "--smoke"], 120),
        ]
    sizes = "--device cuda --cases 1x256 1x512 8x512 1x1024 1x2048 --memory-cases 1x4096"
    compiled = "--device cuda --cases 1x512 1x1024 --memory-cases --contenders diffusers ours compiled floor"
    step = "--device cuda --rounds 20 --warmup 3 --net vgg"
    found = [Part("equality", equality, 240)]
    for dtype, seconds in (("bfloat16", 240), ("float16", 180), ("float32", 240)):
        name = f"inference-{dtype}"
        found.append(Part(name, _benchmark("inference", options, name, f"{sizes} --dtypes {dtype}"), seconds))
    name = "inference-compiled"
    found.append(Part(name, _benchmark("inference", options, name, f"{compiled} --dtypes bfloat16"), 240))
    for name, more in (
        ("training-256-float32", "--resolution 256 --batch 4"),
        ("training-256", "--resolution 256 --batch 12 --precision bf16"),
        ("training-512", "--resolution 512 --batch 4 --precision bf16"),
        ("training-256-compiled", "--resolution 256 --batch 12 --precision bf16 --compile"),
    ):
        found.append(Part(name, _benchmark("training", options, "", f"{step} {more}"), 150))
    found.append(Part("recipe", [python, "-m", "train", "configs/kl_f8.yaml", "--smoke"], 120))
    more = f"""output_dir={options.output / "run"} model.pretrained=compact data.train={options.data}
        data.resolution=256 data.batch_size=32 data.num_workers={min(12, os.cpu_count() or 1)} train.steps=100000
        optimizer.learning_rate=2e-4 optimizer.warmup_steps=500 checkpoint.every=500 validation.every=2000"""
    train = [python, "-m", "train", "configs/kl_f8_compact_part3.yaml", *more.split()]
    return [*found, Part("compact", train, float("inf"), stopped=True)]


def _benchmark(script: str, options, output: str, arguments: str) -> list[str]:
    to = ["-o", str(options.output / output)] if output else []
    return [sys.executable, f"tests/benchmarks/{script}.py", *shlex.split(arguments), *to]


def run(part: Part, folder: Path, deadline: float) -> str:
    """How it ended: ended, stopped, cut, failed. What it prints goes to PART.txt as it comes."""
    left = min(part.seconds, deadline - time.monotonic())
    if left <= 0:
        return "not begun"
    # in a session of its own, so that what it started is ended with it
    with (folder / f"{part.name}.txt").open("w") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM if part.stopped else signal.SIGKILL)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return "stopped" if part.stopped else "cut"
    return "ended" if code == 0 else f"failed ({code})"


def day(options) -> bool:
    """Run what has not ended yet, in order; whether everything did."""
    options.output.mkdir(parents=True, exist_ok=True)
    record, deadline = options.output / "gpu-day.json", time.monotonic() + 60 * options.minutes
    done = json.loads(record.read_text())["parts"] if record.exists() else {}
    for part in parts(options):
        if done.get(part.name, {}).get("end") == "ended":
            print(f"{part.name:<24}ended before", flush=True)
            continue
        print(f"{part.name:<24}", end="", flush=True)
        start = time.monotonic()
        end = run(part, options.output, deadline)
        done[part.name] = {"end": end, "seconds": round(time.monotonic() - start, 1), "command": part.command}
        print(f"{end}, {done[part.name]['seconds']:.0f} s", flush=True)
        with replacing(record) as beside:
            beside.write_text(json.dumps({"about": about(), "parts": done}, indent=1) + "\n")
        with replacing(options.output / "gpu-day.md") as beside:
            beside.write_text(summary(options, done))
    return all(part["end"] in ("ended", "stopped") for part in done.values())


def about() -> dict[str, str]:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"card": card, "torch": torch.__version__, "diffusers": diffusers.__version__,
            "python": platform.python_version(), "date": date.today().isoformat()}  # fmt: skip


def summary(options, done: dict) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in about().items()), ""]
    for name, part in done.items():
        command = shlex.join(part["command"]).replace(sys.executable, "python")
        command = command.replace(str(options.output), "OUT")
        lines += [f"## {name}: {part['end']}, {part['seconds']} s", "", f"`{command}`", ""]
        log = options.output / f"{name}.txt"
        text = log.read_text(errors="replace").replace("\r", "\n") if log.exists() else ""
        tail = [line for line in text.splitlines() if line.strip()][-40:]
        lines += [line if line.startswith("|") else f"    {line}" for line in tail] + [""]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------- equality


def error(y: Tensor, truth: Tensor) -> float:
    """Relative: ||y - truth|| / ||truth||; infinite for what is not finite."""
    found = ((y.double() - truth).norm() / truth.norm()).item()
    return found if found == found else float("inf")


def ways(vae: KLAutoencoder, direction: str, rehearse: bool) -> Iterator[tuple[str, Callable]]:
    """Name and function of each way to encode or decode."""

    def in_pieces(x: Tensor, **how) -> Tensor:
        if direction == "encode":
            return vae.quant_conv(infer_in_pieces(vae.encoder, x, **how))
        return infer_in_pieces(vae.decoder, vae.post_quant_conv(x), **how)

    yield "as called", partial(call, vae, direction)
    yield "in pieces", partial(in_pieces, rows=32)
    yield "tiled", partial(in_pieces, least_memory=True)
    yield "offloaded", partial(in_pieces, least_memory=True, offload=True)
    if not rehearse:  # minutes on a CPU
        compiled = deepcopy(vae)
        compiled.compile_for_inference()
        yield "compiled", partial(call, compiled, direction)


@torch.no_grad()
def check_execution(device: str, rehearse: bool) -> Iterator[tuple[str, float, float]]:
    """(what, error, limit) of each way to execute the network, with fresh random numbers."""
    config = reduced(PUBLISHED["sd"]) if rehearse else PUBLISHED["sd"]
    theirs = AutoencoderKL(**config).eval().to(device)
    truth = deepcopy(theirs).double()
    side = 96 if rehearse else 768
    images = torch.rand(2, 3, side, side + 8, device=device) * 2 - 1
    latents = torch.randn(2, 4, side // 8, side // 8 + 1, device=device)
    for dtype in (torch.float32,) if rehearse else ROUNDING:
        vae = KLAutoencoder.from_diffusers(deepcopy(theirs).to(dtype))
        own = deepcopy(theirs).to(dtype)
        for direction, x in (("encode", images.to(dtype)), ("decode", latents.to(dtype))):
            expected = call(truth, direction, x.double())
            of_diffusers = error(call(own, direction, x), expected)
            limit = max(BESIDE_DIFFUSERS * of_diffusers, ROUNDING[dtype])
            yield f"{direction} {dtype}: diffusers", of_diffusers, float("inf")
            for name, function in ways(vae, direction, rehearse):
                yield f"{direction} {dtype}: {name}", error(function(x), expected), limit


@torch.no_grad()
def check_group_norm(device: str) -> Iterator[tuple[str, float, float]]:
    """The kernels of GroupNorm and SiLU alone, on sizes that no block divides, with means far from zero."""
    for dtype in ROUNDING:
        for b, height, width, channels in ((1, 33, 65, 128), (2, 7, 1021, 96), (1, 64, 64, 512)):
            x = (torch.randn(b, height, width, channels, device=device) * 3 + 5).to(dtype)
            residual, out = torch.randn_like(x), torch.full_like(x, float("nan"))
            norm = nn.GroupNorm(32, channels, eps=1e-6).to(device)
            nn.init.normal_(norm.weight)
            y, statistics, work = x.clone(), Statistics(), Workspace(x.device)
            statistics.add_and_measure(0, y, residual, work)
            Normalization(norm, statistics)(y, out, work)
            whole = (x + residual).permute(0, 3, 1, 2).double()
            normal = deepcopy(norm).double()(whole)
            expected = (normal * normal.sigmoid()).permute(0, 2, 3, 1)
            yield f"GroupNorm and SiLU {dtype} {tuple(x.shape)}", error(out, expected), ROUNDING[dtype]


def check_gradients(device: str, rehearse: bool) -> Iterator[tuple[str, float, float]]:
    """All gradients of a training step, each way to recompute and in each precision, against float64."""
    config = reduced(PUBLISHED["sd"])
    start = KLAutoencoder(**config).to(device)
    images = torch.rand(2, 3, 64, 64, device=device) * 2 - 1
    noise = torch.randn(2, 4, 8, 8, device=device)

    def gradients(recompute: str, dtype: torch.dtype | None, compiled: bool = False) -> Tensor:
        vae = deepcopy(start).double() if dtype == torch.float64 else deepcopy(start)
        model = TrainedModel(vae, KLBottleneck(0.0), lambda z, x, draws: (z, x), False, False)
        choose_backward(vae, recompute)
        if compiled:
            model.compile_networks()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device, dtype if half else None, enabled=half):
            output = model(images.to(wide), noise.to(wide))
        (output.images.to(wide) - images).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth = gradients("no", torch.float64)
    for recompute in ("no", "norms", "blocks"):
        yield f"gradients, recompute {recompute}", error(gradients(recompute, None), truth), 1e-4
    yield "gradients, bfloat16", error(gradients("norms", torch.bfloat16), truth), 0.1
    if not rehearse:
        yield "gradients, compiled", error(gradients("norms", None, compiled=True), truth), 1e-4


def check(options) -> bool:
    """Print a line a path; whether all errors are within their limits."""
    device = "cpu" if options.rehearse else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(int(time.time()))  # the same function on any input, not on one
    rows, right = [], True
    small = options.rehearse
    checks = check_group_norm(device), check_execution(device, small), check_gradients(device, small)
    for source in checks:
        for what, found, limit in source:
            good = found <= limit
            right &= good
            rows.append({"what": what, "error": found, "limit": limit, "right": good})
            print(f"{'right' if good else 'WRONG':<7}{found:<10.2e}{limit:<10.2e}{what}", flush=True)
            (options.output / "equality.json").write_text(json.dumps(rows, indent=1) + "\n")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of all results")
    parser.add_argument("--data", default="sample-photographs", help="what compact is trained on")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output = options.output.resolve()
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA device here; allowed: --rehearse")
    return 0 if (check if options.check else day)(options) else 1


if __name__ == "__main__":
    sys.exit(main())
