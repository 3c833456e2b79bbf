"""The adversarial autoencoder's discriminator: it tells latents from draws of a prior (Makhzani et al. 2015)."""

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
    """The discriminator of latents, the player that trains it, and the term that the encoder minimises.

    It judges each position of the latents by itself, as a draw of the prior of so many channels.

    channels: of the latents. bottleneck: whose prior they are compared with.
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
        self.term = Term(
            "latent_adversarial", "latents", lambda step: self.config.weight, self._encoders_loss
        )

    def learning_rate(self, step: int) -> float:
        """The autoencoder's, in the proportion of the two configured rates."""
        own, rate = self.config.learning_rate, self.run.learning_rate(step)
        return rate * own / self.run.config.optimizer.learning_rate if own else rate

    def _encoders_loss(self, z: Tensor, images: Tensor) -> Tensor:
        """E[softplus(-D(z))]: its gradient reaches the encoder and not the discriminator's weights."""
        weights = {name: weight.detach() for name, weight in self.player.module.named_parameters()}
        logits = torch.func.functional_call(self.player.module, weights, (z.float(),))
        return losses.generator_loss(LOSS, logits)

    def micro_batch(self, z: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Move the discriminator by one micro-batch of latents (B, C, h, w) and noise for the prior."""
        with record_function("discriminator"):
            real, fake = self.prior.from_noise(noise), z.detach().float()
            logits = self.player.network(torch.cat([real, fake])).float()
            loss = losses.discriminator_loss(LOSS, *logits.chunk(2))
            self.player.backward(loss, watched=loss)
        return {"latent_discriminator/loss": loss, **self.player.update()}
