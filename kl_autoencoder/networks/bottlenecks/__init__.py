"""Bottlenecks by the name that a configuration has for them."""

from .base import Bottleneck, Code, Discrete, PointPosterior, code_facts
from .fsq import FiniteScalarQuantizer
from .gumbel import GumbelSoftmax
from .kl import KLBottleneck, kl_per_dimension, posterior_summary
from .plain import AdversarialBottleneck, PlainBottleneck
from .vq import VectorQuantizer

__all__ = [
    "BOTTLENECKS",
    "AdversarialBottleneck",
    "Bottleneck",
    "Code",
    "Discrete",
    "FiniteScalarQuantizer",
    "GumbelSoftmax",
    "KLBottleneck",
    "PlainBottleneck",
    "PointPosterior",
    "VectorQuantizer",
    "code_facts",
    "kl_per_dimension",
    "posterior_summary",
]

# kind -> a bottleneck for so many latent channels, with options by name
BOTTLENECKS = {
    "kl": lambda latent_channels: KLBottleneck(),  # its free bits are the loss's
    "none": PlainBottleneck,
    "adversarial": AdversarialBottleneck,
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "gumbel": GumbelSoftmax,
}
