"""The model in the package: a diffusers VAE folder, its card beside it."""

from pathlib import Path

COMPACT = Path(__file__).parent
