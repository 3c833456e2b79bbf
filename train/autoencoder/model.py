"""What is trained: the autoencoder with its bottleneck, its view and the scale of its likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference.winograd_autograd import WinogradOps
from kl_autoencoder.models.autoencoder import Autoencoder
from kl_autoencoder.models.autoencoder_kl import COMPACT, ExactAutoencoder
from kl_autoencoder.models.classes import CLASSES, class_of, class_of_file
from kl_autoencoder.models.folder import HUB_ID
from kl_autoencoder.networks.bottlenecks import Bottleneck, Code, KLBottleneck
from kl_autoencoder.networks.convolutional import ResnetBlock, Upsample, recomputed_norm_silu_conv

from ..config import ModelConfig
from ..parts import Draws
from ..parts.draws import INPUT_NOISE, LABELS
from ..parts.views import View
from .start import damp_residual_branches, start_as_enlargement


def _is_gaussian(vae: ExactAutoencoder | Autoencoder) -> bool:
    """Whether training brings the bottleneck, with its free bits: a Gaussian is no part of what is exported."""
    return not isinstance(vae, Autoencoder) or isinstance(vae.bottleneck_module, KLBottleneck)


def build_autoencoder(config: ModelConfig, channels: int = 3) -> ExactAutoencoder | Autoencoder:
    """A new network, or the pretrained one: a folder or hub id in diffusers' layout, "compact", or an LDM file.

    Raises ValueError naming the key for what gives no network of images of `channels` channels.
    """
    source = config.pretrained
    try:
        if source is None:
            vae = damp_residual_branches(CLASSES[config.class_name](**config.options()))
        elif Path(source).is_file():
            vae = class_of_file(source).from_single_file(source, torch_dtype=torch.float32)
        elif source == COMPACT.name and not Path(source).is_dir():
            vae = KLAutoencoder.from_pretrained(source, torch_dtype=torch.float32)
        elif Path(source).is_dir() or HUB_ID.fullmatch(source):
            cls = class_of(source, config.subfolder or "")
            vae = cls.from_pretrained(source, subfolder=config.subfolder, torch_dtype=torch.float32)
        else:
            raise ValueError("no such folder or file, and no hub id (owner/name)")
        if source is not None and config.decoder_block_out_channels is not None:
            vae = with_new_decoder(vae, config.decoder_block_out_channels)
    except (ValueError, OSError) as error:
        what = f"model.pretrained: {source!r} cannot be loaded: " if source else "model."
        raise ValueError(f"{what}{error}") from error
    for key in ("in_channels", "out_channels"):
        if vae.config[key] != channels:
            raise ValueError(f"model.{key}: {vae.config[key]}; allowed: data.channels, {channels}")
    if config.start == "enlargement":
        start_as_enlargement(vae)
    return vae


def with_new_decoder(vae: ExactAutoencoder, widths: Sequence[int]) -> ExactAutoencoder:
    """The model with an untrained decoder of other widths; its encoder and the scaling of its latents are kept."""
    if "decoder_block_out_channels" not in vae.rules:
        raise ValueError(
            f"model.decoder_block_out_channels beside an {type(vae).__name__}; allowed: an AutoencoderKLFlux2"
        )
    config = {key: value for key, value in vae.config.items() if key in vae.rules}
    new = damp_residual_branches(type(vae)(**{**config, "decoder_block_out_channels": tuple(widths)}))
    decodes = ("decoder.", "post_quant_conv.")
    kept = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(decodes)}
    new.load_state_dict(kept, strict=False)
    return new


def choose_backward(vae: ExactAutoencoder | Autoencoder, recompute: str) -> None:
    """What the backward pass computes again: "no"thing, "norms" and SiLUs, or whole "blocks".

    With "norms" the convolutions take fewer products where that pays, in float32 on a CPU.
    """
    if recompute == "blocks":
        vae.enable_gradient_checkpointing()
    if recompute != "norms":
        return
    fewer = WinogradOps() if vae.device.type == "cpu" else None
    for block in vae.modules():
        if isinstance(block, ResnetBlock):
            block.norm_silu_conv = fewer.norm_silu_conv if fewer else recomputed_norm_silu_conv
        elif isinstance(block, Upsample) and fewer:
            block.upsample_conv = fewer.upsample_conv


def allow_compilations(sizes: int) -> None:
    """Let networks be compiled for `sizes` sizes of images; after eight, torch would run them uncompiled."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * sizes)  # in training, and without gradients


