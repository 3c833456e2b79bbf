"""The command line. `main` is what `kl-autoencoder` runs."""

from .main import main

__all__ = ["main"]
