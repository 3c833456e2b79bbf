"""The learned entropy model at work: exact predictions on any machine, and the file that it is kept in."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..files import read_metadata, read_tensors, save_tensors
from ..models.folder import ENTROPY_MODEL
from . import context_network as fixed
from .container import ENTROPY_BYTES
from .context_network import ContextNetwork, checkerboard
from .prediction import Pass, Prediction
from .steps import deviations_to_steps, steps_to_deviations
from .tables import PLACE_BITS, SCALES

KEY = "kl_autoencoder.entropy_model"  # in its metadata: the version of what the numbers mean
VERSION = "1"


class ContextModel:
    """An `EntropyModel` of whole-number networks. hash: the beginning of the SHA-256 of its numbers."""

    side = b""

    def __init__(self, network: ContextNetwork):
        network.check_sums()
        self.network = network.cpu().eval().requires_grad_(False)
        self.channels = network.channels
        self.hash = _hash(integers(network))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ContextModel":
        """Read a file of `save`. Raises FileNotFoundError, or ValueError naming it for anything else."""
        path = Path(path)
        try:
            if read_metadata(path).get(KEY) != VERSION:
                raise ValueError(f"not an entropy model of version {VERSION}")
            tensors, _ = read_tensors(path)
            network = _empty_network(tensors)
            network.load_state_dict({name: _unit(name, t) for name, t in tensors.items()})
            return cls(network)
        except (RuntimeError, KeyError, IndexError) as error:  # of torch, for other tensors
            raise ValueError(f"{path}: not the tensors of an entropy model") from error
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    @classmethod
    def beside(cls, folder: str | os.PathLike) -> "ContextModel | None":
        """The one in the folder of an autoencoder, None if there is none. Raises as `load`."""
        path = Path(folder, ENTROPY_MODEL)
        return cls.load(path) if path.is_file() else None

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole numbers as a .safetensors file, whole or not at all."""
        save_tensors(path, integers(self.network), {KEY: VERSION})

    def passes(self, shape: tuple[int, int, int]) -> Iterator[Pass]:
        first = checkerboard(*shape[1:]).numpy() > 0
        for channel in range(shape[0]):
            yield Pass(2 * channel, channel, first)
            yield Pass(2 * channel + 1, channel, ~first)

    def predict(self, at: Pass, symbols: np.ndarray, quality: int) -> Prediction:
        seen = steps_to_deviations(symbols[: at.channel + 1], quality, fixed.ACTIVATION_BITS)
        seen = seen.clip(-fixed.LARGEST_ACTIVATION, fixed.LARGEST_ACTIVATION)
        context = torch.from_numpy(seen.astype(np.float32))[None]
        with torch.inference_mode(), exact_convolutions():
            mean, scale = self.network.predict(at.number, context, torch.tensor([float(quality)]))
        means = deviations_to_steps(mean[0].numpy(), quality, fixed.MEAN_BITS, PLACE_BITS)
        return Prediction(means, scale[0].clamp(0, SCALES - 1).numpy().astype(np.int64))


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """float32 products are products of float32: no autocast inside, and no oneDNN in bfloat16 or TF32."""
    settings = getattr(torch.backends.mkldnn, "conv", None)  # of torch 2.9 on, which has the choice
    before = settings and settings.fp32_precision
    with torch.autocast("cpu", enabled=False):
        try:
            if settings:
                settings.fp32_precision = "ieee"
            yield
        finally:
            if settings:
                settings.fp32_precision = before


def integers(network: ContextNetwork) -> dict[str, torch.Tensor]:
    """The weights and biases as whole numbers, int32, in the units of their sums."""
    return {
        name: ((value * (1 << _bits(name))).double() + 0.5).floor().to(torch.int32)
        for name, value in network.state_dict().items()
    }


def _unit(name: str, whole: torch.Tensor) -> torch.Tensor:
    return whole.float() / (1 << _bits(name))


def _bits(name: str) -> int:
    return fixed.SUM_BITS if name.endswith(".bias") else fixed.WEIGHT_BITS


def _empty_network(tensors: dict[str, torch.Tensor]) -> ContextNetwork:
    width, channels = tensors["passes.0.hidden.weight"].shape[0], len(tensors) // 12
    if not (1 <= width <= 1024 and 1 <= channels <= 256):
        raise ValueError(f"an entropy model of {channels} channels and {width} features")
    if any(tensor.dtype != torch.int32 for tensor in tensors.values()):
        raise ValueError("not whole numbers")
    return ContextNetwork(channels, width)


def _hash(tensors: dict[str, torch.Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().astype("<i4").tobytes())
    return digest.digest()[:ENTROPY_BYTES]