@dataclass
class Reconstruction:
    """images: (B, 3, H, W); targets: the images that they should be; code: what the bottleneck made of `encoded`.

    encoded: the images that the encoder was given. They differ from the targets where a view transforms both
    latents and images.

    log_scale: of the likelihood, None where it is fixed. features: what the decoder's last convolution read,
    (B, first width, H, W), without a graph. learned: what the learned layers of terms made of the latents, by the
    name of the term.

    No tuple, whose half-precision tensors accelerate would convert to float32.
    """

    images: Tensor
    targets: Tensor
    encoded: Tensor
    code: Code
    log_scale: Tensor | None
    features: Tensor
    learned: dict[str, Tensor]


class TrainedModel(nn.Module):
    """What the optimizer moves and DDP wraps.

    `forward` returns all that the loss needs, so that no wrapper is ever bypassed.
    """

    def __init__(
        self,
        vae: ExactAutoencoder | Autoencoder,
        bottleneck: Bottleneck,
        view: View,
        learn_scale: bool,
        decoder_only: bool,
        learned: dict[str, nn.Module] | None = None,
        denoising: float = 0.0,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        # one that is part of the model is a module of the model
        self.outside = bottleneck if _is_gaussian(vae) else None
        self.view, self.denoising, self.label_dropout = view, denoising, label_dropout
        self.vae = vae.train()  # from_pretrained's is not; gradients then cost a second forward pass
        self.log_scale = nn.Parameter(torch.zeros(())) if learn_scale else None
        self.learned = nn.ModuleDict(learned)
        self.decoder_only = decoder_only
        if decoder_only:
            vae.encoder.requires_grad_(False)
            if getattr(vae, "quant_conv", None) is not None:
                vae.quant_conv.requires_grad_(False)

    @property
    def bottleneck(self) -> Bottleneck:
        return self.vae.bottleneck_module if self.outside is None else self.outside

    def compile_networks(self) -> None:
        """Compile encoder and decoder, except the last convolution: the adaptive weight reads its input.

        They are compiled again for each size of images: see `allow_compilations`.
        """
        self.vae.encoder.compile()
        self.vae.decoder.features = torch.compile(self.vae.decoder.features)

    def forward(
        self, images: Tensor, noise: Tensor, draws: Draws | None = None, labels: Tensor | None = None
    ) -> Reconstruction:
        """Images, noise for the bottleneck, other random numbers, labels or None -> all that the loss needs.

        Shapes: images (B, C, H, W), noise (B, *noise_shape of the bottleneck), labels (B,).
        """
        vae = self.vae
        if hasattr(self.view, "at_encoder"):
            images = self.view.at_encoder(images, vae.downsampling, draws)
            noise = self._cropped(noise, images)
        condition = () if labels is None else (self._dropped(labels, draws),)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            moments = vae.moments(self._corrupted(images, draws), *condition)
        code = self.bottleneck(moments, noise, images[0].numel())
        z, targets = self.view(code.z, images, draws)
        features = vae.features(z, *condition)
        if torch.is_autocast_enabled(features.device.type):  # as the convolution would, and keep that alone
            features = features.to(torch.get_autocast_dtype(features.device.type))
        reconstruction = vae.decoder.conv_out(features)
        learned = {name: layer(code.z) for name, layer in self.learned.items()}
        return Reconstruction(
            reconstruction, targets, images, code, self.log_scale, features.detach(), learned
        )

    def _corrupted(self, images: Tensor, draws: Draws | None) -> Tensor:
        """What the encoder sees of the images: in a denoising autoencoder, with normal noise on them."""
        if not self.denoising or draws is None:
            return images
        return images + self.denoising * draws.for_purpose(INPUT_NOISE).normal(*images.shape[1:])

    def _dropped(self, labels: Tensor, draws: Draws | None) -> Tensor:
        """The labels (B,), some of them replaced by "no label"."""
        if not self.label_dropout or draws is None:
            return labels
        dropped = draws.for_purpose(LABELS).uniform(0, 1) < self.label_dropout
        return torch.where(dropped, self.vae.config.classes, labels)

    def _cropped(self, noise: Tensor, images: Tensor) -> Tensor:
        """The part of the noise for whole crops that the latents of smaller images need."""
        height, width = (side // self.vae.downsampling for side in images.shape[2:])
        shape = self.bottleneck.noise_shape((self.vae.config.latent_channels, height, width))
        return noise[(slice(None), *map(slice, shape))]
