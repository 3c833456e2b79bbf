"""Parts of the package that are installed only where they are asked for: `pip install "kl-autoencoder[eval]"`."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# What an extra of pyproject.toml installs: the module's name and the package's.
EXTRAS = {
    "codec": {"constriction": "constriction"},
    "eval": {
        "jinja2": "jinja2",
        "lpips": "lpips",
        "matplotlib": "matplotlib",
        "pytorch_msssim": "pytorch-msssim",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "torch_fidelity": "torch-fidelity",
    },
    "demo": {
        "gradio": "gradio",
        "jinja2": "jinja2",
        "lpips": "lpips",
        "skimage": "scikit-image",
    },
    "metrics": {"torchmetrics": "torchmetrics"},
    "onnx": {
        "onnx": "onnx",
        "onnxruntime": "onnxruntime",
        "onnxscript": "onnxscript",
    },
    "train": {
        "lpips": "lpips",
        "pydantic": "pydantic",
        "skimage": "scikit-image",
        "sklearn": "scikit-learn",
        "tensorboard": "tensorboard",
    },
    "alignment": {"transformers": "transformers"},
}


class MissingExtra(ImportError):
    """Packages of an extra of ours are not installed."""

    def __init__(self, extra: str, *packages: str):
        is_not = "is not installed" if len(packages) == 1 else "are not installed"
        super().__init__(
            f"{', '.join(packages)} {is_not}; pip install 'kl-autoencoder[{extra}]' brings what is missing"
        )


def require(extra: str, *modules: str) -> None:
    """Raise MissingExtra if modules of an extra (all of them, or those named) are not there. Imports none."""
    packages = EXTRAS[extra]
    missing = [packages[module] for module in modules or packages if find_spec(module) is None]
    if missing:
        raise MissingExtra(extra, *missing)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn the ModuleNotFoundError of an import in the block into a MissingExtra that names `extra`."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise MissingExtra(extra, EXTRAS[extra].get(name, name)) from error
