"""The networks, their optimizers, and how one step moves them."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import record_function

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.evaluation.metrics import LPIPS

from ..config import Config
from ..loop import checkpoint
from ..loop.schedules import Schedules
from ..parts import BOTTLENECKS, TERMS, VIEWS, Draws, Term
from ..parts.draws import POSTERIOR_NOISE
from . import losses
from .discriminator import PatchDiscriminator
from .model import MovingAverage, TrainedModel, build_autoencoder, choose_backward
from .training_state import load_training_state

LECAM_DECAY = 0.99
PERCEPTUAL_PIXELS = 4 * 256 * 256  # LPIPS holds some 250 MB of VGG features for each image of 256x256


class Engine:
    """Two symmetric steps, of the autoencoder and of the discriminator, isolated from one another.

    `step` counts those taken. The discriminator is None in a run without one.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, schedules: Schedules, perceptual: LPIPS | None
    ):
        self.config, self.accelerator, self.schedules = config, accelerator, schedules
        self.device, self.step = accelerator.device, 0
        self.perceptual = perceptual
        torch.manual_seed(config.seed)
        self.vae = build_autoencoder(config.model).to(memory_format=torch.channels_last)
        learn_scale = config.loss.reconstruction in losses.LEARNED_SCALE
        bottleneck, view = (
            BOTTLENECKS.build(config.model.bottleneck, config),
            VIEWS.build(config.loss.view, config),
        )
        model = TrainedModel(self.vae, bottleneck, view, learn_scale, config.train.decoder_only)
        self.unwrapped = model.to(self.device)
        self.terms: list[Term] = [TERMS.build(term, config) for term in config.loss.terms]
        self.ema = MovingAverage(self.vae, config.ema.decay) if config.ema.enabled else None
        choose_backward(self.vae, config.train.gradient_checkpointing)
        if config.train.compile:
            self.unwrapped.compile_networks()
            if perceptual is not None:
                perceptual.lpips.net.compile()
        self.parameters = [p for p in self.unwrapped.parameters() if p.requires_grad]
        self.model, self.optimizer = self.accelerator.prepare(self.unwrapped), self._adamw(self.parameters)
        self.discriminator = None
        if config.loss.adversarial.weight:
            self._build_discriminator()

    @property
    def exported(self) -> KLAutoencoder:
        return self.vae if self.ema is None else self.ema.vae

    @property
    def discriminates(self) -> bool:
        return self.schedules.discriminates(self.step)

    def _build_discriminator(self) -> None:
        config = self.config.loss.adversarial
        network = PatchDiscriminator(self.vae.config.out_channels, config.channels, config.layers)
        if self.config.data.resolution < network.smallest_side:
            raise ValueError(
                f"data.resolution: {self.config.data.resolution}; allowed: at least {network.smallest_side} for a "
                f"discriminator of loss.adversarial.layers={config.layers}"
            )
        network = network.to(self.device, memory_format=torch.channels_last)
        self.disc_parameters = list(network.parameters())
        self.discriminator = self.accelerator.prepare(network)
        self.disc_optimizer = self._adamw(self.disc_parameters)
        self.lecam_anchors = torch.zeros(2, device=self.device)
        self.logit_means: list[Tensor] = []  # of real and fake, a micro-batch
        if config.pretrained:
            try:
                self._load_discriminator(load_training_state(self.config.model.pretrained))
            except RuntimeError as error:
                raise ValueError(
                    f"loss.adversarial.pretrained: {self.config.model.pretrained} has a discriminator of another "
                    f"shape than channels={config.channels}, layers={config.layers} "
                    f"({str(error).splitlines()[-1].strip()})"
                ) from None

    def _adamw(self, parameters: list[Tensor]) -> torch.optim.AdamW:
        config = self.config.optimizer
        return torch.optim.AdamW(
            parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True
        )

    # ---------------------------------------------------------------- one step

    def take_step(self, micro_batches: list[dict]) -> list[dict[str, Tensor]]:
        """Forward and backward for each micro-batch, clip, update, average; the terms of each micro-batch."""
        self._set_learning_rates()
        networks = [self.model, self.discriminator] if self.discriminates else [self.model]
        found = []
        for batch in micro_batches:
            images = batch["images"].to(self.device, memory_format=torch.channels_last, non_blocking=True)
            with self.accelerator.accumulate(*networks):
                samples = batch["sample"]
                draws = Draws(self.config.seed, samples, self.device)
                terms, reconstruction, targets = self.autoencoder_step(images, self.noise(samples), draws)
                if self.discriminates:
                    terms |= self.discriminator_step(targets, reconstruction)
            found.append(terms)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # once both have stepped: accumulated gradients share one scale
        self.step += 1
        if self.ema is not None:
            with record_function("optimizer"):
                self.ema.update(self.vae, self.step)
        return found

    def noise(self, samples: Tensor) -> Tensor:
        """What the bottleneck of each sample needs: standard normal, by the seed and the sample's number alone."""
        side = self.config.data.resolution // self.vae.downsampling
        latent = (self.vae.config.latent_channels, side, side)
        draws = Draws(self.config.seed, samples, self.device, POSTERIOR_NOISE)
        return draws.normal(*self.unwrapped.bottleneck.noise_shape(latent))

    @torch.no_grad()
    def latents(self, images: Tensor, samples: Tensor) -> Tensor:
        """Images (B, 3, H, W) and their samples' numbers -> latents (B, C, h, w) of the model that is exported."""
        vae = self.exported
        moments = vae.encode(images.to(self.device, vae.dtype)).latent_dist.parameters
        return self.unwrapped.bottleneck(moments, self.noise(samples), images[0].numel()).z

    def _set_learning_rates(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedules.learning_rate(self.step)
        if self.discriminator is not None:
            for group in self.disc_optimizer.param_groups:
                group["lr"] = self.schedules.discriminator_learning_rate(self.step)

    def autoencoder_step(
        self, images: Tensor, noise: Tensor, draws: Draws | None = None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Move the autoencoder by one micro-batch; returns the terms, the detached reconstruction and its targets.

        The gradient in the reconstruction is formed term by term first, each network's graph being freed before
        the next is built, and goes through the autoencoder once. The norms that the adaptive weight compares
        cost no second pass through LPIPS or the discriminator that way.
        """
        config = self.config.loss
        with record_function("autoencoder"):
            output = self.model(images, noise, draws)
            images, log_scale = output.targets, output.log_scale
            reconstruction = output.images.detach().float().requires_grad_()
            pixels = losses.reconstruction_nll(
                config.reconstruction, reconstruction, images, log_scale
            ).mean()
            penalties = {name: penalty.mean() for name, penalty in output.code.penalties.items()}
            penalty = sum(self._penalty_weight(name) * value for name, value in penalties.items())
            terms = {"loss": pixels + penalty, "reconstruction": pixels, **penalties}
            (gradient,) = torch.autograd.grad(pixels, reconstruction)
        if self.perceptual is not None:
            with record_function("perceptual"):
                terms["perceptual"], more = self._perceptual(reconstruction, images)
                gradient = gradient + config.perceptual.weight * more
                terms["loss"] = terms["loss"] + config.perceptual.weight * terms["perceptual"]
        for term, weight in self._active("pixels"):
            value = term.compute(reconstruction, images)
            gradient = gradient + weight * torch.autograd.grad(value, reconstruction)[0]
            terms[term.name], terms["loss"] = value, terms["loss"] + weight * value.detach()
        if self.schedules.adversarial_weight(self.step) > 0:
            with record_function("discriminator"):
                gradient = gradient + self._adversarial_gradient(
                    reconstruction, output.features, gradient, terms
                )
        with record_function("autoencoder"):
            # a scalar whose gradient in the output is `gradient`
            surrogate = (output.images.float() * gradient.detach()).sum() + penalty
            for term, weight in self._active("latents"):
                value = term.compute(output.code.z, images)
                surrogate = surrogate + weight * value
                terms[term.name], terms["loss"] = value, terms["loss"] + weight * value
            if log_scale is not None:
                surrogate = (
                    surrogate
                    + losses.reconstruction_nll(
                        config.reconstruction, reconstruction.detach(), images, log_scale
                    ).mean()
                )
                terms["log_scale"] = log_scale
            self._backward(surrogate, terms["loss"])
        self._update(self.optimizer, self.parameters, terms, "gradient_norm")
        if (self.step + 1) % self.config.log.every == 0:
            terms |= output.code.facts()
        return terms, reconstruction.detach(), images

    def _penalty_weight(self, name: str) -> float:
        """Of a bottleneck's penalty: the KL has a schedule, others are weighted where they are computed."""
        return self.schedules.kl_weight(self.step) if name == "kl" else 1.0

    def _active(self, at: str) -> list[tuple[Term, float]]:
        """The further terms at the pixels or the latents that have a weight in this step."""
        weighted = [(term, term.weight(self.step)) for term in self.terms if term.at == at]
        return [(term, weight) for term, weight in weighted if weight]

    def _perceptual(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean LPIPS and its gradient in the reconstruction, a few images at a time: they share nothing."""
        at_a_time = max(1, PERCEPTUAL_PIXELS // images[0, 0].numel())
        distances, gradients = [], []
        for part, real in zip(reconstruction.split(at_a_time), images.split(at_a_time), strict=True):
            distance = self.perceptual(part, real).sum() / len(images)
            gradients += torch.autograd.grad(distance, part)
            distances.append(distance.detach())
        return torch.stack(distances).sum(), torch.cat(gradients)

    def _adversarial_gradient(
        self, reconstruction, features, nll_gradient, terms: dict[str, Tensor]
    ) -> Tensor:
        """The weighted gradient of the adversarial term in the reconstruction.

        Taken in the reconstruction alone, so that it leaves the discriminator's gradients as they are.
        """
        config = self.config.loss.adversarial
        network = self.accelerator.unwrap_model(self.discriminator)
        with self.accelerator.autocast():
            logits = network(reconstruction)
        loss = losses.generator_loss(config.loss, logits)
        # the gradient of the sum over patches stays within half precision where that of the mean may not
        (gradient,) = torch.autograd.grad(loss * logits.numel(), reconstruction)
        gradient = gradient / logits.numel()
        weight = torch.full((), self.schedules.adversarial_weight(self.step), device=self.device)
        if config.adaptive:
            terms["adaptive_weight"] = self._adaptive_weight(features, nll_gradient, gradient)
            weight = weight * terms["adaptive_weight"]
        terms["adversarial"], terms["loss"] = loss, terms["loss"] + weight * loss
        return weight * gradient

    @torch.no_grad()
    def _adaptive_weight(self, features: Tensor, *gradients: Tensor) -> Tensor:
        """From the two gradients in the output to their norms at the last layer's weight, over all ranks.

        A convolution's gradient in its weight takes what it read and the gradient in its result, no graph.
        """
        last_layer = self.vae.decoder.conv_out
        at_weight = []
        for gradient in gradients:
            norm = gradient.norm().clamp(min=1e-30)  # sent back at length 1: a mean's would vanish in fp16
            unit = (gradient / norm).to(features.dtype)
            sent = torch.nn.grad.conv2d_weight(
                features, last_layer.weight.shape, unit, padding=last_layer.padding
            )
            at_weight.append(norm * sent.float())
        largest = self.config.loss.adversarial.adaptive_max
        if largest is None:
            largest = losses.LARGEST_ADAPTIVE_WEIGHT / gradients[0][0].numel()
        return losses.adaptive_weight(*self.accelerator.reduce(torch.stack(at_weight), "mean"), largest)

    def discriminator_step(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Move the discriminator by one micro-batch, in one forward over real and reconstructed images."""
        config = self.config.loss.adversarial
        with record_function("discriminator"):
            logits = self.discriminator(torch.cat([images, reconstruction]))
            real, fake = logits.float().chunk(2)
            loss = losses.discriminator_loss(config.loss, real, fake)
            terms = {"discriminator/logits_real": real.mean(), "discriminator/logits_fake": fake.mean()}
            if config.lecam_weight:
                loss = loss + config.lecam_weight * losses.lecam(real, fake, *self.lecam_anchors)
                self.logit_means.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
            if config.r1_weight and self.step % config.r1_every == 0:
                terms["discriminator/r1"] = penalty = self._r1(images)
                loss = loss + config.r1_weight * config.r1_every * penalty
            terms["discriminator/loss"] = loss
            self._backward(loss, loss)
        self._update(self.disc_optimizer, self.disc_parameters, terms, "discriminator/gradient_norm")
        if self.logit_means and self.accelerator.sync_gradients:
            self._move_lecam_anchors(terms["discriminator/gradient_norm"].isfinite())
        return terms

    def _r1(self, images: Tensor) -> Tensor:
        """R1 in float32: its double gradient leaves the range of half precision."""
        network, images = self.accelerator.unwrap_model(self.discriminator), images.detach().requires_grad_()
        with torch.autocast(self.device.type, enabled=False):
            # past the `forward` that accelerate puts on a module, which switches autocast on again
            return losses.r1_penalty(PatchDiscriminator.forward(network, images), images)

    def _move_lecam_anchors(self, taken: Tensor) -> None:
        """Once a step, so that micro-batches are one large batch; a step that was skipped leaves them alone."""
        means = self.accelerator.reduce(torch.stack(self.logit_means).mean(dim=0), "mean")
        moved = torch.lerp(self.lecam_anchors, means, 1 - LECAM_DECAY)
        self.lecam_anchors = torch.where(taken, moved, self.lecam_anchors)
        self.logit_means.clear()

    def _backward(self, loss: Tensor, watched: Tensor) -> None:
        """Backward; where `watched` is not finite all gradients become NaN, and so, averaged, on every rank."""
        self.accelerator.backward(loss * torch.where(watched.detach().isfinite(), 1.0, math.nan))

    def _update(self, optimizer, parameters, terms: dict[str, Tensor], name: str) -> None:
        """Clip and step, but only where the gradient norm over all ranks is finite; the host waits for nothing."""
        if not self.accelerator.sync_gradients:
            return
        scaler = self.accelerator.scaler
        with record_function("optimizer"):
            if scaler is not None:
                scaler.unscale_(optimizer)
            clip = self.config.optimizer.gradient_clip or math.inf
            terms[name] = torch.nn.utils.clip_grad_norm_(parameters, clip)
            if scaler is not None:
                scaler.step(optimizer)
            else:
                optimizer.found_inf = (~terms[name].isfinite()).float()  # as a GradScaler does
                optimizer.step()
            optimizer.zero_grad()

    # ---------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on."""
        tensors = {"model": self.unwrapped.state_dict()}
        tensors["optimizer"] = checkpoint.optimizer_tensors(self.optimizer)
        if self.ema is not None:
            tensors["ema"] = self.ema.vae.state_dict()
        if self.discriminator is not None:
            tensors |= self.discriminator_tensors()
        return tensors

    def discriminator_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "discriminator": self.accelerator.unwrap_model(self.discriminator).state_dict(),
            "discriminator_optimizer": checkpoint.optimizer_tensors(self.disc_optimizer),
            "lecam": {"anchors": self.lecam_anchors},
        }

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`. A moving average that is not among them starts from the weights."""
        self.unwrapped.load_state_dict(tensors["model"])
        checkpoint.load_optimizer(self.optimizer, tensors["optimizer"])
        if self.ema is not None:
            self.ema.vae.load_state_dict(tensors["ema"] if "ema" in tensors else self.vae.state_dict())
        if self.discriminator is not None and "discriminator" in tensors:
            self._load_discriminator(tensors)

    def _load_discriminator(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.accelerator.unwrap_model(self.discriminator).load_state_dict(tensors["discriminator"])
        checkpoint.load_optimizer(self.disc_optimizer, tensors["discriminator_optimizer"])
        self.lecam_anchors = tensors["lecam"]["anchors"].to(self.device)
