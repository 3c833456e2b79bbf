"""`KLAutoencoderFlux2`: FLUX.2's autoencoder, with the statistics that normalise 2x2 patches of its latents."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from torch import Tensor, nn

from ..files import read_tensors, save_tensors
from . import single_file
from .autoencoder_kl import ExactAutoencoder
from .config import FLUX2_RULES

Method = TypeVar("Method")
_registers_config = cast(Callable[[Method], Method], register_to_config)

STATISTICS = "bn."  # prefix of the batch norm's tensors
# (Black Forest Labs' prefix, ours) of two layers that are inside of encoder and decoder in their files
MOVED_LAYERS = (("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv."))


class KLAutoencoderFlux2(ExactAutoencoder, AutoencoderKLFlux2):
    """A `KLAutoencoder` with AutoencoderKLFlux2's configuration, tensors and calling conventions.

    `encode` returns and `decode` takes raw latents. Diffusion models work on patches of latents, normalised by the
    running statistics of `bn`, a batch norm without weights: `scale` and `unscale` convert. Encoding and decoding
    do not change these statistics; training measures them at its end.

    Args: those of `KLAutoencoder` without scaling and force_upcast, and
        decoder_block_out_channels: widths of the decoder's levels, if they differ from the encoder's.
        batch_norm_eps: added to the variances before taking their square root.
        batch_norm_momentum: not used here, for programs that train with `bn`.
        patch_size: height and width of a patch, in latent pixels.
    """

    stands_for = AutoencoderKLFlux2
    rules = FLUX2_RULES

    @_registers_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        decoder_block_out_channels: tuple[int, ...] | None = None,
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 32,
        norm_num_groups: int = 32,
        sample_size: int = 1024,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        batch_norm_eps: float = 1e-4,
        batch_norm_momentum: float = 0.1,
        patch_size: tuple[int, int] = (2, 2),
    ) -> None:
        defaults = self.config.get("_use_default_values", ())  # the default kinds are for four levels
        kinds = {
            key: self.config[key][:1] for key in ("down_block_types", "up_block_types") if key in defaults
        }
        self.register_to_config(**kinds, _use_default_values=[key for key in defaults if key not in kinds])
        self._build()
        channels = latent_channels * patch_size[0] * patch_size[1]
        self.bn = nn.BatchNorm2d(channels, eps=batch_norm_eps, momentum=batch_norm_momentum, affine=False)

    @property
    def scaling(self) -> dict[str, Any]:
        """The scaling that `scale` and `unscale` apply: mean and deviation of each channel of the patches."""
        statistics = self.bn.running_mean, self.bn.running_var
        mean, variance = (cast(Tensor, tensor).detach().float().cpu() for tensor in statistics)
        return {
            "scaling_factor": 1.0,
            "shift_factor": None,
            "latents_mean": mean.tolist(),
            "latents_std": (variance + self.config.batch_norm_eps).sqrt().tolist(),
            "patch_size": list(self.config.patch_size),
        }

    def set_scaling(self, statistics: Any) -> None:
        """Normalise by the `LatentStatistics` of patches of latents (`scaling.patchify`)."""
        with torch.no_grad():
            self.bn.running_mean.copy_(statistics.mean)  # type: ignore[union-attr]
            self.bn.running_var.copy_(statistics.std**2)  # type: ignore[union-attr]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        **config: Any,
    ) -> "KLAutoencoderFlux2":
        """A .safetensors file of the VAE alone, with Black Forest Labs' or diffusers' names -> the model.

        `config` entries override those of the file. Raises ValueError naming the file.
        """
        path = os.fspath(pretrained_model_link_or_path)
        everything, metadata = read_tensors(path)
        tensors, statistics = _split_off_statistics(everything, to_ours=True)
        try:
            tensors = single_file.ldm_to_diffusers(tensors)
            found = json.loads(metadata.get(single_file.CONFIG_KEY, "null"))
            found = found or _config_of(tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        model: Any = cls._on_meta({**found, **config}, tensors | statistics, path)
        model.load_state_dict(tensors | statistics, assign=True)
        return model.to(torch_dtype).eval() if torch_dtype else model.eval()

    def save_single_file(self, path: str | os.PathLike) -> None:
        """Write a .safetensors file in Black Forest Labs' layout, with the config in its metadata."""
        tensors, statistics = _split_off_statistics(self.state_dict(), to_ours=False)
        config = {key: v for key, v in json.loads(self.to_json_string()).items() if not key.startswith("_")}
        renamed = single_file.diffusers_to_ldm(tensors)
        for theirs, ours in MOVED_LAYERS:
            renamed = {_replace_prefix(name, ours, theirs): tensor for name, tensor in renamed.items()}
        metadata = {single_file.CONFIG_KEY: json.dumps(config, sort_keys=True)}
        save_tensors(path, renamed | statistics, metadata)


def _split_off_statistics(
    tensors: Mapping[str, Tensor], to_ours: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the network's tensors and the statistics.

    to_ours: rename the `MOVED_LAYERS` layers from theirs to our names.
    """
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith(STATISTICS)}
    statistics = {name: tensor for name, tensor in tensors.items() if name.startswith(STATISTICS)}
    for theirs, ours in MOVED_LAYERS if to_ours else ():
        network = {_replace_prefix(name, theirs, ours): tensor for name, tensor in network.items()}
    return network, statistics


def _replace_prefix(name: str, before: str, after: str) -> str:
    return after + name.removeprefix(before) if name.startswith(before) else name


def _config_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config that follows from the shapes of the tensors."""
    config = single_file.config_from_tensors(tensors)
    return {**config, "sample_size": 1024}
