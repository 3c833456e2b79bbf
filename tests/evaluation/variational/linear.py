"""Linear autoencoders as models with encode and decode, their posteriors and decoders given as matrices."""

from types import SimpleNamespace

import torch

from kl_autoencoder.networks.distributions import DiagonalGaussian


class LinearModel:
    """encode: mean = x `encoder` + `offset`, variance `variances` (C,). decode: z `decoder` + `mean`.

    Images are (B, D, 1, 1), latents (B, C, 1, 1).
    """

    def __init__(self, encoder, offset, variances, decoder, mean):
        self.encoder, self.offset, self.variances = encoder, offset, variances
        self.decoder, self.mean = decoder, mean
        self.device, self.dtype, self.config = torch.device("cpu"), decoder.dtype, {}

    def encode(self, images):
        means = images.flatten(1) @ self.encoder.to(images) + self.offset.to(images)
        logvar = self.variances.to(images).log().expand_as(means)
        moments = torch.cat((means, logvar), dim=1)[..., None, None]
        return SimpleNamespace(latent_dist=DiagonalGaussian(moments))

    def decode(self, z):
        return SimpleNamespace(sample=(z.flatten(1) @ self.decoder.to(z) + self.mean.to(z))[..., None, None])


def true_posterior(model):
    """The linear model whose q(z|x) is the posterior of a LinearGaussian, diagonal for orthogonal columns."""
    _, covariance = model.posterior(model.mean[None])
    variances = covariance.diagonal()
    assert (covariance - torch.diag(variances)).abs().max() < 1e-12
    encoder = model.weight * (variances / model.variance)
    return LinearModel(encoder, -model.mean @ encoder, variances, model.weight.T, model.mean)
