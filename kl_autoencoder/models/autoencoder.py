"""`Autoencoder`: autoencoders with other bottlenecks, other networks or class conditions than `KLAutoencoder`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from typing_extensions import Self

from ..files import read_tensors, shown, sync_files
from ..networks.bottlenecks import BOTTLENECKS, Bottleneck, Discrete
from ..networks.conditions import ConditionalDecoder, ConditionalEncoder
from ..networks.convolutional import Decoder, Encoder
from ..networks.mlp import MLPDecoder, MLPEncoder
from . import scaling, single_file
from .autoencoder_kl import KLAutoencoderOutput
from .config import FAMILY_RULES, MOST_PARAMETERS, RULES, check_config, check_rules
from .folder import CONFIG, read_headers, read_json


class Autoencoder(scaling.ScaledLatents, ModelMixin, ConfigMixin):
    """An autoencoder of images that plain diffusers has no class for.

    `encode`, `decode` and calling work as in `KLAutoencoder`, with class labels if there are classes. It is loaded
    and saved like every model of diffusers; the class name in its config.json is `Autoencoder`.

    Args (all by name):
        network: "conv", that of KLAutoencoder, or "mlp", fully connected, for images of one size.
        bottleneck: {"kind": ..., and its options}, see `networks.bottlenecks`.
        in_channels, out_channels: channels of the images read and written.
        sample_size: side of the images in pixels; an mlp takes images of this size only.
        latent_channels: channels of the latents; of an mlp they are (B, latent_channels, 1, 1).
        block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention: of a conv network.
        hidden_sizes: widths of the hidden layers of an mlp's encoder; its decoder has them in reverse.
        classes: number of classes of a conditional autoencoder; 0: without conditions.
        scaling_factor: factor by which `scale` multiplies latents.

    Raises ValueError for a configuration that no network can have, naming the key.
    """

    rules = FAMILY_RULES

    @register_to_config
    def __init__(
        self,
        network: str = "conv",
        bottleneck: Mapping[str, Any] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int = 32,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        hidden_sizes: tuple[int, ...] = (400,),
        classes: int = 0,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        bottleneck = {"kind": "kl"} if bottleneck is None else bottleneck
        self.register_to_config(bottleneck=bottleneck)
        check_family(self.config)
        self.bottleneck_module = build_bottleneck(bottleneck, latent_channels)
        channels = self.bottleneck_module.encoder_channels(latent_channels)
        self.is_mlp = network == "mlp"
        if self.is_mlp:
            self.encoder: nn.Module = MLPEncoder(
                (in_channels, sample_size, sample_size), hidden_sizes, channels, classes
            )
            self.decoder: nn.Module = MLPDecoder(
                latent_channels, hidden_sizes, (out_channels, sample_size, sample_size), classes
            )
            return
        shape = [tuple(block_out_channels), layers_per_block, norm_num_groups, mid_block_add_attention]
        if classes:
            self.encoder = ConditionalEncoder(in_channels, latent_channels, *shape, classes=classes)
            self.decoder = ConditionalDecoder(latent_channels, out_channels, *shape, classes=classes)
        else:
            self.encoder = Encoder(in_channels, latent_channels, *shape)
            self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.encoder.conv_out = nn.Conv2d(block_out_channels[-1], channels, 3, padding=1)

    @property
    def downsampling(self) -> int:
        """Image pixels for each latent pixel, per side."""
        return self.config.sample_size if self.is_mlp else 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Height and width of images must be multiples of this."""
        return self.downsampling

    @property
    def is_discrete(self) -> bool:
        """Whether latents are codes, with `encode_indices` and `decode_indices`."""
        return isinstance(self.bottleneck_module, Discrete)

    @property
    def is_vq_model(self) -> bool:
        """Whether `to_vq_model` can convert it to diffusers' VQModel."""
        return not self.is_mlp and not self.config.classes and self.config.bottleneck["kind"] == "vq"

    @property
    def codes(self) -> int | None:
        """Number of codes; None if latents are not discrete."""
        return self.bottleneck_module.codes if isinstance(self.bottleneck_module, Discrete) else None

    # ---------------------------------------------------------------- images <-> latents

    def moments(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> the bottleneck's input, (B, encoder_channels, h, w)."""
        self._check_images(x)
        return self.encoder(x, labels) if self._is_conditional(labels) else self.encoder(x)

    def features(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) -> the input of the decoder's last layer, `decoder.conv_out`."""
        return self.decoder.features(z, labels) if self._is_conditional(labels) else self.decoder.features(z)

    def encode(
        self, x: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple:
        """Images (B, in_channels, H, W) in [-1, 1], labels (B,) -> `.latent_dist` over latents (B, C, h, w).

        The posterior is a `DiagonalGaussian` if the bottleneck is kl, else a `PointPosterior`. Raises ValueError
        for images of another size or number of channels, and for labels if the model has no classes.
        """
        posterior = self.bottleneck_module.posterior(self.moments(x, labels))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w), labels (B,) -> `.sample`, images (B, out_channels, H, W), not clamped.

        Raises ValueError for latents of another shape, and for labels if the model has no classes.
        """
        channels, sides = self.config.latent_channels, "1, 1" if self.is_mlp else "h, w"
        if z.ndim != 4 or z.shape[1] != channels or (self.is_mlp and z.shape[2:] != (1, 1)):
            raise ValueError(f"z: shape {tuple(z.shape)}; allowed: (B, {channels}, {sides})")
        images = self.decoder.conv_out(self.features(z, labels))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self, sample: Tensor, labels: Tensor | None = None, return_dict: bool = True
    ) -> BaseOutput | tuple[Tensor]:
        """Images (B, in_channels, H, W) in [-1, 1] -> reconstruction of the posterior's mode, and the posterior."""
        posterior = self.encode(sample, labels).latent_dist
        images = self.decode(posterior.mode(), labels).sample
        return KLAutoencoderOutput(images, posterior) if return_dict else (images,)

    def encode_indices(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, in_channels, H, W) -> codes (B, h, w), int64. ValueError if latents are not discrete."""
        return self._discrete.indices(self.moments(x, labels))

    def decode_indices(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Codes (B, h, w), int64 -> images (B, out_channels, H, W). ValueError if latents are not discrete."""
        return self.decode(self._discrete.from_indices(indices).to(self.dtype), labels).sample

    @property
    def scaling(self) -> dict[str, Any]:
        """The scaling that `scale` and `unscale` apply, as it is kept in files of latents."""
        return {"scaling_factor": self.config.scaling_factor}

    # ---------------------------------------------------------------- reading and writing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """A folder or hub id -> the model, in evaluation mode. Takes the arguments of diffusers' method.

        Raises ValueError if tensors are missing or left over, and if the config does not fit the tensors.
        """
        kwargs.setdefault("use_safetensors", True)
        folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if os.path.isdir(folder):
            cls._check_folder(folder)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, low_cpu_mem_usage=False, **kwargs
        )
        model, info = loaded
        single_file.refuse(str(pretrained_model_name_or_path), info["missing_keys"], info["unexpected_keys"])
        return model

    @classmethod
    def from_single_file(cls, path: str | os.PathLike, **config: Any) -> Self:
        """A training run's checkpoint, and the entries of its `config` -> the model, in evaluation mode.

        Raises ValueError naming the file and what is missing or left over.
        """
        tensors, _ = read_tensors(os.fspath(path))
        if any(name.startswith("vae.") for name in tensors):  # the model among other modules of training
            tensors = {n.removeprefix("vae."): t for n, t in tensors.items() if n.startswith("vae.")}
        model: Any = cls.from_config({key: value for key, value in config.items() if key in cls.rules})
        single_file.check_state({k: v.shape for k, v in model.state_dict().items()}, tensors, path)
        model.load_state_dict(tensors)
        return model.eval()

    @classmethod
    def _check_folder(cls, folder: str) -> None:
        """Compare the config of a local folder with its tensors before anything large is built."""
        tensors, config = read_headers(Path(folder)), read_json(Path(folder, CONFIG))
        try:
            with torch.device("meta"):
                model: Any = cls.from_config({k: v for k, v in config.items() if k in cls.rules})
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if tensors:
            single_file.check_state({k: v.shape for k, v in model.state_dict().items()}, tensors, folder)

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any) -> None:
        """Write a folder that `from_pretrained` loads. Takes the arguments of diffusers' method."""
        folder = Path(save_directory)
        super().save_pretrained(save_directory, *arguments, **options)
        sync_files([folder / CONFIG, *folder.glob("diffusion_pytorch_model*")])

    def to_vq_model(self) -> VQModel:
        """Return diffusers' VQModel of the same function, with copies of the weights; plain diffusers loads it.

        Raises ValueError unless the model is convolutional, without classes, and has the bottleneck vq.
        """
        c = self.config
        if not self.is_vq_model:
            raise ValueError(
                f"network={c.network}, bottleneck {c.bottleneck['kind']}, classes={c.classes}; allowed for "
                "a VQModel: conv, vq and 0"
            )
        levels, channels = len(c.block_out_channels), c.latent_channels
        model = VQModel(
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(c.block_out_channels),
            layers_per_block=c.layers_per_block,
            latent_channels=channels,
            sample_size=c.sample_size,
            num_vq_embeddings=self.codes,
            norm_num_groups=c.norm_num_groups,
            vq_embed_dim=channels,
            scaling_factor=c.scaling_factor,
            mid_block_add_attention=c.mid_block_add_attention,
        )
        identity = torch.eye(channels)[:, :, None, None]
        tensors = {
            name: t for name, t in self.state_dict().items() if name.startswith(("encoder.", "decoder."))
        }
        tensors["quantize.embedding.weight"] = self.bottleneck_module.codebook
        for conv in ("quant_conv", "post_quant_conv"):  # 1x1 convolutions that our model does not have
            tensors |= {f"{conv}.weight": identity, f"{conv}.bias": torch.zeros(channels)}
        model.load_state_dict(tensors)
        return model.to(self.device, self.dtype).train(self.training)

    # ---------------------------------------------------------------- errors

    @property
    def _discrete(self) -> Discrete:
        if not isinstance(self.bottleneck_module, Discrete):
            kind = self.config.bottleneck["kind"]
            raise ValueError(f"bottleneck.kind: {kind}; allowed for codes: vq, fsq, gumbel")
        return self.bottleneck_module

    def _is_conditional(self, labels: Tensor | None) -> bool:
        """Whether the model has classes. ValueError if it has none and `labels` are given."""
        if labels is not None and not self.config.classes:
            raise ValueError("labels: given to a model without classes; allowed: none")
        return self.config.classes > 0

    def _check_images(self, x: Tensor) -> None:
        channels, f, size = self.config.in_channels, self.downsampling, self.config.sample_size
        sides = f"{size}, {size}" if self.is_mlp else f"H, W, multiples of {f}"
        fits = x.ndim == 4 and x.shape[1] == channels and all(n and n % f == 0 for n in x.shape[2:])
        if not fits or (self.is_mlp and x.shape[2:] != (size, size)):
            raise ValueError(f"x: shape {tuple(x.shape)}; allowed: (B, {channels}, {sides})")


def build_bottleneck(config: Mapping[str, Any], latent_channels: int) -> Bottleneck:
    """Make the bottleneck of `config`, {"kind": ..., options}.

    ValueError for an unknown kind or an invalid option.
    """
    options = {name: value for name, value in config.items() if name != "kind"}
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in BOTTLENECKS:
        raise ValueError(f"bottleneck.kind: {shown(kind)}; allowed: {', '.join(BOTTLENECKS)}")
    try:
        return BOTTLENECKS[kind](latent_channels, **options)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"bottleneck: {shown(dict(config))}: {str(error)[:120]}") from None


def check_family(config: Mapping[str, Any]) -> None:
    """Check the config of an `Autoencoder`. Raises ValueError naming the key."""
    check_rules(config, FAMILY_RULES)
    if config["network"] == "conv":
        kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        rest = dict.fromkeys((key for key in RULES if key not in config), False)
        check_config({**rest, **config, **kinds, "latents_mean": None, "latents_std": None}, {})
        return
    values = max(config["in_channels"], config["out_channels"]) * config["sample_size"] ** 2
    widest = max((config["latent_channels"], *config["hidden_sizes"]))
    if values * widest > MOST_PARAMETERS:
        raise ValueError(
            f"sample_size, hidden_sizes: {config['sample_size']}, {shown(tuple(config['hidden_sizes']))}: "
            f"{values * widest:.2g} parameters in a layer; allowed: up to {MOST_PARAMETERS:.0e}"
        )
