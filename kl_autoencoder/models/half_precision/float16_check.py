"""The images that `fp16-check` measures, and the comparison of a model in float16 with itself in float32."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from PIL import Image
from torch import Tensor

from ...data.image_io import load_image
from ...extras import needs
from ..autoencoder_kl import KLAutoencoder
from .float16 import LARGEST, LIMIT, MARGIN, WATCHED, Activations, copied, decoded, encoded

SAMPLES = ("astronaut", "chelsea", "coffee", "rocket")  # colour photographs that come with scikit-image


def sample_photographs(size: int) -> Iterator[Tensor]:
    """Yield scikit-image's photographs SAMPLES, (1, 3, size, size) each, in [-1, 1].

    Raises MissingExtra without scikit-image.
    """
    with needs("eval"):
        from skimage import data

    for name in SAMPLES:
        yield load_image(Image.fromarray(getattr(data, name)()), size, multiple_of=1)


def hard_images(size: int) -> Iterator[Tensor]:
    """Yield images (1, 3, size, size) in [-1, 1]: black, white, an edge, a checkerboard, noise of -1 and 1."""
    shape = (1, 3, size, size)
    x = torch.arange(size)
    yield from (torch.full(shape, level) for level in (-1.0, 1.0))
    yield torch.where(x < size // 2, -1.0, 1.0).expand(shape).contiguous()
    yield ((x[:, None] + x) % 2 * 2.0 - 1).expand(shape).contiguous()
    yield torch.randint(2, shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def noise_latents(vae: KLAutoencoder, size: int) -> Tensor:
    """Return the noise that a diffusion model begins with, as raw latents: (1, C, size / f, size / f)."""
    shape = (1, vae.config.latent_channels, size // vae.downsampling, size // vae.downsampling)
    return vae.unscale(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def in_float16(vae: KLAutoencoder) -> KLAutoencoder:
    """Return a copy of the model that computes in float16, emulated on other devices than a GPU.

    torch's float16 convolutions on a CPU take minutes. So there the copy computes in float32, with its weights and
    the input and output of each layer rounded to float16: sums are in float32, as on a GPU.
    """
    if vae.device.type == "cuda":
        return copied(vae, torch.float16)
    half = copied(copied(vae, torch.float16), torch.float32)
    for module in half.modules():
        if isinstance(module, WATCHED):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.half().float() for x in inputs))
            module.register_forward_hook(lambda _, inputs, output: output.half().float())
    return half


class Difference:
    """The difference between tensors and the wanted ones, accumulated over any number of pairs."""

    def __init__(self):
        self.low, self.high = math.inf, -math.inf
        self.largest = self.squares = 0.0
        self.count = 0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        """Take in a pair of tensors of the same shape."""
        wanted, got = wanted.cpu().double(), got.cpu().double()
        difference = (got - wanted).abs().nan_to_num(math.inf, math.inf)
        self.low, self.high = min(self.low, wanted.min().item()), max(self.high, wanted.max().item())
        self.largest = max(self.largest, difference.max().item())
        self.squares += difference.square().sum().item()
        self.count += difference.numel()

    @property
    def relative(self) -> float:
        """The largest |difference| over the range of the wanted values; infinite if any value is not finite."""
        return self.largest / (self.high - self.low) if self.largest else 0.0

    @property
    def psnr(self) -> float:
        """PSNR in dB, with the range of the wanted values as peak; minus infinity if any value is not finite."""
        error = self.squares / self.count / (self.high - self.low) ** 2
        return -10 * math.log10(error) if error else math.inf

    def __str__(self) -> str:
        return f"{self.psnr:.1f} dB" if math.isfinite(self.largest) else "not finite (black)"


@torch.no_grad()
def compare(
    vae: KLAutoencoder,
    others: Mapping[str, KLAutoencoder],
    images: Iterable[Tensor],
    latents: Iterable[Tensor],
) -> dict[str, tuple[Difference, Difference]]:
    """Return for each of `others`, by name, its differences from `vae` in latents and in images.

    Latents are compared for `images` (B, C, H, W). Images are compared as decoded from the latents of `vae` for
    these, and from the raw `latents` (B, C, h, w).
    """
    found = {name: (Difference(), Difference()) for name in others}

    def decode(z: Tensor) -> None:
        wanted = decoded(vae, z)
        for name, other in others.items():
            found[name][1].add(wanted, decoded(other, z))

    for x in images:
        z = encoded(vae, x)
        for name, other in others.items():
            found[name][0].add(z, encoded(other, x))
        decode(z)
    for z in latents:
        decode(z)
    return found


def layers_table(columns: Mapping[str, Activations], worst: int = 10) -> str:
    """Return a table of the `worst` layers of the first column, with their largest |values| in all columns."""
    values = [activations.by_layer() for activations in columns.values()]
    lines = ["".join(f"{name:>12}" for name in columns) + f"  layer (float16 ends at {LARGEST:,.0f})"]
    for layer in list(values[0])[:worst]:
        lines.append("".join(f"{column[layer]:12,.1f}" for column in values) + f"  {layer}")
    return "\n".join(lines)


def verdict(reached: Activations) -> str:
    """Return in words whether these activations are safe in float16."""
    overflow, unsafe, count = len(reached.unsafe(LARGEST)), len(reached.unsafe()), len(reached.largest)
    limit = f"{LIMIT:,.0f} (1/{MARGIN:g} of {LARGEST:,.0f}, as other images reach further)"
    if not unsafe:
        return f"safe in float16: all {count} tensors stay within {limit}"
    return f"unsafe in float16: of {count} tensors {overflow} overflow, {unsafe} exceed {limit}"
