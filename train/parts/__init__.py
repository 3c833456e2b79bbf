"""Parts of training that a configuration chooses by `kind:`: bottlenecks, views and terms of the objective."""

from . import alignment, bottlenecks, equivariance, rounding, views
from .draws import Draws
from .registry import BOTTLENECKS, TERMS, VIEWS
from .terms import Term

__all__ = [
    "BOTTLENECKS",
    "TERMS",
    "VIEWS",
    "Draws",
    "Term",
    "alignment",
    "bottlenecks",
    "equivariance",
    "rounding",
    "views",
]
