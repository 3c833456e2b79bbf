"""The codec beside JPEG, WebP, AVIF and JPEG XL: bytes, bits a pixel, PSNR, MS-SSIM, LPIPS (alex), seconds.

    TORCH_HOME=... python -m tests.benchmarks.codec FOLDER [--model MODEL] [-o NAME]

Writes NAME.json, NAME.md and NAME.png. Every codec is measured over a ladder of settings, as means over the images
of the folder; at the codec's own rates the others' values are interpolated linearly in log bytes. BD-rate
(Bjøntegaard 2001, VCEG-M33) is the mean change of log bytes at equal quality over what both curves reach, by cubic
interpolation that stays monotone: -30 % are 30 % fewer bytes. Seconds are the processor's, of one thread.
`--others` takes the other codecs' rows from a file that was written before.
"""

import argparse
import datetime
import io
import json
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.interpolate import PchipInterpolator

from kl_autoencoder.codec import container
from kl_autoencoder.codec.codec import Codec, rounded
from kl_autoencoder.codec.public import codec_of
from kl_autoencoder.data.image_io import image_to_tensor, open_image
from kl_autoencoder.evaluation.metrics import LPIPS, ms_ssim, psnr
from tests.benchmarks.inference import processor

QUALITIES = (7, 12, 16, 24, 34, 41, 48)
OTHERS = {  # Pillow's options; the lowest settings are the smallest files there are
    "AVIF": [{"quality": q, "speed": 4} for q in (0, 5, 10, 12, 15, 18, 20, 22, 25, 27, 30, 33, 35, 40)],
    "JPEG": [{"quality": q, "optimize": True} for q in (1, 5, 12, 25)],
    "WEBP": [{"quality": q, "method": 6} for q in (0, 5, 15, 40)],
    "JXL": [{"quality": q} for q in (1, 10, 25, 45)],
}
METRICS = {"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM", "lpips": "LPIPS (alex)"}
LOWER_IS_BETTER = {"lpips"}
TICKS = (0.05, 0.1, 0.2, 0.4)  # bits a pixel


def measured(image: Image.Image, decoded: Image.Image, lpips: LPIPS) -> dict[str, float]:
    """How alike an image and its decoded version are."""
    original, found = (image_to_tensor(x)[None] for x in (image, decoded))
    with torch.inference_mode():
        values = {
            "psnr": psnr(found, original),
            "ms_ssim": ms_ssim(found, original),
            "lpips": lpips(found, original),
        }
    return {name: value.item() for name, value in values.items()}


def ours(codec: Codec, encoded: "Encoded", quality: int, lpips: LPIPS) -> dict[str, float]:
    start = time.process_time()
    data = codec.packed(encoded.latents, encoded.size, quality)
    middle = time.process_time()
    decoded = codec.decompress(data)
    seconds = {"encode_s": encoded.seconds + middle - start, "decode_s": time.process_time() - middle}
    facts = {"static_bytes": len(Codec(codec.vae, codec.name).packed(encoded.latents, encoded.size, quality))}
    if codec.learned:
        symbols = torch.from_numpy(rounded(encoded.latents, quality))[None].float()
        bits = codec.learned.network(symbols, torch.tensor([float(quality)])).sum()
        facts["cross_entropy_bytes"] = bits.item() / 8
    return {"bytes": len(data), **measured(encoded.image, decoded, lpips), **seconds, **facts}


class Encoded(NamedTuple):
    """An image, its scaled latents and size, and the seconds that the encoder took."""

    image: Image.Image
    latents: torch.Tensor
    size: tuple[int, int]
    seconds: float


def encode(codec: Codec, image: Image.Image) -> Encoded:
    start = time.process_time()
    latents, size = codec.latents(image)
    return Encoded(image, latents, size, time.process_time() - start)


def another(kind: str, image: Image.Image, options: dict, lpips: LPIPS) -> dict[str, float]:
    file, start = io.BytesIO(), time.process_time()
    image.save(file, kind, **options)
    middle = time.process_time()
    decoded = Image.open(file).convert("RGB")
    decoded.load()
    seconds = {"encode_s": middle - start, "decode_s": time.process_time() - middle}
    return {"bytes": len(file.getvalue()), **measured(image, decoded, lpips), **seconds}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def ladder(kind: str, images: list[Image.Image], lpips: LPIPS) -> Iterator[dict]:
    """The means of another codec at each of its settings."""
    for options in OTHERS[kind]:
        yield {
            "setting": options["quality"],
            **mean([another(kind, image, options, lpips) for image in images]),
        }
        print(kind, options, file=sys.stderr, flush=True)


