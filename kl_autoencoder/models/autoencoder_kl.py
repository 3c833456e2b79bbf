"""`KLAutoencoder`: our network as a diffusers component, an AutoencoderKL."""

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from typing_extensions import Self

from ..files import sync_files
from ..inference.dispatch import infer
from ..networks.attention import AttentionBlock
from ..networks.convolutional import Decoder, Encoder
from ..networks.distributions import DiagonalGaussian
from . import scaling, single_file
from .compatibility import SAME_ATTENTION, EqualsDiffusersClass, OwnAttention
from .config import RULES, Rule, check_config, decoder_block_out_channels
from .folder import CONFIG, read_headers, read_json
from .packaged import packaged

HUB_ARGUMENTS = {"token", "cache_dir", "revision", "proxies", "force_download", "local_files_only"}
Method = TypeVar("Method")
# diffusers' decorator has no types; without this cast type checkers would take the whole class for Any
_registers_config = cast(Callable[[Method], Method], register_to_config)


@dataclass
class KLAutoencoderOutput(BaseOutput):
    """sample: reconstruction (B, out_channels, H, W); latent_dist: the posterior of its latents."""

    sample: Tensor
    latent_dist: DiagonalGaussian


if TYPE_CHECKING:  # derived classes are also an AutoencoderKL or the like, whose members are used here
    _Diffusers = AutoencoderKL
else:
    _Diffusers = ModelMixin


