"""`LatentAdversary`: a discriminator between latents and draws of a prior, for the adversarial autoencoder."""

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from kl_autoencoder.networks.bottlenecks import AdversarialBottleneck

from ...loop.context import RunContext
from ...loop.player import Player
from ...parts import Term
from . import losses

LOSS = "logistic"


class LatentAdversary:
    """A discriminator of latents, the player that trains it, and the term that the encoder minimises.

    Makhzani et al. 2015, "Adversarial Autoencoders". Each position of the latents is judged by itself, as one
    vector of `channels` values. bottleneck: has the prior whose draws count as real.
    """

    def __init__(self, run: RunContext, channels: int, bottleneck: AdversarialBottleneck):
        self.run, self.config, self.prior = run, run.config.loss.latent_adversarial, bottleneck.prior
        hidden = self.config.hidden
        network = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, 1, 1),
        ).to(run.device)
        self.player = Player(network, run, self.learning_rate, "latent_discriminator")
        self.term = Term("latent_adversarial", "latents", lambda step: self.config.weight, self._encoder_loss)

    def learning_rate(self, step: int) -> float:
        """The autoencoder's rate in `step`, times the ratio of the two configured rates."""
        own, rate = self.config.learning_rate, self.run.learning_rate(step)
        return rate * own / self.run.config.optimizer.learning_rate if own else rate

    def _encoder_loss(self, z: Tensor, images: Tensor) -> Tensor:
        """E[softplus(-D(z))], a scalar; its gradient reaches the encoder, but not the discriminator's weights."""
        weights = {name: weight.detach() for name, weight in self.player.module.named_parameters()}
        logits = torch.func.functional_call(self.player.module, weights, (z.float(),))
        return losses.generator_loss(LOSS, logits)

    def micro_batch(self, z: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Train the discriminator on one micro-batch of latents z, (B, C, h, w); returns the terms to log.

        noise: as the bottleneck gets it, standard normal; the prior makes its draws of it.
        """
        with record_function("discriminator"):
            real, fake = self.prior.from_noise(noise), z.detach().float()
            logits = self.player.network(torch.cat([real, fake])).float()
            loss = losses.discriminator_loss(LOSS, *logits.chunk(2))
            self.player.backward(loss, watched=loss)
        return {"latent_discriminator/loss": loss, **self.player.update()}