def own_ladder(codec: Codec, images: list[Image.Image], lpips: LPIPS) -> Iterator[dict]:
    encoded = [encode(codec, image) for image in images]
    latents = [one.latents for one in encoded]
    for quality in QUALITIES:
        row = mean([ours(codec, one, quality, lpips) for one in encoded])
        yield {"setting": quality, **row, "pooled_bytes": pooled_bytes(latents, quality)}
        print("ours", quality, file=sys.stderr, flush=True)


def pooled_bytes(latents: list[torch.Tensor], quality: int) -> float:
    """Bytes an image by the best static table of each channel: the distribution of these very latents."""
    symbols = np.concatenate([rounded(one, quality).reshape(one.shape[0], -1) for one in latents], axis=1)
    bits = 0.0
    for channel in symbols:
        counts = np.unique(channel, return_counts=True)[1]
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    return bits / 8 / len(latents)


# ---------------------------------------------------------------- comparing curves


def at_bytes(rows: list[dict], metric: str, size: float) -> float | None:
    """A metric at so many bytes, interpolated in log bytes; None outside of what was measured."""
    points = sorted((row["bytes"], row[metric]) for row in rows)
    sizes, values = zip(*points, strict=True)
    if not sizes[0] <= size <= sizes[-1]:
        return None
    return float(np.interp(np.log(size), np.log(sizes), values))


def bd_rate(rows: list[dict], anchor: list[dict], metric: str) -> float | None:
    """The mean change of bytes at equal quality against `anchor`, as a share; None where the curves do not meet."""
    curves = [_log_rate_of(each, metric) for each in (rows, anchor)]
    low = max(quality[0] for quality, _ in curves)
    high = min(quality[-1] for quality, _ in curves)
    if high <= low:
        return None
    areas = [PchipInterpolator(*curve).integrate(low, high) for curve in curves]
    return float(np.exp((areas[0] - areas[1]) / (high - low)) - 1)


