"""Run `evaluate` on the small models and photographs of the fixtures `two_models` and `five_photos`."""

from kl_autoencoder.cli.main import main
from tests.conftest import backbone_missing

SIZE = 168  # the least multiple of 8 that MS-SSIM takes
NET = next((net for net in ("alex", "squeeze") if not backbone_missing(net)), None)


def evaluate(models, photos, output, *more):
    paths = [models / name for name in ("first", "second")]
    return main(
        [
            "evaluate", *(f"--model={path}" for path in paths), "--data", str(photos), "--size", str(SIZE),
            "-o", str(output), "--study-images", "2", "--batch-size", "2", "--lpips", NET or "alex", *more,
        ]
    )  # fmt: skip


def evaluate_one(models, photos, output, *more):
    """Evaluate the second model alone, at the least size."""
    few = "--size", "64", "--study-images", "1", "--lpips", NET or "alex"
    paths = f"--model={models / 'second'}", f"--data={photos}", f"--output={output}"
    return main(["evaluate", *paths, *few, *more])
