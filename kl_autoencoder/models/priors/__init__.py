"""Models of what an autoencoder's codes are like: what is drawn from them decodes to new images."""

from .code_prior import CodePrior

__all__ = ["CodePrior"]
