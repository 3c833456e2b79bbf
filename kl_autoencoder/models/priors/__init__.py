"""Models of the codes of an autoencoder: codes drawn from them decode to new images."""

from .code_prior import CodePrior

__all__ = ["CodePrior"]
