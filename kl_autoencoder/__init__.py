"""A KL-regularised image autoencoder for latent diffusion. The names below are the public API.

They are imported on first use, so that `kl-autoencoder --help` does not wait for torch.
"""

from importlib import import_module

_HOME = {
    "KLAutoencoder": "autoencoder",
    "DiagonalGaussian": "posterior",
    "load_image": "images",
    "save_image": "images",
    "image_size": "images",
    "LatentDataset": "latent_dataset",
    "SameShape": "latent_dataset",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
