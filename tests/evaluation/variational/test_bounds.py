"""Bounds of log p(x) on linear Gaussian models, where it is known; likelihoods against the training program's."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from sklearn.decomposition import PCA

from kl_autoencoder.evaluation.variational.bounds import (
    Likelihood,
    elbo,
    importance_bound,
    importance_weights,
    posterior_of,
)
from kl_autoencoder.evaluation.variational.likelihoods import best_log_scale, error, log_likelihood
from kl_autoencoder.evaluation.variational.linear_gaussian import (
    LinearGaussian,
    collapsed,
    covariance_eigenvalues,
    probabilistic_pca,
)
from tests.evaluation.variational.linear import LinearModel, true_posterior
from train.autoencoder.likelihoods import reconstruction_nll


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def table(rows, columns, seed=0):
    """Correlated rows of zero mean, float64."""
    mixing = torch.randn(columns, columns, generator=generator(seed), dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator(seed + 1), dtype=torch.float64) @ mixing / columns


def as_images(x):
    return x[..., None, None]


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "bernoulli"])
def test_likelihoods_are_those_of_training(kind):
    x = torch.rand(3, 2, 4, 5, generator=generator()) * 2 - 1
    y = torch.rand(3, 2, 4, 5, generator=generator(1)) * 1.9 - 0.95
    log_scale = None if kind == "bernoulli" else -0.7
    scale = log_scale and torch.tensor(log_scale)
    wanted = -reconstruction_nll(kind, y, x, scale).double().sum((1, 2, 3))
    found = log_likelihood(kind, x, y, log_scale)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_likelihood(kind, x, torch.stack((y, x)), log_scale)[0], found)


def test_bernoulli_means_beyond_probabilities_are_the_nearest_allowed():
    """In training these are pulled back, too, by the square of what they are beyond."""
    x = torch.tensor([-1.0, 1.0, 1.0]).view(1, 1, 1, 3)
    y = torch.tensor([-1.4, 1.2, -1.0]).view(1, 1, 1, 3)
    found = float(log_likelihood("bernoulli", x, y))
    assert math.isclose(found, 2 * math.log(0.999) + math.log(0.001), rel_tol=1e-9)
    penalty = (0.2 + 0.001) ** 2 + (0.1 + 0.001) ** 2 + 0.001**2
    assert math.isclose(found - penalty, -float(reconstruction_nll("bernoulli", y, x).sum()), rel_tol=1e-5)


def test_likelihoods_refuse_what_is_no_density():
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="likelihood: 'l1'; allowed: gaussian, laplace, bernoulli"):
        log_likelihood("l1", x, x)
    with pytest.raises(ValueError, match="log_scale: None; allowed with laplace: a number"):
        log_likelihood("laplace", x, x)
    with pytest.raises(ValueError, match="log_scale: 0.0; allowed with bernoulli: None"):
        log_likelihood("bernoulli", x, x, 0.0)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_no_other_scale_is_likelier_than_the_best(kind):
    x, y = (torch.randn(4, 3, 5, 5, generator=generator(seed)) for seed in (0, 1))
    best = best_log_scale(kind, error(kind, x, y))
    totals = [float(log_likelihood(kind, x, y, best + d).sum()) for d in (-0.02, -0.01, 0, 0.01, 0.02)]
    assert max(totals) == totals[2]


def test_bounds_rise_to_the_exact_likelihood():
    """A posterior that is wrong in mean and variance: ELBO < L_5 < L_50 < log p(x), by many standard errors."""
    exact = LinearGaussian(table(6, 2, 3)[:, :2] * 3, torch.linspace(-1, 1, 6, dtype=torch.float64), 0.3)
    x = exact.mean + torch.randn(400, 6, generator=generator(5), dtype=torch.float64)
    encoder = exact.weight @ torch.linalg.inv(exact.weight.T @ exact.weight + 0.5 * torch.eye(2))
    variances = torch.tensor([0.2, 0.3], dtype=torch.float64)
    model = LinearModel(encoder, 0.2 - exact.mean @ encoder, variances, exact.weight.T, exact.mean)
    likelihood = Likelihood("gaussian", 0.5 * math.log(exact.variance))
    weights = importance_weights(model, as_images(x), likelihood, 500, generator())
    assert weights.log_weights.shape == (500, 400)

    kl = posterior_of(model, as_images(x)).kl()
    bounds = [elbo(weights, kl), *(importance_bound(weights.log_weights, k) for k in (1, 5, 50))]
    bounds.append(exact.log_likelihood(x))
    means = [float(bound.mean()) for bound in bounds]
    assert abs(means[0] - means[1]) < 0.02  # the KL in closed form, and by draws
    for below, above in pairwise(bounds[1:]):
        gain = above - below
        assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))
    nearest = float(importance_bound(weights.log_weights, 500).mean())
    assert abs(nearest - means[-1]) < 0.01 * abs(means[-1])

    # The ELBO, itself known: log p(x) less KL(q(z|x) || p(z|x)), between Gaussians.
    q = torch.distributions.MultivariateNormal(
        x @ encoder + model.offset, torch.diag(variances).expand(400, 2, 2)
    )
    mean, covariance = exact.posterior(x)
    p = torch.distributions.MultivariateNormal(mean, covariance.expand(400, 2, 2))
    gap = torch.distributions.kl_divergence(q, p).mean()
    assert abs(means[0] - float(exact.log_likelihood(x).mean() - gap)) < 0.02


def test_at_the_true_posterior_every_draw_gives_the_exact_likelihood():
    x = table(50, 7)
    exact = probabilistic_pca(x, 3)
    model = true_posterior(exact)
    likelihood = Likelihood("gaussian", 0.5 * math.log(exact.variance))
    weights = importance_weights(model, as_images(x), likelihood, 4, generator(), at_once=30)
    wanted = exact.log_likelihood(x).expand(4, 50)
    torch.testing.assert_close(weights.log_weights, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(importance_bound(weights.log_weights, 2), wanted[0])


def test_the_decoder_sees_no_more_at_once_than_allowed():
    """And draws do not depend on it, nor on the type of the model."""
    x, seen = as_images(table(10, 5)), []
    model = true_posterior(probabilistic_pca(x.flatten(1), 2))
    decode = model.decode

    def counted(z):
        seen.append(len(z))
        return decode(z)

    model.decode = counted
    likelihood = Likelihood("laplace", -1.0)
    few, many = (importance_weights(model, x, likelihood, 12, generator(), at_once=n) for n in (7, 30))
    assert max(seen) == 30 and sum(seen) == 240 and seen[:2] == [7, 3]
    torch.testing.assert_close(few, many)
    single = importance_weights(model, x.float(), likelihood, 12, generator())
    torch.testing.assert_close(single.log_weights, many.log_weights, rtol=1e-4, atol=1e-4)


def test_bounds_without_a_posterior_or_a_divisor_are_refused():
    with pytest.raises(ValueError, match="k: 3; allowed: a divisor of the number of draws, 10"):
        importance_bound(torch.zeros(10, 2), 3)
    plain = SimpleNamespace(encode=lambda images: SimpleNamespace(latent_dist=SimpleNamespace()))
    with pytest.raises(ValueError, match="no Gaussian posterior"):
        posterior_of(plain, torch.zeros(1, 1, 1, 1))


def test_probabilistic_pca_is_that_of_scikit_learn():
    x = table(300, 8)
    exact, theirs = probabilistic_pca(x, 3), PCA(3).fit(x.numpy())
    # theirs divides by N - 1
    scale = 299 / 300
    assert math.isclose(exact.variance, theirs.noise_variance_ * scale, rel_tol=1e-9)
    same = LinearGaussian(exact.weight / math.sqrt(scale), exact.mean, exact.variance / scale).log_likelihood(
        x
    )
    torch.testing.assert_close(same, torch.from_numpy(theirs.score_samples(x.numpy())))
    assert exact.log_likelihood(x).mean() > theirs.score(x.numpy())  # it is the model of greatest likelihood


def test_components_below_the_noise_collapse():
    x = table(300, 8)
    values, _ = covariance_eigenvalues(x)
    between = float((values[1] + values[2]) / 2)
    model = probabilistic_pca(x, 4, variance=between)
    assert collapsed(model).tolist() == [False, False, True, True]
    best = model.log_likelihood(x).mean()
    for seed in range(3):  # no W near it is likelier
        step = 0.05 * torch.randn(8, 4, generator=generator(seed), dtype=torch.float64)
        assert LinearGaussian(model.weight + step, model.mean, between).log_likelihood(x).mean() < best
    with pytest.raises(ValueError, match="components: 8; allowed: from 1 to 7"):
        probabilistic_pca(x, 8)
