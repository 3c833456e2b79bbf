"""Bottlenecks by their `kind` in a configuration."""

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

# kind -> class, or function, that makes a bottleneck from latent_channels and its options by name
BOTTLENECKS = {
    "kl": lambda latent_channels: KLBottleneck(),  # free bits are an option of the loss
    "none": PlainBottleneck,
    "adversarial": AdversarialBottleneck,
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "gumbel": GumbelSoftmax,
}
