"""`Adversary`: train the discriminator of images, and compute the adversarial gradient for the autoencoder."""

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ...loop.context import RunContext
from ...loop.player import Player, Tensors
from ...loop.schedules import ramp
from . import losses
from .discriminator import PatchDiscriminator
from .training_state import load_training_state

LECAM_DECAY = 0.99  # of LeCam's moving averages, a step


class Adversary:
    """A patch discriminator, the player that trains it, and the averages of its logits that LeCam needs.

    channels: of the images. last_layer: the decoder's last convolution, in whose weight the adaptive weight
    compares gradients. Raises ValueError for crops that are too small for the discriminator, and if
    `loss.adversarial.pretrained` finds no discriminator, or one of another shape.
    """

    def __init__(self, run: RunContext, channels: int, last_layer: nn.Conv2d):
        self.run, self.config, self.last_layer = run, run.config.loss.adversarial, last_layer
        network = PatchDiscriminator(channels, self.config.channels, self.config.layers)
        resolution = min(run.config.data.resolutions)
        least = run.config.data.least_resolution(network.smallest_side)
        if resolution < least:
            raise ValueError(
                f"data.resolution: {resolution}; allowed: at least {least} for a "
                f"discriminator of loss.adversarial.layers={self.config.layers}"
            )
        network = network.to(run.device, memory_format=torch.channels_last)
        self.player = Player(network, run, self.learning_rate, "discriminator")
        # averages of the logits of real, of fake images
        self.lecam_anchors = torch.zeros(2, device=run.device)
        self.logit_means: list[Tensor] = []  # of each micro-batch of this step, (2,): real, fake
        if self.config.pretrained:
            self._load_pretrained(run.config.model.pretrained)

    # ---------------------------------------------------------------- schedules

    def plays(self, step: int) -> bool:
        """Whether the discriminator is trained in `step`, which counts from 0."""
        return step >= self.config.disc_start

    def weight(self, step: int) -> float:
        """The weight of the adversarial term in `step`, before the adaptive weight.

        It is 0 until the discriminator has trained for `disc_warmup_steps`, then rises to the configured weight
        over `ramp_steps`.
        """
        since = step - self.config.disc_start - self.config.disc_warmup_steps
        return self.config.weight * ramp(since + 1, self.config.ramp_steps + 1) if since >= 0 else 0.0

    def learning_rate(self, step: int) -> float:
        """The autoencoder's rate in `step`, times the ratio of the two configured rates."""
        own, rate = self.config.learning_rate, self.run.learning_rate(step)
        return rate * own / self.run.config.optimizer.learning_rate if own else rate

    # ---------------------------------------------------------------- gradient for the autoencoder

    def gradient(
        self, step: int, reconstruction: Tensor, features: Tensor, nll_gradient: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the term's weighted gradient in the reconstruction, its weighted value, and the terms to log.

        reconstruction: (B, C, H, W), requires a gradient. features: the input of the last layer, (B, width, H, W).
        nll_gradient: (B, C, H, W), the gradient of all other terms at the pixels. The discriminator's own weights
        get no gradient.
        """
        network = self.run.accelerator.unwrap_model(self.player.network)
        with self.run.accelerator.autocast():
            logits = network(reconstruction)
        loss = losses.generator_loss(self.config.loss, logits)
        # the gradient of the mean over patches could underflow in half precision, that of the sum does not
        (gradient,) = torch.autograd.grad(loss * logits.numel(), reconstruction)
        gradient = gradient / logits.numel()
        weight, terms = torch.full((), self.weight(step), device=self.run.device), {}
        if self.config.adaptive:
            terms["adaptive_weight"] = self.adaptive_weight(features, nll_gradient, gradient)
            weight = weight * terms["adaptive_weight"]
        return weight * gradient, weight * loss, {**terms, "adversarial": loss}

    @torch.no_grad()
    def adaptive_weight(self, features: Tensor, *gradients: Tensor) -> Tensor:
        """The adaptive weight (`losses.adaptive_weight`), a scalar that is the same on all ranks.

        gradients: of the other terms and of the adversarial loss in the reconstruction, (B, C, H, W) each. The
        formula compares gradients in the last layer's weight. They are computed without a graph, from the input of
        that convolution, `features`, and these gradients in its output, and averaged over the ranks.
        """
        at_weight = []
        for gradient in gradients:
            norm = gradient.norm().clamp(min=1e-30)  # scaled to length 1, since it could underflow in fp16
            unit = (gradient / norm).to(features.dtype)
            sent = torch.nn.grad.conv2d_weight(
                features, self.last_layer.weight.shape, unit, padding=self.last_layer.padding
            )
            at_weight.append(norm * sent.float())
        largest = self.config.adaptive_max
        if largest is None:
            largest = losses.LARGEST_ADAPTIVE_WEIGHT / gradients[0][0].numel()
        return losses.adaptive_weight(*self.run.accelerator.reduce(torch.stack(at_weight), "mean"), largest)

    # ---------------------------------------------------------------- its own step

    def micro_batch(self, step: int, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Train the discriminator on one micro-batch, by one forward over real and reconstructed images.

        images, reconstruction: (B, C, H, W), the latter detached. Returns the terms to log.
        """
        config = self.config
        with record_function("discriminator"):
            logits = self.player.network(torch.cat([images, reconstruction]))
            real, fake = logits.float().chunk(2)
            loss = losses.discriminator_loss(config.loss, real, fake)
            terms = {"discriminator/logits_real": real.mean(), "discriminator/logits_fake": fake.mean()}
            if config.lecam_weight:
                loss = loss + config.lecam_weight * losses.lecam(real, fake, *self.lecam_anchors)
                self.logit_means.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
            if config.r1_weight and step % config.r1_every == 0:
                terms["discriminator/r1"] = penalty = self.r1(images)
                loss = loss + config.r1_weight * config.r1_every * penalty
            terms["discriminator/loss"] = loss
            self.player.backward(loss, watched=loss)
        norm = self.player.update()
        if self.logit_means and norm:
            self._move_lecam_anchors(norm[self.player.gradient_norm].isfinite())
        return terms | norm

    def r1(self, images: Tensor) -> Tensor:
        """The R1 penalty of real images (B, C, H, W), in float32: float16 cannot hold its double gradient."""
        network = self.run.accelerator.unwrap_model(self.player.network)
        images = images.detach().requires_grad_()
        with torch.autocast(self.run.device.type, enabled=False):
            # the class's `forward`, because the one that accelerate sets on the module switches autocast on again
            return losses.r1_penalty(PatchDiscriminator.forward(network, images), images)

    def _move_lecam_anchors(self, taken: Tensor) -> None:
        """Move LeCam's averages once a step, by the means over its micro-batches and all ranks.

        taken: a boolean scalar; a step that was skipped does not move them.
        """
        means = self.run.accelerator.reduce(torch.stack(self.logit_means).mean(dim=0), "mean")
        moved = torch.lerp(self.lecam_anchors, means, 1 - LECAM_DECAY)
        self.lecam_anchors = torch.where(taken, moved, self.lecam_anchors)
        self.logit_means.clear()

    # ---------------------------------------------------------------- checkpoints

    def tensors(self) -> Tensors:
        return {**self.player.tensors(), "lecam": {"anchors": self.lecam_anchors}}

    def load(self, tensors: Tensors) -> None:
        """Load what `tensors` returned. Raises RuntimeError for a discriminator of another shape."""
        self.player.load(tensors)
        self.lecam_anchors = tensors["lecam"]["anchors"].to(self.run.device)

    def _load_pretrained(self, pretrained: str) -> None:
        try:
            self.load(load_training_state(pretrained))
        except RuntimeError as error:
            raise ValueError(
                f"loss.adversarial.pretrained: {pretrained} has a discriminator of another "
                f"shape than channels={self.config.channels}, layers={self.config.layers} "
                f"({str(error).splitlines()[-1].strip()})"
            ) from None
