"""One training step of ours against the plain reference, in one run, alternating.

    python tests/benchmarks/training.py                      # CPU: kl_f8 on crops of 128, float32
    python tests/benchmarks/training.py --device cuda --resolution 256 --batch 12 --precision bf16

The reference is diffusers' AutoencoderKL as users get it, the lpips package, the same losses on the same batch
with the same noise, torch's AdamW with its defaults, the same autocast. Both take whole steps: forward, losses,
backward, clipping, update, and ours the moving average too. Peak memory is measured apart, each in a process of
its own, weights, optimizer state and (ours) moving average included: the growth of the process from when it had its
first batch on a CPU, torch's count of allocated bytes on a GPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import lpips  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from train.autoencoder.task import AutoencoderTask  # noqa: E402
from train.config import Config, load_config  # noqa: E402
from train.data.training_data import TrainingData  # noqa: E402
from train.loop.trainer import Trainer  # noqa: E402


def config_for(options, folder: str) -> Config:
    overrides = [
        f"output_dir={folder}", "data.train=sample-photographs", "data.validation=sample-photographs",
        f"data.resolution={options.resolution}", f"data.batch_size={options.batch}", "data.num_workers=0",
        f"loss.perceptual.net={options.net}", f"validation.lpips_net={options.net}", "log.tensorboard=false",
        "loss.adversarial.weight=0", f"train.mixed_precision={options.precision}",
        f"train.compile={str(options.compile).lower()}", "log.every=1000000",
    ]  # fmt: skip
    return load_config(ROOT / options.config, overrides)


def a_batch(config: Config) -> tuple[dict, torch.Tensor]:
    """The first batch of a run, and noise for its posteriors."""
    batch = next(iter(TrainingData(config.data, config.seed).loader()))
    levels, side = len(config.model.block_out_channels), config.data.resolution
    shape = (len(batch["images"]), config.model.latent_channels, *[side // 2 ** (levels - 1)] * 2)
    return batch, torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Reference:
    """What a careful user writes with the packages as they are."""

    def __init__(self, config, device: str, precision: str):
        self.config, self.device, self.precision = config, device, precision
        torch.manual_seed(config.seed)
        levels = len(config.model.block_out_channels)
        self.vae = diffusers.AutoencoderKL(
            **config.model.options()
            | {
                "down_block_types": ("DownEncoderBlock2D",) * levels,
                "up_block_types": ("UpDecoderBlock2D",) * levels,
            }
        ).to(device)
        self.lpips = lpips.LPIPS(net=config.loss.perceptual.net, verbose=False).to(device)
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(), options.learning_rate, options.betas, weight_decay=0
        )

    def step(self, images, noise) -> float:
        config, dtype = (
            self.config.loss,
            {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision],
        )
        images, noise = images.to(self.device), noise.to(self.device)
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            posterior = self.vae.encode(images).latent_dist
            reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        pixels = (reconstruction.float() - images).abs().mean()
        perceptual = self.lpips(reconstruction.float(), images).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / images.numel()
        loss = pixels + config.perceptual.weight * perceptual + config.kl.weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), self.config.optimizer.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def timed(device: str, step) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_speed(options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config_for(options, folder), AutoencoderTask)
        batch, noise = a_batch(trainer.config)
        trainer.task.noise = lambda _: noise.to(trainer.run.device)  # the same for both
        reference = Reference(trainer.config, options.device, options.precision)
        reference.vae.load_state_dict(trainer.task.vae.state_dict())
        batches = iter(trainer.loader)
        first = reference.step(batch["images"], noise)
        trainer.train_step([batch])
        ours_first = trainer.journal.close_window(trainer.step)[0]["loss"]
        steps = {
            "reference": lambda: reference.step(batch["images"], noise),
            "ours": lambda: trainer.train_step([batch]),
        }
        for step in steps.values():
            for _ in range(options.warmup):
                timed(options.device, step)
        times = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                times[name].append(timed(options.device, step))
        with FlopCounterMode(display=False) as counter:
            reference.step(batch["images"], noise)
        start = time.perf_counter()
        loaded = sum(len(next(batches)["images"]) for _ in range(max(2, 64 // options.batch)))
        return {
            "seconds": times,
            "first_loss": {"reference": first, "ours": ours_first},
            "flops": counter.get_total_flops(),
            "loader_images_per_second": loaded / (time.perf_counter() - start),
            "matrix_flops_per_second": matrix_rate(options.device, options.precision),
        }


def matrix_rate(device: str, precision: str) -> float:
    """The machine's own measured rate of matrix products of 4096, in the precision of the step."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    rounds = 50 if device == "cuda" else 2
    a @ b
    seconds = timed(device, lambda: [a @ b for _ in range(rounds)])
    return 2 * 4096**3 * rounds / seconds


