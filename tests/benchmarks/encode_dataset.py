"""encode-dataset against the encoder alone on tensors that are ready, in images a second, on this machine.

    python tests/benchmarks/encode_dataset.py SOURCE [--model MODEL ...] [--size 256] [--images 64] [--rounds 3]

SOURCE: photographs as JPEG, a folder or parquet. Without --model: a network as the quick start's and Stable
Diffusion's (kl-f8), with random weights. The encoder alone is `vae.encode` on batches of 16; the command is
measured from the first photograph asked for to the last shard written, without the imports and the model's loading.
The two take turns. Prints a line a round, and the medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.data.sources import Keys, open_source
from kl_autoencoder.latents.encode_dataset import CroppedPhotographs, binding, encode
from kl_autoencoder.latents.shard_encoder import EncodeSettings
from kl_autoencoder.latents.shards import ShardFolder

NETWORKS = {
    "quick start": {"block_out_channels": (16, 32, 64, 96), "norm_num_groups": 8},
    "kl-f8": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    photographs = open_source(arguments.source, Keys("source", "column"))
    photographs = photographs.select(range(min(arguments.images, len(photographs))))
    settings = EncodeSettings(arguments.size)
    print(f"{len(photographs)} photographs to {arguments.size}x{arguments.size}, {arguments.device}, "
          f"{torch.get_num_threads()} threads, {arguments.workers} reading processes")  # fmt: skip
    for name, vae in models(arguments.model):
        compare(name, vae.to(arguments.device), photographs, settings, arguments)


def models(names):
    for name in names:
        yield name, load_model(name, "cpu", "float32")
    for name, config in {} if names else NETWORKS.items():
        torch.manual_seed(0)
        yield name, KLAutoencoder(**config).eval().requires_grad_(False)


def compare(name, vae, photographs, settings, arguments) -> None:
    read = CroppedPhotographs(photographs, "image", [(settings.size, settings.size)], settings)
    started = time.perf_counter()
    loaded = [one for i in range(len(photographs)) if "part" in (one := read[0, i])]
    reading = (time.perf_counter() - started) / len(photographs)
    rates = {"encoder": [], "command": []}
    images = torch.stack([one["part"].images for one in loaded])
    encoder_alone(vae, images[:2], settings)  # warms up
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        encoder_alone(vae, images, settings)
        rates["encoder"].append(len(loaded) / (time.perf_counter() - started))
        started = time.perf_counter()
        the_command(vae, photographs, settings, arguments.workers)
        rates["command"].append(len(loaded) / (time.perf_counter() - started))
        encoder, command = (rates[key][-1] for key in rates)
        print(f"  {name}: encoder {encoder:.2f}, command {command:.2f} images/s, {command / encoder:.2f}x")
    ratios = [command / encoder for encoder, command in zip(*rates.values(), strict=True)]
    print(f"{name}: encoder alone {statistics.median(rates['encoder']):.2f} images/s, encode-dataset "
          f"{statistics.median(rates['command']):.2f} images/s, {statistics.median(ratios):.2f}x; "
          f"reading {1000 * reading:.1f} ms of one core an image")  # fmt: skip


def encoder_alone(vae, images, settings) -> None:
    with torch.inference_mode():
        for batch in images.split(settings.batch_size):
            vae.encode(batch.to(vae.device)).latent_dist.parameters.cpu()


def the_command(vae, photographs, settings, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with ShardFolder(Path(folder) / "out", len(photographs), settings.shard_rows) as shards:
            shards.bind(binding(vae, photographs, "image", settings), {})
            assert encode(vae, photographs, "image", shards, settings, num_workers=workers)


if __name__ == "__main__":
    main()
