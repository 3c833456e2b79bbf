"""`TrainedModel`: the autoencoder with its bottleneck, its view and the learned scale of its likelihood."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference.winograd_autograd import WinogradOps
from kl_autoencoder.models.autoencoder import Autoencoder
from kl_autoencoder.models.autoencoder_kl import ExactAutoencoder
from kl_autoencoder.models.classes import CLASSES, class_of, class_of_file
from kl_autoencoder.models.folder import HUB_ID
from kl_autoencoder.models.packaged import packaged
from kl_autoencoder.networks.bottlenecks import Bottleneck, Code, KLBottleneck
from kl_autoencoder.networks.convolutional import ResnetBlock, Upsample, recomputed_norm_silu_conv

from ..config import ModelConfig
from ..parts import Draws
from ..parts.draws import INPUT_NOISE, LABELS
from ..parts.views import View
from .start import add_latents, damp_residual_branches, keep_principal_latents, start_as_enlargement


def _is_gaussian(vae: ExactAutoencoder | Autoencoder) -> bool:
    """Whether the bottleneck is a Gaussian: training then builds its own, with free bits, beside the model."""
    return not isinstance(vae, Autoencoder) or isinstance(vae.bottleneck_module, KLBottleneck)


def build_autoencoder(
    config: ModelConfig, channels: int = 3, latents_of: Callable[[ExactAutoencoder], Tensor] | None = None
) -> ExactAutoencoder | Autoencoder:
    """Build a new network, or load `model.pretrained`.

    The latter is a folder or hub id in diffusers' layout, a single file of latent diffusion's, or a packaged model.
    latents_of: encodes training images with the loaded model, to latents (N, C) at N positions; needed if
    `model.latent_channels` are fewer than it has.

    Raises ValueError, which names the key, if it cannot be built or loaded, or is not for images of `channels`
    channels.
    """
    source = config.pretrained and packaged(config.pretrained)
    try:
        if source is None:
            vae = damp_residual_branches(CLASSES[config.class_name](**config.options()))
        elif Path(source).is_file():
            vae = class_of_file(source).from_single_file(source, torch_dtype=torch.float32)
        elif Path(source).is_dir() or HUB_ID.fullmatch(str(source)):
            cls = class_of(source, config.subfolder or "")
            vae = cls.from_pretrained(source, subfolder=config.subfolder, torch_dtype=torch.float32)
        else:
            raise ValueError("no such folder or file, and no hub id (owner/name)")
        if source is not None and config.decoder_block_out_channels is not None:
            vae = with_new_decoder(vae, config.decoder_block_out_channels)
        if source is not None and config.latent_channels not in (None, vae.config.latent_channels):
            vae = with_other_latents(vae, config.latent_channels, latents_of)
    except (ValueError, OSError) as error:
        what = f"model.pretrained: {config.pretrained!r} cannot be loaded: " if source else "model."
        raise ValueError(f"{what}{error}") from error
    for key in ("in_channels", "out_channels"):
        if vae.config[key] != channels:
            raise ValueError(f"model.{key}: {vae.config[key]}; allowed: data.channels, {channels}")
    if config.start == "enlargement":
        start_as_enlargement(vae)
    return vae


def with_new_decoder(vae: ExactAutoencoder, widths: Sequence[int]) -> ExactAutoencoder:
    """Replace the decoder by an untrained one of other widths; encoder and scaling of the latents are kept.

    widths: channels of each level, the finest first. Raises ValueError unless the model is an AutoencoderKLFlux2.
    """
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


def with_other_latents(
    vae: ExactAutoencoder, channels: int, latents_of: Callable[[ExactAutoencoder], Tensor] | None
) -> KLAutoencoder:
    """Return a copy of a model with `channels` latent channels.

    With more channels than the model has it computes the same images (`add_latents`), with fewer it keeps the
    principal components of its latents (`keep_principal_latents`). Raises ValueError for more than eight times as
    many, for fewer without `latents_of`, and unless the model is an AutoencoderKL.
    """
    had = vae.config.latent_channels
    least = had if latents_of is None else 1
    if type(vae) is not KLAutoencoder or not least <= channels <= 8 * had:
        raise ValueError(
            f"model.latent_channels: {channels} beside {type(vae).__name__} with {had}; allowed: {least} to "
            f"{8 * had}, beside an AutoencoderKL"
        )
    config = {key: value for key, value in vae.config.items() if key in vae.rules}
    unset = {"latents_mean": None, "latents_std": None}  # they are of the channels before
    other = KLAutoencoder(**{**config, **unset, "latent_channels": channels})
    return add_latents(vae, other) if channels > had else keep_principal_latents(vae, other, latents_of(vae))


def choose_backward(vae: ExactAutoencoder | Autoencoder, recompute: str) -> None:
    """Choose what the backward pass recomputes instead of keeping it in memory.

    recompute: "no" recomputes nothing, "norms" GroupNorms and SiLUs, "blocks" whole blocks. With "norms" on a CPU,
    convolutions in float32 also use Winograd's algorithm, where that is faster (`WinogradOps`).
    """
    if recompute == "blocks":
        vae.enable_gradient_checkpointing()
    if recompute != "norms":
        return
    winograd = WinogradOps() if vae.device.type == "cpu" else None
    for block in vae.modules():
        if isinstance(block, ResnetBlock):
            block.norm_silu_conv = winograd.norm_silu_conv if winograd else recomputed_norm_silu_conv
        elif isinstance(block, Upsample) and winograd:
            block.upsample_conv = winograd.upsample_conv


def allow_compilations(sizes: int) -> None:
    """Let torch compile networks for `sizes` image sizes; beyond its limit, eight, it would run them uncompiled."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * sizes)  # each size with gradients and without


