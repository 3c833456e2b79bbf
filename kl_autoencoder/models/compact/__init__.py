"""`COMPACT`, the folder of the model that comes with the package, in diffusers' layout, with its card."""

from pathlib import Path

COMPACT = Path(__file__).parent
