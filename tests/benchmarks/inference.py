"""Encoding and decoding: diffusers' autoencoders as they are, after `optimize`, and their convolutions alone.

    python tests/benchmarks/inference.py -o tests/benchmarks/results/inference-cpu
    python tests/benchmarks/inference.py --quick
    python tests/benchmarks/inference.py --model flux2-small --cases 1x512 --contenders diffusers torch.compile ours
    python tests/benchmarks/inference.py --device cuda --dtypes bfloat16 --cases 1x1024 1x2048 8x1024

A published network (--model) with random weights, the same for everybody, or the model in the package. In one
process, in turn (A B C A B C ...):

- diffusers: its class as users get it, one moved to channels_last, and if asked for (--contenders) one whose
  encoder and decoder are compiled by torch.compile;
- ours: the same class after optimize(), without and with tiling, and if asked for (compiled) ours, KLAutoencoder or
  KLAutoencoderFlux2, after compile_for_inference();
- floor: the network's convolutions, linear layers and attention as torch has them, on tensors of the right shapes
  in channels_last, and nothing else.

A ratio is the median of those of the single rounds; with it, the smallest and the largest. Memory is what a process
of its own (on a GPU: torch) holds at most above the weights during one call, result included. Differences are
relative to the range of diffusers' output in float32.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, AutoencoderKLFlux2  # noqa: E402

from kl_autoencoder import optimize  # noqa: E402
from kl_autoencoder.models.autoencoder_kl import ExactAutoencoder  # noqa: E402
from kl_autoencoder.models.classes import CLASSES  # noqa: E402
from kl_autoencoder.models.packaged import COMPACT  # noqa: E402
from tests.published import PUBLISHED, PUBLISHED_FLUX2  # noqa: E402

CONTENDERS = ("diffusers", "channels_last", "torch.compile", "ours", "tiled", "compiled", "floor")
WITH_MEMORY = ("diffusers", "channels_last", "torch.compile", "ours", "tiled")
MODELS = ("sd", "sdxl", "sd3", "flux", *PUBLISHED_FLUX2, "compact")


def reference(device: str, dtype: torch.dtype, model: str = "sd") -> AutoencoderKL | AutoencoderKLFlux2:
    torch.manual_seed(0)
    if model == "compact":
        vae = AutoencoderKL.from_pretrained(COMPACT, torch_dtype=dtype)
    elif model in PUBLISHED_FLUX2:
        vae = AutoencoderKLFlux2(**PUBLISHED_FLUX2[model])
    else:
        vae = AutoencoderKL(**PUBLISHED[model])
    return vae.eval().to(device=device, dtype=dtype)


def build(name: str, device: str, dtype: torch.dtype, model: str = "sd"):
    """vae for a contender's name; the floor is made from ours."""
    vae = reference(device, dtype, model)
    if name == "channels_last":
        return vae.to(memory_format=torch.channels_last)
    if name == "torch.compile":
        vae.encoder.compile()
        vae.decoder.compile()
    if name in ("diffusers", "torch.compile"):
        return vae
    if name in ("ours", "tiled"):
        return optimize(vae, tiling=name == "tiled")
    ours = CLASSES[type(vae).__name__].from_diffusers(vae)
    if name == "compiled":
        ours.compile_for_inference()
    return ours


