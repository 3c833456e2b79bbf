"""The linear Gaussian model, whose marginal likelihood, posterior and best fit (probabilistic PCA) are exact.

z ~ N(0, I), x|z ~ N(W z + mean, variance I). Tipping & Bishop 1999, "Probabilistic principal component analysis";
Lucas et al. 2019, "Don't blame the ELBO! A linear VAE perspective on posterior collapse". All in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


class LinearGaussian(NamedTuple):
    """x = W z + mean + noise with z ~ N(0, I). weight: W (D, C). mean: (D,). variance: of the noise."""

    weight: Tensor
    mean: Tensor
    variance: float

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, (N, D) -> (N,): x ~ N(mean, W W^T + variance I)."""
        noise = self.variance * torch.eye(len(self.mean), dtype=torch.float64)
        return MultivariateNormal(self.mean, self.weight @ self.weight.T + noise).log_prob(x.double())

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p(z|x) = N(M^-1 W^T (x - mean), variance M^-1), M = W^T W + variance I: means (N, C), covariance (C, C).

        Tipping & Bishop 1999, section 3.
        """
        m = self.weight.T @ self.weight + self.variance * torch.eye(self.weight.shape[1], dtype=torch.float64)
        inverse = torch.linalg.inv(m)
        return (x.double() - self.mean) @ self.weight @ inverse, self.variance * inverse


def covariance_eigenvalues(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), falling, and eigenvectors, columns of (D, D), of the covariance (divisor N) of x (N, D)."""
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    return values.flip(0).clamp_min(0), vectors.flip(1)


def probabilistic_pca(x: Tensor, components: int, variance: float | None = None) -> LinearGaussian:
    """Fit the linear Gaussian model of greatest likelihood to x (N, D): W = U (L - variance I)^(1/2).

    L are the `components` largest eigenvalues of the covariance, U their eigenvectors. variance: of the noise; None
    for the best one, the mean of the other eigenvalues. A component whose eigenvalue is below a given variance has
    collapsed: its column of W is 0 (Lucas et al. 2019). Raises ValueError unless 0 < components < D.
    """
    if not 0 < components < x.shape[1]:
        raise ValueError(f"components: {components}; allowed: from 1 to {x.shape[1] - 1}")
    values, vectors = covariance_eigenvalues(x)
    if variance is None:
        variance = float(values[components:].mean())
    lengths = (values[:components] - variance).clamp_min(0).sqrt()
    return LinearGaussian(vectors[:, :components] * lengths, x.double().mean(0), variance)


def collapsed(model: LinearGaussian, tolerance: float = 1e-6) -> Tensor:
    """Whether each latent has no effect on x, as its column of W is shorter than `tolerance`: (C,), bool."""
    return model.weight.norm(dim=0) < tolerance