class ExactAutoencoder(  # type: ignore[misc]  # as diffusers' own bases
    scaling.ScaledLatents, _Diffusers, metaclass=EqualsDiffusersClass
):
    """The common base of our autoencoders: the network, its execution, loading and saving.

    A derived class also derives from the class of diffusers that it `stands_for`. It defines `rules` for the keys
    of its config, and an `__init__` with the arguments of diffusers' class, which calls `_build`.
    """

    _no_split_modules = ["ResnetBlock", "AttentionBlock"]  # noqa: RUF012  (of device maps)

    stands_for: type  # the class of diffusers whose name it has, also in files
    rules: dict[str, Rule]  # key of the config -> allowed values

    config: Any  # diffusers' FrozenDict, whose entries are attributes too
    encoder: Encoder  # type: ignore[assignment]  # in place of diffusers'
    decoder: Decoder  # type: ignore[assignment]

    def _build(self) -> None:
        """Make the networks of the config, and the attributes of diffusers' class, but not diffusers' networks."""
        ModelMixin.__init__(self)
        check_config(self.config, self.rules)
        block_out_channels, latent_channels = self.config.block_out_channels, self.config.latent_channels
        levels = len(block_out_channels)
        kinds = {key: (self.config[key][0],) * levels for key in ("down_block_types", "up_block_types")}
        # One kind stands for all levels. It must not count as a default: from_config(vae.config) would restore it.
        defaults = [key for key in self.config.get("_use_default_values", ()) if key not in kinds]
        self.register_to_config(**kinds, _use_default_values=defaults)

        shape = [
            self.config[key] for key in ("layers_per_block", "norm_num_groups", "mid_block_add_attention")
        ]
        widths, decoder_widths = tuple(block_out_channels), tuple(decoder_block_out_channels(self.config))
        self.encoder = Encoder(self.config.in_channels, latent_channels, widths, *shape)
        self.decoder = Decoder(latent_channels, self.config.out_channels, decoder_widths, *shape)
        quant, post_quant = self.config.use_quant_conv, self.config.use_post_quant_conv
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if quant else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if post_quant else None

        self.use_slicing = self.use_tiling = self.use_offload = False
        # Sizes of diffusers' approximate tiles, for programs that read or set them; nothing here depends on them.
        size = self.config.sample_size
        side = size[0] if isinstance(size, (list, tuple)) else size
        self.tile_sample_min_size, self.tile_latent_min_size = side, side // self.downsampling
        self.tile_overlap_factor = 0.25
        self.set_default_attn_processor()
        self.__module__ = self.stands_for.__module__  # see `__init_subclass__`

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Give a derived class the `__name__` of diffusers' class, so that plain diffusers loads what it saves.

        diffusers writes the class's __name__ and the instance's __module__ into config.json and into a pipeline's
        model_index.json, and pipelines load only components of classes of diffusers or transformers. Pickling, repr
        and documentation use __qualname__ and the class's own __module__, which stay ours.
        """
        super().__init_subclass__(**arguments)
        cls.__name__ = cls.stands_for.__name__

    def _get_name(self) -> str:
        return type(self).__qualname__.rpartition(".")[2]  # the name that repr() shows

    @property
    def downsampling(self) -> int:
        """Image pixels for each latent pixel, per side: f = 2 ** (levels - 1)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this for `encode` and `scale`."""
        return self.downsampling * max(self.scaling.get("patch_size", (1,)))

    # ---------------------------------------------------------------- images <-> latents

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Images (B, in_channels, H, W) in [-1, 1] -> `.latent_dist`, a DiagonalGaussian over (B, C, H/f, W/f).

        Raises ValueError for another number of channels, and if H or W is not a multiple of f (diffusers silently
        drops the remaining pixels).
        """
        self._check_images(x)
        posterior = self._encode(x, self.use_tiling)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Raw latents (B, C, h, w) -> `.sample`, images (B, out_channels, f*h, f*w), about [-1, 1], not clamped.

        `generator` is accepted because pipelines pass it; decoding draws no noise. Raises ValueError for latents of
        another shape.
        """
        images = self._decode(z, self.use_tiling)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> KLAutoencoderOutput | tuple[Tensor]:
        """Images -> reconstruction and posterior, all that a loss needs.

        With `return_dict=False` returns only the reconstruction, in a tuple, as diffusers does.

        Args:
            sample: images (B, in_channels, H, W) in [-1, 1].
            sample_posterior: decode a sample of the posterior (drawn by `generator`) instead of its mode.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        images = self.decode(z).sample
        return KLAutoencoderOutput(images, posterior) if return_dict else (images,)

    @property
    def scaling(self) -> dict[str, Any]:
        """The scaling that `scale` and `unscale` apply, as it is kept in files of latents."""
        return {key: self.config.get(key) for key in scaling.SCALING_KEYS}

    def _encode(self, x: Tensor, tiling: bool = False) -> DiagonalGaussian:
        self._check_images(x)
        slices = x.split(1) if self.use_slicing else (x,)
        moments = torch.cat([infer(self.encoder, s, tiling, self.use_offload) for s in slices])
        return DiagonalGaussian(moments if self.quant_conv is None else self.quant_conv(moments))

    def _decode(self, z: Tensor, tiling: bool = False) -> Tensor:
        channels = self.config.latent_channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"z: shape {tuple(z.shape)}; allowed: (B, {channels}, h, w)")
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        slices = z.split(1) if self.use_slicing else (z,)
        return torch.cat([infer(self.decoder, s, tiling, self.use_offload) for s in slices])

    def _check_images(self, x: Tensor) -> None:
        channels, f = self.config.in_channels, self.downsampling
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x: shape {tuple(x.shape)}; allowed: (B, {channels}, H, W)")
        for name, size in zip(("height", "width"), x.shape[2:], strict=True):
            if size % f or not size:
                fits = [n for n in (size // f * f, -(-size // f) * f or f) if n]
                raise ValueError(
                    f"{name} {size} is not a multiple of {f}; {' or '.join(map(str, fits))} would fit "
                    f"(load_image pads to such a size, images.pad_to_multiple pads a tensor)"
                )

    def moments(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> mean and log-variance of the posterior, (B, 2C, H/f, W/f)."""
        return self.encode(x).latent_dist.parameters

    def features(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> the input of the decoder's last convolution, `decoder.conv_out`."""
        return self.decoder.features(z if self.post_quant_conv is None else self.post_quant_conv(z))

    # ---------------------------------------------------------------- the least memory

    def enable_tiling(self, use_tiling: bool = True, offload: bool = False, **tile_sizes: Any) -> None:
        """Encode and decode in the least memory from now on, with the same result: nothing is approximated.

        Images are computed one at a time, on a GPU also in smaller strips (see `inference.dispatch.infer`; outside
        of training the network is executed in strips in any case). This also works under autocast, with LoRA,
        layerwise casting and trainable weights: a backward pass then executes the whole network once more. It does
        not work in training mode with gradients, with hooks and with replaced modules: the network is executed
        whole, with a warning. The arguments of diffusers' tiles (`tile_sample_min_size=512` ...) are accepted and
        ignored.

        Args:
            offload: on a GPU, keep the large activations in host memory, so that GPU memory does not grow with the
                image, except for the keys and values of attention. Estimated, not measured, for decoding
                16384x16384 pixels in bfloat16 at Stable Diffusion's widths: 140 GB of pinned host memory, 10 GB on
                the GPU; 2.6 TB of copies, 50 s at 50 GB/s, in parallel with 1.1 PMAC of convolutions (5 s at 400
                TFLOP/s) and 18 PMAC of attention over 4.2 million positions (2 minutes at 300 TFLOP/s).

        Raises ValueError for an unknown argument.
        """
        unknown = [name for name in tile_sizes if not name.startswith("tile_")]
        if unknown:
            raise ValueError(f"{unknown[0]}: no such argument; allowed: use_tiling, offload, tile_...")
        self.use_tiling, self.use_offload = use_tiling, use_tiling and offload

    def disable_tiling(self) -> None:
        """Undo `enable_tiling`."""
        self.enable_tiling(False)

    def compile_for_inference(self, cuda_graphs: bool = False, **options: Any) -> None:
        """Execute encoder and decoder by torch.compile from now on, except when they are tiled.

        Images of all sizes share a compilation; torch makes another one for batches, and on CPUs one for very small
        images. It is meant for GPUs, where it fuses normalisation and SiLU, as our kernels do, and the operations
        around them (unmeasured). On a CPU execution in strips is faster, since it takes fewer multiplications. If
        memory runs out, the network is tiled.

        Args:
            cuda_graphs: record all kernel launches, once for each size, and replay them together: for small images
                of fixed sizes.
            options: of torch.compile.
        """
        mode = {"mode": "reduce-overhead"} if cuda_graphs else {"dynamic": True}
        for network in (self.encoder, self.decoder):
            network.compile(**{"fullgraph": True, **mode, **options})

    @apply_forward_hook
    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """`encode` as it is after `enable_tiling`."""
        posterior = self._encode(x, tiling=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """`decode` as it is after `enable_tiling`."""
        images = self._decode(z, tiling=True)
        return DecoderOutput(sample=images) if return_dict else (images,)

    # ---------------------------------------------------------------- attention processors

    def set_default_attn_processor(self) -> None:
        """Let the network compute attention itself, by torch's fused kernels, whole or in pieces."""
        self.set_attn_processor(OwnAttention())

    def fuse_qkv_projections(self) -> None:
        """Let diffusers compute attention with query, key and value as one projection, `to_qkv`.

        For programs that call it; it is no faster than the network's own attention.
        """
        for block in self._attentions():
            block.fuse_projections()
        self.set_attn_processor(FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for block in self._attentions():
            block.fuse_projections(False)
        self.set_default_attn_processor()

    def _attentions(self) -> Iterator[AttentionBlock]:
        return (module for module in self.modules() if isinstance(module, AttentionBlock))

    # ---------------------------------------------------------------- reading and writing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """A folder in diffusers' layout, the name of a packaged model or a hub id -> the model, in evaluation mode.

        "compact" and "compact-codec" come with the package; a local folder of that name goes first. Takes
        `torch_dtype`, `subfolder` and the other arguments of diffusers' method. Raises ValueError if tensors are
        missing or left over (diffusers warns and continues with random weights). Weights are safetensors; only
        `use_safetensors=False` opens diffusers' way back to pickles. The config of a local folder is compared with
        the headers of its .safetensors files before anything is built.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source = packaged(pretrained_model_name_or_path)
        folder = Path(source, kwargs.get("subfolder") or "")
        if not folder.is_dir() or any(folder.glob("*.bin")):  # without a folder diffusers' own error is right
            kwargs.setdefault("use_safetensors", True)
        cls._check_folder(folder, kwargs)
        loaded: Any = super().from_pretrained(source, output_loading_info=True, **kwargs)
        model, info = loaded
        single_file.refuse(str(pretrained_model_name_or_path), info["missing_keys"], info["unexpected_keys"])
        return loaded if wants_info else model

    @classmethod
    def _check_folder(cls, folder: Path, options: dict[str, Any]) -> None:
        """Compare the config of a local model folder, overridden by `options`, with its tensors."""
        tensors = read_headers(folder, options.get("variant"))
        if not tensors or options.get("ignore_mismatched_sizes"):
            return
        config = read_json(folder / CONFIG)
        if not (config | options).get("quantization_config"):
            given = {key: value for key, value in options.items() if key in cls.rules}
            tensors = {single_file.modern_name(name): tensor for name, tensor in tensors.items()}
            cls._on_meta(config | given, tensors, folder)

    @classmethod
    def _on_meta(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object) -> Self:
        """Make the model of a config on the meta device, after checking that the config fits `tensors`.

        Raises ValueError naming `source` and the key or the tensors at fault, before anything large is built.
        """
        family = next(base for base in cls.__mro__ if "rules" in vars(base))
        defaults = inspect.signature(vars(family)["__init__"]).parameters
        try:
            whole = {key: config.get(key, defaults[key].default) for key in cls.rules}
            check_config(whole, cls.rules)
            single_file.compare_with_tensors(whole, tensors)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        known = cls.rules.keys() | inspect.signature(cls.__init__).parameters
        with torch.device("meta"):
            model: Any = cls.from_config({key: value for key, value in config.items() if key in known})
        single_file.check_state({k: v.shape for k, v in model.state_dict().items()}, tensors, source)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any) -> None:
        """Write a folder that plain diffusers loads, with file permissions by the umask.

        Takes the arguments of diffusers' method. Raises ValueError if `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder}: is a file; a model is saved as a folder")
        super().save_pretrained(save_directory, *arguments, **options)
        sync_files([folder / "config.json", *folder.glob("diffusion_pytorch_model*")])

    def to_json_string(self) -> str:
        """Return the config as it is saved, without the local path that the model was read from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_diffusers(cls, autoencoder_kl: AutoencoderKL) -> Self:
        """Return our model with the tensors of `autoencoder_kl`, which are shared and not copied.

        Tiling, slicing and special attention processors are taken over; fused projections are not.
        """
        with torch.device("meta"):
            model: Any = cls.from_config(dict(autoencoder_kl.config))
        tensors = dict([*autoencoder_kl.named_parameters(), *autoencoder_kl.named_buffers()])
        for name in model.state_dict():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, tensors[name])
        processors = autoencoder_kl.attn_processors
        if not all(type(processor) in SAME_ATTENTION for processor in processors.values()):
            model.set_attn_processor(processors)
        for name in ("use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size"):
            setattr(model, name, getattr(autoencoder_kl, name))
        model.tile_overlap_factor = autoencoder_kl.tile_overlap_factor
        return model.train(autoencoder_kl.training)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        **config: Any,
    ) -> Self:
        """An LDM-layout .safetensors or .ckpt, the VAE alone or inside a full checkpoint -> the model.

        The configuration comes from the file's metadata or the shapes of its tensors; entries given by name
        (`scaling_factor=0.13025`) override it. The hub is not asked, so diffusers' arguments about it (`token`,
        `cache_dir` ...) have no effect. Raises ValueError naming the file, or an unknown argument.
        """
        unknown = [name for name in config if name not in cls.rules.keys() | HUB_ARGUMENTS]
        if unknown:
            near = get_close_matches(unknown[0], cls.rules, 1)
            hint = f"; perhaps {near[0]}" if near else ""
            raise ValueError(
                f"{unknown[0]}: no such argument; allowed: {', '.join(list(cls.rules)[:4])} ...{hint}"
            )
        config = {name: value for name, value in config.items() if name in cls.rules}
        path = os.fspath(pretrained_model_link_or_path)
        found, tensors = single_file.load_single_file(path, **config)
        model: Any = cls._on_meta(found, tensors, path)
        model.load_state_dict(tensors, assign=True)
        return model.to(torch_dtype).eval() if torch_dtype else model.eval()

    def save_single_file(self, path: str | os.PathLike) -> None:
        """Write the LDM layout (`encoder.down.0.block.0.norm1.weight` ...), with the config in the metadata."""
        config = json.loads(self.to_json_string())
        single_file.save_single_file(path, self.state_dict(), config)


class KLAutoencoder(ExactAutoencoder, AutoencoderKL):  # type: ignore[misc]  # as diffusers' own bases
    """A KL-regularised autoencoder with diffusers' configuration, parameter names and calling conventions.

    In evaluation mode, in which `from_pretrained` returns it, `encode` and `decode` keep no activations, so that a
    backward pass first costs another forward pass. Call `train()` before training.

    Args (all by name; published values in README):
        in_channels, out_channels: channels of the images read and written.
        block_out_channels: width of each level, highest resolution first; f = 2 ** (levels - 1).
        layers_per_block: ResNet blocks a level in the encoder (the decoder has one more).
        latent_channels: channels of the latents.
        norm_num_groups: groups of every GroupNorm; must divide every width.
        sample_size: the image size that the model is made for, in pixels.
        scaling_factor, shift_factor, latents_mean, latents_std: applied by `scale` and `unscale`.
        force_upcast: tells pipelines that run in float16 to decode in float32.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions on the moments and the latents (SD 1, 2, SDXL).
        mid_block_add_attention: self-attention at the lowest resolution.

    Raises ValueError for a configuration that no network can have, naming the key.
    """

    stands_for = AutoencoderKL
    rules = RULES

    @_registers_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        self._build()
