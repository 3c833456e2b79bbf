"""Similarity of two images: PSNR, SSIM, MS-SSIM and LPIPS of tensors (B, C, H, W) in [-1, 1].

All but LPIPS clamp and round the images to 8 bits first, as they would be saved. C is 3 (RGB), 1 (gray) or 4
(RGBA); of RGBA images, PSNR and SSIM use all four channels, LPIPS the colours alone.
"""

import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..extras import needs

BACKBONES = {  # net -> the file of weights that torchvision downloads
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
# side in pixels; in smaller images a layer has none left
LPIPS_SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}
SSIM_WINDOW = 11  # pixels a side
MAX_PSNR = 100.0  # dB, the cap in means over images; a single 8-bit step in a 256x256 RGB image gives 101
MS_SSIM_TOO_SMALL = 160  # side in pixels; at the fifth scale, 1/16, the window needs 11


def to_8_bits(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, clamped and rounded."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def from_8_bits(levels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], the inverse of `to_8_bits`."""
    return levels.float() / 127.5 - 1


def as_saved(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> the images as saved in 8 bits and loaded. NaN becomes black, as in pipelines."""
    return from_8_bits(to_8_bits(images.nan_to_num(-1.0, 1.0, -1.0)))


def colours_of(images: Tensor) -> Tensor:
    """(B, C, H, W) with C = 1, 3 or 4 -> (B, 3, H, W) for networks of RGB: gray is repeated, alpha is left out."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio at 8 bits, in dB: (B,), float64. Infinite for equal images."""
    error = (to_8_bits(a).double() - to_8_bits(b).double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity at 8 bits: (B,), float64, at most 1, with the settings of Wang et al. 2004.

    An 11-pixel Gaussian window of deviation 1.5, population covariances, mean over the channels. Raises ValueError
    for images smaller than the window.
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
    """Multi-scale structural similarity at 8 bits (Wang et al. 2003): (B,), float64, at most 1.

    Five scales, an 11-pixel Gaussian window of deviation 1.5, mean over the channels, as in TensorFlow. Raises
    ValueError for images with a side of 160 pixels or less, whose fifth scale would be smaller than the window.
    """
    with needs("eval"):
        import pytorch_msssim

    if min(a.shape[2:]) <= MS_SSIM_TOO_SMALL:
        raise ValueError(f"ms_ssim: images of {a.shape[2]}x{a.shape[3]}; allowed: 161x161 and larger")
    return pytorch_msssim.ms_ssim(to_8_bits(a).float(), to_8_bits(b).float(), size_average=False).double()


def similarity(images: Tensor, references: Tensor, lpips: "LPIPS | None") -> dict[str, list[float]]:
    """Measure each image by `psnr`, `ssim` and, if the network is given, `lpips`: metric -> B values.

    Used by validation in training and by `evaluate`. images, references: (B, C, H, W) in [-1, 1]; images are
    rounded to 8 bits, for LPIPS too, and references must have 8-bit values already. PSNR is capped at `MAX_PSNR`,
    because a single exact reproduction would make the mean over images infinite. SSIM is left out for images
    smaller than its window.
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
    """LPIPS (Zhang et al. 2018) with the weights of the `lpips` package, usable as a metric and as a training loss.

    Its weights are frozen, and no gradient is kept for the features of the references. Unlike in the package, the
    norm of a feature vector has a finite gradient where all features are zero (flat images); there it is NaN.

    Args:
        net: backbone: vgg (the loss of latent diffusion), alex (the metric of the paper) or squeeze.
        bf16: compute the features in bfloat16, for training; distances are computed in float32.

    Raises ValueError for another net, and FileNotFoundError, which names the backbone's file and the folder where
    it is expected, if that can be neither found nor downloaded.
    """

    def __init__(self, net: str = "alex", bf16: bool = False):
        super().__init__()
        with needs("eval"):
            import lpips

        self.bf16 = bf16

        if net not in BACKBONES:
            raise ValueError(f"LPIPS net: {net!r}; allowed: {', '.join(BACKBONES)}")
        try:
            with warnings.catch_warnings():  # lpips passes torchvision deprecated arguments
                warnings.simplefilter("ignore")
                self.lpips = lpips.LPIPS(net=net, verbose=False)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # a URLError is an OSError
            raise FileNotFoundError(how_to_provide(f"LPIPS ({net})", BACKBONES[net], error)) from None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)  # always eval mode: its dropout was for fitting the metric alone

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> the unit-length feature vectors of each layer, (B, D, h, w) each."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            layers = self.lpips.net(self.lpips.scaling_layer(colours_of(images).float()))
        layers = [f.float() for f in layers]
        return [f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + 1e-10) for f in layers]

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Two (B, C, H, W) in [-1, 1] -> distances (B,), float32; differentiable in `images` alone."""
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(references)
            found = self.features(images)
            layers = zip(self.lpips.lins, found, wanted, strict=True)
            return sum(lin((a - b).square()).mean(dim=(1, 2, 3)) for lin, a, b in layers)


def backbone_file(net: str) -> Path:
    """The path where torchvision expects the backbone of an LPIPS net, and where it saves the download."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]


def how_to_provide(metric: str, file: str, error: Exception) -> str:
    """One line that says how to provide the file of weights that a metric needs."""
    home = os.environ.get("TORCH_HOME")
    return (
        f"{metric}: {file} could neither be read from {Path(torch.hub.get_dir()) / 'checkpoints'} "
        f"(TORCH_HOME {'= ' + home if home else 'is not set'}) nor be downloaded ({error}). "
        f"Put the file there, or set TORCH_HOME to a folder that holds hub/checkpoints/{file}"
    )