@dataclass
class Reconstruction:
    """What `TrainedModel` returns: all that the objective needs.

    images: the reconstructions, (B, C, H, W). targets: the images that they should be, same shape. encoded: the
    encoder's input, without the noise of a denoising autoencoder; the targets differ from it if the view transforms
    latents and images. code: what the bottleneck returned: latents, penalties. log_scale: of the likelihood, a
    scalar; None where it is fixed. features: the input of the decoder's last convolution, (B, first width, H, W),
    detached. learned: name of a term -> the output of its learned layer.

    It is not a tuple, because accelerate would convert half-precision tensors in a tuple to float32.
    """

    images: Tensor
    targets: Tensor
    encoded: Tensor
    code: Code
    log_scale: Tensor | None
    features: Tensor
    learned: dict[str, Tensor]


class TrainedModel(nn.Module):
    """The module that the optimizer trains and DDP wraps; `forward` computes all that the objective needs.

    learn_scale: whether the likelihood's scale is a parameter. decoder_only: freeze the encoder. learned: name of a
    term -> its layer on the latents. denoising: standard deviation of the noise on the encoder's input.
    label_dropout: share of the labels that are replaced by "no label".
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
        # any other bottleneck is already a module of `vae`
        self.outside = bottleneck if _is_gaussian(vae) else None
        self.view, self.denoising, self.label_dropout = view, denoising, label_dropout
        # `from_pretrained` returns it in evaluation mode, in which gradients cost a second forward pass
        self.vae = vae.train()
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
        """Compile encoder and decoder, except the last convolution, whose input the adaptive weight needs.

        They are compiled again for each size of images: see `allow_compilations`.
        """
        self.vae.encoder.compile()
        self.vae.decoder.features = torch.compile(self.vae.decoder.features)

    def forward(
        self, images: Tensor, noise: Tensor, draws: Draws | None = None, labels: Tensor | None = None
    ) -> Reconstruction:
        """Encode, apply bottleneck and view, decode.

        images: (B, C, H, W) in [-1, 1]. noise: for the bottleneck, (B, *noise_shape), standard normal. draws:
        random numbers for the view, denoising and label dropout; without them the latter two do nothing. labels:
        (B,) int64, for a model with classes.
        """
        vae = self.vae
        if hasattr(self.view, "at_encoder"):
            images = self.view.at_encoder(images, vae.downsampling, draws)
            noise = self._crop_noise(noise, images)
        condition = () if labels is None else (self._drop_labels(labels, draws),)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            moments = vae.moments(self._add_input_noise(images, draws), *condition)
        code = self.bottleneck(moments, noise, images[0].numel())
        z, targets = self.view(code.z, images, draws)
        features = vae.features(z, *condition)
        if torch.is_autocast_enabled(
            features.device.type
        ):  # as the convolution would; only this copy is kept
            features = features.to(torch.get_autocast_dtype(features.device.type))
        reconstruction = vae.decoder.conv_out(features)
        learned = {name: layer(code.z) for name, layer in self.learned.items()}
        return Reconstruction(
            reconstruction, targets, images, code, self.log_scale, features.detach(), learned
        )

    def _add_input_noise(self, images: Tensor, draws: Draws | None) -> Tensor:
        """The encoder's input: the images, with normal noise added in a denoising autoencoder."""
        if not self.denoising or draws is None:
            return images
        return images + self.denoising * draws.for_purpose(INPUT_NOISE).normal(*images.shape[1:])

    def _drop_labels(self, labels: Tensor, draws: Draws | None) -> Tensor:
        """The labels (B,), a share `label_dropout` of them replaced by the number of classes, "no label"."""
        if not self.label_dropout or draws is None:
            return labels
        dropped = draws.for_purpose(LABELS).uniform(0, 1) < self.label_dropout
        return torch.where(dropped, self.vae.config.classes, labels)

    def _crop_noise(self, noise: Tensor, images: Tensor) -> Tensor:
        """Cut noise that was drawn for whole crops to the shape that the bottleneck needs for smaller `images`."""
        height, width = (side // self.vae.downsampling for side in images.shape[2:])
        shape = self.bottleneck.noise_shape((self.vae.config.latent_channels, height, width))
        return noise[(slice(None), *map(slice, shape))]
