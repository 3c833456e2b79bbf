"""A KL-regularised image autoencoder for latent diffusion. The names below are the public API.

They are imported on first use, so that `kl-autoencoder --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see of them
    from .codec.public import compress, decompress
    from .data.image_io import image_size, load_image, save_image
    from .latents.latent_dataset import LatentDataset, SameShape
    from .models.autoencoder import Autoencoder
    from .models.autoencoder_kl import KLAutoencoder
    from .models.autoencoder_kl_flux2 import KLAutoencoderFlux2
    from .models.optimize import optimize, restore
    from .networks.distributions import DiagonalGaussian

_HOME = {
    "KLAutoencoder": "models.autoencoder_kl",
    "KLAutoencoderFlux2": "models.autoencoder_kl_flux2",
    "Autoencoder": "models.autoencoder",
    "DiagonalGaussian": "networks.distributions",
    "optimize": "models.optimize",
    "restore": "models.optimize",
    "load_image": "data.image_io",
    "save_image": "data.image_io",
    "image_size": "data.image_io",
    "compress": "codec.public",
    "decompress": "codec.public",
    "LatentDataset": "latents.latent_dataset",
    "SameShape": "latents.latent_dataset",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