def _log_rate_of(rows: list[dict], metric: str) -> tuple[list[float], list[float]]:
    """Rising quality, and the log of the bytes; points that are no better than a smaller file are left out."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    quality, rate = [], []
    for row in sorted(rows, key=lambda row: row["bytes"]):
        if not quality or sign * row[metric] > quality[-1]:
            quality.append(sign * row[metric])
            rate.append(float(np.log(row["bytes"])))
    return quality, rate


# ---------------------------------------------------------------- what is written


def page(results: dict) -> str:
    rows, pixels = results["rows"], results["pixels"]
    lines = [
        f"# The codec on {results['images']} images, {results['folder']}",
        "",
        f"`{results['command']}`; {results['date']}; {results['processor']}; {results['versions']}.",
        "",
        f"![PSNR, MS-SSIM and LPIPS over bits a pixel](codec-{results['folder']}.png)",
        "",
        "| quality | bytes | bits a pixel | PSNR | MS-SSIM | LPIPS | encode, decode s | "
        + " | ".join(f"LPIPS of {kind}" for kind in rows if kind != "ours")
        + " | PSNR of AVIF |",
        "|" + "---|" * (8 + len(rows) - 1),
    ]
    for row in rows["ours"]:
        beside = [
            _shown(at_bytes(rows[kind], "lpips", row["bytes"]), ".3f") for kind in rows if kind != "ours"
        ]
        beside.append(_shown(at_bytes(rows["AVIF"], "psnr", row["bytes"]), ".2f"))
        lines.append(
            f"| {row['setting']} | {row['bytes']:,.0f} | {8 * row['bytes'] / pixels:.3f} | {row['psnr']:.2f} | "
            f"{row['ms_ssim']:.3f} | {row['lpips']:.3f} | {row['encode_s']:.2f}, {row['decode_s']:.2f} | "
            + " | ".join(beside)
            + " |"
        )
    lines += ["", "Others at equal bytes, interpolated; a dash is outside of what they reach.", ""]
    return (
        "\n".join([*lines, *_entropy_lines(rows["ours"]), *_bd_lines(rows), *_ladder_lines(rows, pixels)])
        + "\n"
    )


def _entropy_lines(rows: list[dict]) -> list[str]:
    lines = [
        "| quality | bytes | over the cross-entropy | fewer than the best static table | "
        "fewer than static tables fitted to each image |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        over = row["bytes"] / row["cross_entropy_bytes"] - 1 if "cross_entropy_bytes" in row else None
        lines.append(
            f"| {row['setting']} | {row['bytes']:,.0f} | {_shown(over, '+.1%')} | "
            f"{1 - row['bytes'] / row['pooled_bytes']:.1%} of {row['pooled_bytes']:,.0f} | "
            f"{1 - row['bytes'] / row['static_bytes']:.1%} of {row['static_bytes']:,.0f} |"
        )
    return [*lines, ""]


def _bd_lines(rows: dict) -> list[str]:
    lines = ["| BD-rate of ours against | in LPIPS | in PSNR | in MS-SSIM |", "|---|---|---|---|"]
    for kind in (kind for kind in rows if kind != "ours"):
        rates = [bd_rate(rows["ours"], rows[kind], metric) for metric in ("lpips", "psnr", "ms_ssim")]
        lines.append(f"| {kind} | " + " | ".join(_shown(rate, "+.0%") for rate in rates) + " |")
    return [*lines, ""]


def _ladder_lines(rows: dict, pixels: float) -> list[str]:
    lines = [
        "| codec, setting | bytes | bits a pixel | PSNR | MS-SSIM | LPIPS | encode, decode s |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in (kind for kind in rows if kind != "ours"):
        for row in rows[kind]:
            lines.append(
                f"| {kind} {row['setting']} | {row['bytes']:,.0f} | {8 * row['bytes'] / pixels:.3f} | "
                f"{row['psnr']:.2f} | {row['ms_ssim']:.3f} | {row['lpips']:.3f} | "
                f"{row['encode_s']:.2f}, {row['decode_s']:.2f} |"
            )
    return lines


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(METRICS), figsize=(13, 4), constrained_layout=True)
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for kind, rows in results["rows"].items():
            rate = [8 * row["bytes"] / results["pixels"] for row in rows]
            style = {"linewidth": 2.5, "color": "black"} if kind == "ours" else {"linewidth": 1.2}
            axis.plot(rate, [row[metric] for row in rows], marker="o", markersize=3, label=kind, **style)
        axis.set(xscale="log", xlabel="bits a pixel", ylabel=label, xlim=(0.04, 0.6))
        axis.set_xticks(TICKS, labels=list(map(str, TICKS)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=90)


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "pillow", "constriction", "pillow-jxl-plugin"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of images of one size")
    parser.add_argument("--model", default="compact-codec")
    parser.add_argument("--others", type=Path, help="a .json whose other codecs are not measured again")
    parser.add_argument("-o", "--output", type=Path, help="without a suffix")
    return parser.parse_args()


def main() -> None:
    options = parsed_arguments()
    torch.set_num_threads(1)
    images = [open_image(path) for path in sorted(options.folder.glob("*.png"))]
    lpips, codec = LPIPS("alex"), codec_of(options.model)
    rows = {"ours": list(own_ladder(codec, images, lpips))}
    if options.others:
        measured_before = json.loads(options.others.read_text())["rows"]
        rows |= {kind: of_kind for kind, of_kind in measured_before.items() if kind != "ours"}
    else:
        rows |= {kind: list(ladder(kind, images, lpips)) for kind in _available()}
    results = {
        "command": f"python -m tests.benchmarks.codec {options.folder.name} --model {Path(options.model).name}",
        "date": str(datetime.date.today()),
        "processor": processor("cpu"),
        "versions": versions(),
        "folder": options.folder.name,
        "images": len(images),
        "pixels": float(np.mean([image.width * image.height for image in images])),
        "format": container.VERSION,
        "rows": rows,
    }
    text = page(results)
    print(text)
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)
        plot(results, options.output.with_suffix(".png"))


def _available() -> list[str]:
    try:
        import pillow_jxl  # noqa: F401  (it makes Pillow know the format)
    except ImportError:
        return [kind for kind in OTHERS if kind != "JXL"]
    return list(OTHERS)


if __name__ == "__main__":
    main()
