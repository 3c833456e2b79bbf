"""How alike two images are: PSNR, SSIM, MS-SSIM and LPIPS, of (B, C, H, W) tensors in [-1, 1].

All but LPIPS are of the images as they would be saved: clamped and rounded to 8 bits. C is 3 (RGB), 1 (gray) or 4
(RGBA); of RGBA, PSNR and SSIM are of all four channels, LPIPS of the colours alone.
"""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import needs

BACKBONES = {  # what torchvision downloads for each net
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
LPIPS_SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}  # side in pixels below which a layer has none left
SSIM_WINDOW = 11  # pixels a side
MAX_PSNR = 100.0  # dB, where a mean over images is taken: one level in one value of 256x256 gives 101
MS_SSIM_TOO_SMALL = 160  # pixels: 2^4 of them are one at the fifth scale, where 11 are needed


def to_8_bits(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, clamped and rounded."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def from_8_bits(levels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], the inverse of `to_8_bits`."""
    return levels.float() / 127.5 - 1


def as_saved(images: Tensor) -> Tensor:
    """(B, C, H, W) -> the same after writing and reading 8-bit images. NaN is black, as pipelines write it."""
    return from_8_bits(to_8_bits(images.nan_to_num(-1.0, 1.0, -1.0)))


def colours_of(images: Tensor) -> Tensor:
    """(B, 1, 3 or 4, H, W) -> (B, 3, H, W) for networks of RGB: gray three times, transparency left out."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB at 8 bits, an image: (B,), float64. Infinite for equal images."""
    error = (to_8_bits(a).double() - to_8_bits(b).double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity at 8 bits, an image: (B,), float64, with the settings of Wang et al. 2004.

    A Gaussian window of deviation 1.5, population covariances, the mean over the colour channels.
    Raises ValueError for images smaller than the 11-pixel window.
    """
    with needs("eval"):
        from skimage.metrics import structural_similarity

    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: images of {a.shape[2]}x{a.shape[3]}; allowed: 11x11 and larger")
    pairs = zip(*(to_8_bits(x).permute(0, 2, 3, 1).cpu().numpy() for x in (a, b)), strict=True)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return torch.from_numpy(
        np.array([structural_similarity(x, y, channel_axis=2, **settings) for x, y in pairs])
    )


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity at 8 bits (Wang et al. 2003), an image: (B,), float64.

    Five scales, an 11-pixel Gaussian window of deviation 1.5, the mean over the colour channels, as TensorFlow has
    it. Raises ValueError for images of 160 pixels or less, whose smallest scale would be below the window.
    """
    with needs("eval"):
        import pytorch_msssim

    if min(a.shape[2:]) <= MS_SSIM_TOO_SMALL:
        raise ValueError(f"ms_ssim: images of {a.shape[2]}x{a.shape[3]}; allowed: 161x161 and larger")
    return pytorch_msssim.ms_ssim(to_8_bits(a).float(), to_8_bits(b).float(), size_average=False).double()


def similarity(images: Tensor, references: Tensor, lpips: "LPIPS | None") -> dict[str, list[float]]:
    """What each image is measured by, in training and in `evaluate`: `psnr`, `ssim`, and `lpips` where given.

    Of the images as they would be saved, LPIPS too; `references` are 8-bit images already. PSNR ends at
    `MAX_PSNR`: one image that is reproduced exactly would make the mean over all infinite. SSIM is left out of
    images that are smaller than its window.
    """
    saved = as_saved(images)
    values = {
        "psnr": psnr(saved, references).clamp(max=MAX_PSNR).tolist(),
    }
    if min(images.shape[2:]) >= SSIM_WINDOW:
        values["ssim"] = ssim(saved, references).tolist()
    if lpips is not None:
        device = next(lpips.parameters()).device
        with torch.no_grad():
            values["lpips"] = lpips(saved.to(device), references.to(device)).double().tolist()
    return values


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018) with the weights of the `lpips` package, arranged so that it can be trained on.

    Nothing in it is trained; the second images' features carry no gradient; and the norm of a feature vector
    has a finite gradient where all features are zero (flat images), where the package's is NaN.

    Args:
        net: vgg (what latent diffusion trains on), alex (what the paper measures with) or squeeze.
        bf16: compute the features in bfloat16, for training on; what is made of them stays float32.

    Raises FileNotFoundError naming the backbone's file and where it is looked for, if it can be neither found
    nor downloaded.
    """

    def __init__(self, net: str = "alex", bf16: bool = False):
        super().__init__()
        with needs("eval"):
            import lpips

        self.bf16 = bf16

        if net not in BACKBONES:
            raise ValueError(f"LPIPS net: {net!r}; allowed: {', '.join(BACKBONES)}")
        try:
            with warnings.catch_warnings():  # lpips calls torchvision in a way that torchvision deprecates
                warnings.simplefilter("ignore")
                self.lpips = lpips.LPIPS(net=net, verbose=False)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # a URLError is an OSError
            raise FileNotFoundError(how_to_provide(f"LPIPS ({net})", BACKBONES[net], error)) from None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)  # its dropout is for calibrating the metric, never for using it

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length feature vectors at each layer of images in [-1, 1]; gray counts as RGB, alpha is left out."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            layers = self.lpips.net(self.lpips.scaling_layer(colours_of(images).float()))
        layers = [f.float() for f in layers]
        return [f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + 1e-10) for f in layers]

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """(B, C, H, W) twice, in [-1, 1] -> distances (B,), float32; differentiable in `images` alone."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(references)
            found = self.features(images)
            layers = zip(self.lpips.lins, found, wanted, strict=True)
            return sum(lin((a - b).square()).mean(dim=(1, 2, 3)) for lin, a, b in layers)


def backbone_file(net: str) -> Path:
    """Where torchvision looks for the backbone of an LPIPS net, and puts what it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]


def how_to_provide(metric: str, file: str, error: Exception) -> str:
    """What to do about the file of weights that a metric needs, in a line."""
    home = os.environ.get("TORCH_HOME")
    return (
        f"{metric}: {file} could neither be read from {Path(torch.hub.get_dir()) / 'checkpoints'} "
        f"(TORCH_HOME {'= ' + home if home else 'is not set'}) nor be downloaded ({error}). "
        f"Put the file there, or set TORCH_HOME to a folder that holds hub/checkpoints/{file}"
    )
