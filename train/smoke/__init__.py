"""Shrink a recipe so that all of its phases run in seconds on a CPU, offline: `python -m train CONFIG --smoke`."""

from .autoencoder import STATISTICS_SAMPLES
from .run import STEPS, replaced, shrink, smoke_run

__all__ = ["STATISTICS_SAMPLES", "STEPS", "replaced", "shrink", "smoke_run"]