def measure_memory(options, which: str) -> int:
    """Peak bytes of a step of one contender, in this process alone, its weights and optimizer state included."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(options, folder)
        batch, noise = a_batch(config)
        before = resident("VmRSS")
        if which == "reference":
            reference = Reference(config, options.device, options.precision)
            step = lambda: reference.step(batch["images"], noise)  # noqa: E731
        else:
            trainer = Trainer(config, AutoencoderTask)
            step = lambda: trainer.train_step([batch])  # noqa: E731
        step()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated()
        step()
        return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def report(options, speed: dict, memory: dict[str, int]) -> str:
    medians = {name: statistics.median(times) for name, times in speed["seconds"].items()}
    ratios = [r / o for r, o in zip(speed["seconds"]["reference"], speed["seconds"]["ours"], strict=True)]
    chip = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    rows = [
        f"{options.config}, crops of {options.resolution}, batch {options.batch}, mixed precision "
        f"{options.precision}, LPIPS {options.net}, compile {options.compile}",
        f"{chip}, {torch.get_num_threads()} threads; torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"Python {platform.python_version()}; {date.today()}; `python {' '.join(sys.argv)}`",
        "",
        "| | images/s | step, median (min to max) | peak memory | first loss | of the matrix rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in medians.items():
        spread = f"{min(speed['seconds'][name]):.3f} to {max(speed['seconds'][name]):.3f}"
        used = speed["flops"] / seconds / speed["matrix_flops_per_second"]
        rows.append(
            f"| {name} | {options.batch / seconds:.3g} | {seconds:.3f} s ({spread}) "
            f"| {memory[name] / 2**30:.2f} GiB | {speed['first_loss'][name]:.6f} | {used:.0%} |"
        )
    rows += [
        "",
        f"Ours against the reference: {statistics.median(ratios):.2f}x the images/s "
        f"(pairs {min(ratios):.2f} to {max(ratios):.2f}), {memory['ours'] / memory['reference']:.2f}x the memory. "
        f"{speed['flops'] / 1e12:.2f} TFLOP a step; measured matrix rate "
        f"{speed['matrix_flops_per_second'] / 1e12:.2f} TFLOP/s. "
        f"The loader alone, without workers: {speed['loader_images_per_second']:.0f} images/s.",
    ]
    return "\n".join(rows)


def cpu_name() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/kl_f8.yaml")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--net", default="squeeze", choices=["vgg", "alex", "squeeze"], help="LPIPS backbone")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "-o", "--output", type=Path, help="a name in tests/benchmarks/results, without suffix"
    )
    parser.add_argument("--memory-of", choices=["reference", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options, options.memory_of)))
        return
    memory = {}
    for which in ("reference", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", which]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        memory[which] = json.loads(result.stdout.splitlines()[-1])
    speed = measure_speed(options)
    table = report(options, speed, memory)
    print(table)
    if options.output:
        path = ROOT / "tests/benchmarks/results" / options.output.name
        path.with_suffix(".md").write_text(table + "\n")
        path.with_suffix(".json").write_text(json.dumps(speed | {"memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
