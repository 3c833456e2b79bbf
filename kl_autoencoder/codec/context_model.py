"""The learned entropy model in use: its predictions, the same on any machine, and its file."""

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
from .context_network import ContextNetwork
from .prediction import Pass, Prediction
from .steps import deviations_to_steps, steps_to_deviations
from .tables import PLACE_BITS, SCALES

KEY = "kl_autoencoder.entropy_model"  # metadata key of the file, for the version of the format
VERSION = "1"
MIDDLES_KEY = f"{KEY}.middles"  # "true" or "false", as `ContextNetwork.middles`; files without it mean false
FIVE_KEY = f"{KEY}.five_passes"  # `ContextNetwork.five_passes`; files without it mean 0


class ContextModel:
    """An `EntropyModel` of integer networks (`ContextNetwork`). hash: first bytes of the SHA-256 of its weights.

    Raises ValueError if sums of the network may be too large to be exact. The network is moved to the CPU.
    """

    side = b""

    def __init__(self, network: ContextNetwork):
        network.check_sums()
        self.network = network.cpu().eval().requires_grad_(False)
        self.channels, self.middles = network.channels, network.middles
        self.hash = _hash(integers(network))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ContextModel":
        """Read a file of `save`. Raises FileNotFoundError, and ValueError, which names the file, for any other."""
        path = Path(path)
        try:
            metadata = read_metadata(path)
            if metadata.get(KEY) != VERSION:
                raise ValueError(f"not an entropy model of version {VERSION}")
            tensors, _ = read_tensors(path)
            network = _empty_network(tensors, int(metadata.get(FIVE_KEY, "0")))
            network.middles = metadata.get(MIDDLES_KEY) == "true"
            network.load_state_dict({name: _from_integers(name, t) for name, t in tensors.items()})
            return cls(network)
        except (RuntimeError, KeyError, IndexError) as error:  # names or shapes of tensors do not match
            raise ValueError(f"{path}: not the tensors of an entropy model") from error
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    @classmethod
    def beside(cls, folder: str | os.PathLike) -> "ContextModel | None":
        """Load the entropy model in an autoencoder's folder; None if it has none. Raises the errors of `load`."""
        path = Path(folder, ENTROPY_MODEL)
        return cls.load(path) if path.is_file() else None

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights, as int32, to a .safetensors file, whole or not at all."""
        metadata = {
            KEY: VERSION,
            MIDDLES_KEY: "true" if self.middles else "false",
            FIVE_KEY: str(self.network.five_passes),
        }
        save_tensors(path, integers(self.network), metadata)

    def passes(self, shape: tuple[int, int, int]) -> Iterator[Pass]:
        for number, at in enumerate(self.network.places):
            yield Pass(number, at.channel, at.mask(*shape[1:]).numpy() > 0)

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
    """Compute float32 convolutions in float32 inside: without autocast, and without bfloat16 or TF32 in oneDNN."""
    settings = getattr(torch.backends.mkldnn, "conv", None)  # torch before 2.9 has no such setting
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
    """Weights in units of 2 ** -7 and biases in units of 2 ** -12, rounded: name -> int32 tensor."""
    return {
        name: ((value * (1 << _bits(name))).double() + 0.5).floor().to(torch.int32)
        for name, value in network.state_dict().items()
    }


def _from_integers(name: str, whole: torch.Tensor) -> torch.Tensor:
    """The inverse of `integers` for one tensor."""
    return whole.float() / (1 << _bits(name))


def _bits(name: str) -> int:
    """The unit of a tensor is 2 ** -_bits(name)."""
    return fixed.SUM_BITS if name.endswith(".bias") else fixed.WEIGHT_BITS


def _empty_network(tensors: dict[str, torch.Tensor], five_passes: int) -> ContextNetwork:
    """A network of the shape of `tensors`. Raises ValueError or KeyError for tensors of no such network."""
    width = tensors["passes.0.hidden.weight"].shape[0]
    channels = (len(tensors) // 6 - 3 * five_passes) // 2  # a pass has six tensors
    if not (1 <= width <= 1024 and 1 <= channels <= 256 and 0 <= five_passes <= channels):
        raise ValueError(
            f"an entropy model of {channels} channels, {five_passes} of them in five passes, and {width} features"
        )
    if any(tensor.dtype != torch.int32 for tensor in tensors.values()):
        raise ValueError("not whole numbers")
    return ContextNetwork(channels, width, five_passes=five_passes)


def _hash(tensors: dict[str, torch.Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().astype("<i4").tobytes())
    return digest.digest()[:ENTROPY_BYTES]
