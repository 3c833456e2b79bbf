"""`Codec`: an autoencoder and an entropy model as an image codec."""

import hashlib
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.image_io import load_image, pad_to_multiple, tensor_to_images
from ..models.autoencoder_kl import ExactAutoencoder
from ..models.large_images import prepare_for
from . import container, tiles
from .container import Header
from .context_model import ContextModel
from .prediction import EntropyModel, decode_symbols, encode_symbols
from .static_model import StaticModel
from .steps import HIGHEST, LOWEST, check_quality, step_of

LARGEST_SYMBOL = 1 << 15  # largest magnitude of a rounded latent, in steps
Photograph = str | os.PathLike | Image.Image | Tensor


class Codec:
    """Compresses images to bytes and back with one autoencoder.

    The latents are the posterior's mode, scaled to about unit deviation and rounded to multiples of the step. They
    are coded with tables of probabilities chosen by an entropy model. Decoding returns the same whole numbers on
    any machine, and sets each latent to the value within its step that the entropy model expects, or to the step's
    middle if the autoencoder was trained with that. The images that the network decodes from these differ between
    machines by rounding errors of floats.

    vae: an autoencoder of RGB images, in evaluation mode. name: for people, stored in the files. learned: the
    entropy model trained for it; None for static tables, which are fitted to each image. Raises ValueError if
    `learned` is for another number of channels.
    """

    def __init__(self, vae: ExactAutoencoder, name: str, learned: ContextModel | None = None):
        self.vae, self.name, self.learned = vae, name, learned
        self.model_hash = weights_hash(vae)
        channels = self.latent_shape(1, 1)[0]
        if learned and learned.channels != channels:
            raise ValueError(
                f"{name} has latents of {channels} channels, its entropy model {learned.channels}"
            )

    # ---------------------------------------------------------------- images <-> bytes

    def compress(self, image: Photograph, quality: int) -> bytes:
        """Compress an image, as `public.compress` takes it, to a file of this quality, 1 to 100.

        Raises ValueError for another quality, and the errors of `latents`.
        """
        check_quality(quality)
        return self.packed(*self.latents(image), quality)

    def compress_to(self, image: Photograph, most_bytes: int) -> bytes:
        """Compress at the best quality that takes at most `most_bytes` bytes. Raises ValueError if none does."""
        latents, size = self.latents(image)
        return best_quality(lambda quality: self.packed(latents, size, quality), most_bytes)

    def decompress(self, data: bytes) -> Image.Image:
        """Decompress a file to an RGB image. Raises ValueError for a damaged file and one of another model."""
        header, chunks = container.unpack(data)
        self.check_models(header)
        _, latents = self.decoded(header, chunks)
        return self.image(latents, header.quality, (header.height, header.width))

    # ---------------------------------------------------------------- images <-> latents

    @torch.inference_mode()
    def latents(self, image: Photograph) -> tuple[Tensor, tuple[int, int]]:
        """Encode an image: scaled latents (C, h, w), float32 on the CPU, and the image's (height, width).

        Raises ValueError for a tensor that is not (3, H, W) or (1, 3, H, W) and for latents that are not finite,
        and the errors of `load_image`.
        """
        images = image if isinstance(image, Tensor) else load_image(image, multiple_of=1)
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4 or images.shape[:2] != (1, 3):
            raise ValueError(f"image: shape {tuple(images.shape)}; allowed: (3, H, W) and (1, 3, H, W)")
        height, width = images.shape[2:]
        prepare_for(self.vae, height, width)
        images = pad_to_multiple(images, self.vae.size_multiple).to(self.vae.device, self.vae.dtype)
        latents = self.vae.scale(self.vae.encode(images).latent_dist.mode())[0].float().cpu()
        if not latents.isfinite().all():
            raise ValueError("the model's latents of this image are not finite; in float32 they may be")
        return latents, (height, width)

    @torch.inference_mode()
    def image(self, latents: np.ndarray, quality: int, size: tuple[int, int]) -> Image.Image:
        """Decode latents in steps (C, h, w) to the image of `size` (height, width)."""
        scaled = torch.from_numpy(latents).float() * step_of(quality)
        latents = self.vae.unscale(scaled[None].to(self.vae.device, self.vae.dtype))
        prepare_for(self.vae, *size)
        decoded = self.vae.decode(latents).sample[:, :, : size[0], : size[1]]
        (image,) = tensor_to_images(decoded)
        return image

    # ---------------------------------------------------------------- latents <-> bytes

    def packed(self, latents: Tensor, size: tuple[int, int], quality: int) -> bytes:
        """Round and code scaled latents (C, h, w) of an image of `size` (height, width): the bytes of the file."""
        symbols = rounded(latents, quality)
        model = self.learned or StaticModel.fit(symbols)
        chunks = [
            encode_symbols(symbols[:, rows, columns], model, quality)
            for rows, columns in tiles.tiles(*symbols.shape[1:])
        ]
        header = Header(quality, self.name, self.model_hash, self._entropy_hash, *size, side=model.side)
        return container.pack(header, chunks)

    def decoded(self, header: Header, chunks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The latents of a file, (C, h, w): in whole steps, int32, and as they are decoded, in steps, float32.

        Raises ValueError if they are damaged.
        """
        shape = self.latent_shape(header.height, header.width)
        if len(chunks) != tiles.count(*shape[1:]):
            raise ValueError(f"damaged: {len(chunks)} chunks for {header.width}x{header.height} pixels")
        prepare_for(self.vae, header.height, header.width)
        model = self._model_of(header, shape[0])
        symbols, latents = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for data, (rows, columns) in zip(chunks, tiles.tiles(*shape[1:]), strict=True):
            part = (slice(None), rows, columns)
            symbols[part], latents[part] = decode_symbols(data, symbols[part].shape, model, header.quality)
        if np.abs(symbols).max() > 2 * LARGEST_SYMBOL:
            raise ValueError("damaged: a latent that no image has")
        return symbols, latents

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape (C, h, w) of the scaled latents of an image of height x width pixels."""
        multiple, f = self.vae.size_multiple, self.vae.downsampling
        patch = multiple // f
        rows, columns = (-(-side // multiple) for side in (height, width))
        return self.vae.config.latent_channels * patch**2, rows, columns

    def check_models(self, header: Header) -> None:
        """Raise ValueError for a file of another autoencoder or entropy model, and for a quality out of range."""
        if not LOWEST <= header.quality <= HIGHEST:
            raise ValueError(f"damaged: quality {header.quality}; allowed: {LOWEST} to {HIGHEST}")
        if header.model_hash != self.model_hash:
            made, here = header.model_hash.hex(), self.model_hash.hex()
            name = header.model_name[:60]
            raise ValueError(f"was made with the model {name!r} of weights {made}; {self.name} has {here}")
        if header.entropy_hash not in (b"", self._entropy_hash):
            made, here = header.entropy_hash.hex(), self._entropy_hash.hex() or "none"
            raise ValueError(f"was made with the entropy model {made}; {self.name} has {here}")

    @property
    def _entropy_hash(self) -> bytes:
        return self.learned.hash if self.learned else b""

    def _model_of(self, header: Header, channels: int) -> EntropyModel:
        return self.learned if header.entropy_hash else StaticModel.from_side(header.side, channels)


def rounded(latents: Tensor, quality: int) -> np.ndarray:
    """Round scaled latents (C, h, w) to whole steps, int32, halves up. Raises ValueError beyond LARGEST_SYMBOL."""
    symbols = latents.double().div_(step_of(quality)).add_(0.5).floor_().numpy()
    if np.abs(symbols).max() > LARGEST_SYMBOL:
        raise ValueError(f"latents of {np.abs(symbols).max():.3g} steps; allowed: up to {LARGEST_SYMBOL}")
    return symbols.astype(np.int32)


def best_quality(packed: Callable[[int], bytes], most_bytes: int) -> bytes:
    """Find, by bisection, the highest quality whose file has at most `most_bytes` bytes, and return that file.

    packed: quality -> file, taken to grow with the quality. Raises ValueError if no quality fits.
    """
    best, low, high = None, LOWEST, HIGHEST
    while low <= high:
        middle = (low + high) // 2
        data = packed(middle)
        if len(data) <= most_bytes:
            best, low = data, middle + 1
        else:
            high, smallest = middle - 1, len(data)
    if best is None:
        raise ValueError(f"{most_bytes:,} bytes are too few; at quality {LOWEST} it takes {smallest:,}")
    return best


def bytes_of(bits_a_pixel: float, size: tuple[int, int]) -> int:
    """The bytes, rounded down, of `bits_a_pixel` for each pixel of an image of `size` (height, width)."""
    return math.floor(bits_a_pixel * size[0] * size[1] / 8)


def weights_hash(vae: ExactAutoencoder) -> bytes:
    """The first 6 bytes of the SHA-256 of all tensors as float32 and of the scaling.

    It does not change if exactly these values are stored in another type, such as half precision.
    """
    digest = hashlib.sha256(f"norm_num_groups {vae.config.norm_num_groups} {vae.scaling}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.digest()[: container.MODEL_BYTES]
