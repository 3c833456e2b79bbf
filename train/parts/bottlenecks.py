"""The bottlenecks that `model.bottleneck.kind` chooses from."""

from typing import Literal

from kl_autoencoder.networks.bottlenecks import KLBottleneck

from ..settings import choice, section
from .registry import BOTTLENECKS


@section
class KLBottleneckConfig:
    """The Gaussian posterior of a VAE; `loss.kl` has its weight."""

    kind: Literal["kl"] = choice("kl", "a diagonal Gaussian")


@BOTTLENECKS.register(KLBottleneckConfig)
def kl(config: KLBottleneckConfig, run) -> KLBottleneck:
    return KLBottleneck(run.loss.kl.free_bits)