def example(
    direction: str, batch: int, size: int, device: str, dtype: torch.dtype, channels: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if direction == "decode":
        x = torch.randn(batch, channels, size // 8, size // 8, generator=generator)
    else:
        x = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return x.to(device=device, dtype=dtype)


def call(vae, direction: str, x: torch.Tensor) -> torch.Tensor:
    return vae.decode(x).sample if direction == "decode" else vae.encode(x).latent_dist.parameters


class Floor:
    """The layers of a network that multiply, one after the other, on zeros of the shapes that they get."""

    def __init__(self, vae: ExactAutoencoder, direction: str, x: torch.Tensor):
        network = vae.decoder if direction == "decode" else vae.encoder
        self.steps = []
        twin = type(vae).from_config(vae.config).to("meta")
        twin = twin.decoder if direction == "decode" else twin.encoder
        layers = dict(network.named_modules())
        for name, module in twin.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(self.record(layers[name]))
        twin(x.to("meta", torch.float32))
        self.inputs = {
            shape: self.channels_last(torch.zeros(shape, device=x.device, dtype=x.dtype))
            for shape in {shape for _, shape in self.steps}
        }
        self.weights = [self.channels_last(layer.weight) for layer, _ in self.steps]

    def record(self, layer):
        return lambda module, args, out: self.steps.append((layer, tuple(args[0].shape)))

    @staticmethod
    def channels_last(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def __call__(self) -> None:
        queries = 0
        for (layer, shape), weight in zip(self.steps, self.weights, strict=True):
            x = self.inputs[shape]
            if isinstance(layer, torch.nn.Conv2d):
                F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
                continue
            F.linear(x, weight, layer.bias)
            queries += 1
            if queries % 4 == 3:  # to_q, to_k, to_v, then attention, then to_out
                F.scaled_dot_product_attention(x, x, x)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, function, clock=time.perf_counter) -> float:
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


@torch.inference_mode()
def measure_speed(options, direction: str, batch: int, size: int, dtype: torch.dtype) -> dict:
    channels = latent_channels(options.model)
    x = example(direction, batch, size, options.device, dtype, channels)
    small = example(direction, 1, 64, options.device, dtype, channels)
    runs, outputs = {}, {}
    for name in options.contenders:
        vae = build(name, options.device, dtype, options.model)
        if name == "floor":
            runs[name] = Floor(vae, direction, x)
            continue
        call(vae, direction, x if name in ("compiled", "torch.compile") else small)
        runs[name] = lambda vae=vae, name=name: outputs.update({name: call(vae, direction, x)})
    rounds = max(2, round(options.rounds * min(1, 512**2 / (batch * size**2)))) if options.rounds > 1 else 1
    seconds = {name: [] for name in runs}
    for warming in (True, False) if options.device == "cuda" else (False,):
        for _ in range(rounds):
            for name, run in runs.items():
                outputs.pop(name, None)
                elapsed = timed(
                    options.device, run, time.process_time if options.cpu_time else time.perf_counter
                )
                if not warming:
                    seconds[name].append(elapsed)
    worth_it = options.device == "cuda" or batch * size**2 <= 512**2  # another float32 run
    return {"seconds": seconds, "accuracy": accuracy(options, direction, x if worth_it else None, outputs)}


def latent_channels(model: str) -> int:
    published = PUBLISHED | PUBLISHED_FLUX2
    return published[model]["latent_channels"] if model in published else 4


def accuracy(options, direction: str, x: torch.Tensor | None, outputs: dict) -> dict:
    """Largest differences from diffusers; in half precision also everybody's rms difference from float32."""
    theirs = outputs["diffusers"].float()
    spread = (theirs.max() - theirs.min()).item()
    found = {
        f"{name} max": (outputs[name].float() - theirs).abs().max().item() / spread
        for name in ("channels_last", "torch.compile", "ours", "tiled", "compiled")
        if name in outputs
    }
    if x is not None and x.dtype != torch.float32:
        truth = call(reference(options.device, torch.float32, options.model), direction, x.float())
        for name, output in outputs.items():
            found[f"{name} rms"] = (output.float() - truth).square().mean().sqrt().item() / spread
    return found


@torch.inference_mode()
def measure_memory(options, name: str, direction: str, batch: int, size: int, dtype: torch.dtype) -> dict:
    """Runs in a process of its own."""
    device = options.device
    vae = build(name, device, dtype, options.model)
    channels = latent_channels(options.model)
    x = example(direction, batch, size, device, dtype, channels)
    call(vae, direction, x if name == "torch.compile" else example(direction, 1, 64, device, dtype, channels))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
        before = resident("VmRSS")
    seconds = timed(device, lambda: call(vae, direction, x))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return {"bytes": peak - before, "seconds": seconds}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory_of(name: str, options, direction: str, batch: int, size: int, dtype: str) -> dict:
    arguments = [name, direction, str(batch), str(size), dtype]
    setting = ["--device", options.device, "--model", options.model]
    command = [sys.executable, __file__, *setting, "--memory-of", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        killed = "ran out of memory" if done.returncode < 0 or "memory" in done.stderr else done.stderr[-300:]
        return {"bytes": None, "failed": killed}
    return json.loads(done.stdout.splitlines()[-1])


def ratio(above: list[float], below: list[float]) -> str:
    each = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def row(case: dict) -> str:
    seconds, memory, accuracy = case.get("seconds", {}), case["memory"], case.get("accuracy", {})

    def median(name):
        if name in seconds:
            return f"{statistics.median(seconds[name]):.3g}"
        once = memory.get(name, {}).get("seconds")
        return f"{once:.3g}*" if once else "-"

    def faster(name, than):
        return ratio(seconds[than], seconds[name]) if name in seconds and than in seconds else "-"

    def held(name):
        amount = memory.get(name, {}).get("bytes")
        return memory.get(name, {}).get("failed", "-") if amount is None else f"{amount / 2**20:.0f}"

    differences = [f"{accuracy[k]:.1e}" for k in ("ours max", "tiled max") if k in accuracy]
    if "ours rms" in accuracy:
        differences.append(f"rms {accuracy['ours rms']:.1e}, diffusers' {accuracy['diffusers rms']:.1e}")
    cells = [
        f"{case['direction']} {case['batch']}x{case['size']} {case['dtype']}",
        *(median(name) for name in CONTENDERS),
        *(faster("ours", "diffusers"), faster("tiled", "diffusers")),
        *(faster("ours", "channels_last"), faster("ours", "torch.compile")),
        faster("floor", "ours"),
        *(held(name) for name in WITH_MEMORY),
        "; ".join(differences) or "-",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = [
    "case",
    *(f"{name}, s" for name in CONTENDERS),
    *("ours faster", "tiled faster", "than channels_last", "than torch.compile", "ours / floor"),
    *(f"{name}, MiB" for name in WITH_MEMORY),
    "largest difference: ours; tiled",
]


def table(results: dict) -> str:
    about = results["about"]
    lines = [
        f"`{about['command']}`",
        "",
        ", ".join(f"{key} {value}" for key, value in about.items() if key != "command"),
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" * len(HEADER),
        *(row(case) for case in results["cases"]),
        "",
        "`*`: one run, in the process that measures memory. rms: against float32.",
    ]
    return "\n".join(lines) + "\n"


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def about(options) -> dict:
    return {
        "command": shlex.join(["python", "tests/benchmarks/inference.py", *sys.argv[1:]]),
        "processor": processor(options.device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def write(results: dict, output: str | None) -> None:
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        Path(output).with_suffix(".md").write_text(table(results))


def parsed_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = ["1x256", "8x256", "1x512", "1x1024"]
    parser.add_argument("--cases", nargs="*", default=cases, metavar="BATCHxSIZE")
    parser.add_argument("--memory-cases", nargs="*", default=["1x2048"], help="too large to be timed in turn")
    parser.add_argument("--directions", nargs="+", default=["decode", "encode"], choices=["decode", "encode"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default="sd", choices=MODELS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    usual = [name for name in CONTENDERS if "compile" not in name]  # which takes minutes on a CPU
    parser.add_argument("--contenders", nargs="+", default=usual, choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5, help="at 512x512; fewer, but two, for larger sizes")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count seconds of the processor, for a machine that others use too (with OMP_NUM_THREADS=1)",
    )
    parser.add_argument("--skip-memory", action="store_true", help="of the cases that are timed in turn")
    parser.add_argument("--quick", action="store_true", help="a look at whether it all runs: 1x64, one round")
    parser.add_argument("-o", "--output", help="where to write a .md and a .json")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.cases, options.memory_cases, options.rounds = ["1x64"], [], 1
    return options


def main() -> None:
    options = parsed_arguments()
    if options.memory_of:
        name, direction, batch, size, dtype = options.memory_of
        found = measure_memory(options, name, direction, int(batch), int(size), getattr(torch, dtype))
        print(json.dumps(found))
        return
    results = {"about": about(options), "cases": []}
    cases = [(case, True) for case in options.cases] + [(case, False) for case in options.memory_cases]
    for dtype in options.dtypes:
        for case, in_turn in cases:
            batch, size = map(int, case.split("x"))
            for direction in options.directions:
                found = {"direction": direction, "batch": batch, "size": size, "dtype": dtype}
                measured = () if in_turn and options.skip_memory else WITH_MEMORY
                found["memory"] = {
                    name: memory_of(name, options, direction, batch, size, dtype)
                    for name in measured
                    if name in options.contenders
                }
                if in_turn:
                    found |= measure_speed(options, direction, batch, size, getattr(torch, dtype))
                results["cases"].append(found)
                print(row(found), flush=True)
                write(results, options.output)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
