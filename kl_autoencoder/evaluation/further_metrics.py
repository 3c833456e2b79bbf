"""Further measures of how alike two images are, from torchmetrics, by name: `evaluate --metrics dists vif`.

As LPIPS they judge what is seen rather than each pixel. Of images as they would be saved, on any device.
"""

import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..extras import needs
from .metrics import BACKBONES, colours_of, how_to_provide

VIF_SMALLEST = 41  # side in pixels


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020): 0 for equal images, lower is better.

    Unlike LPIPS it forgives a texture that is another sample of the same one. Features of VGG16, weights of the
    authors. Raises FileNotFoundError naming the backbone's file if it can be neither found nor downloaded.
    """

    smallest = 16  # side in pixels below which VGG16 has none left

    def __init__(self):
        super().__init__()
        with needs("metrics"):
            from torchmetrics.functional.image.dists import DISTSNetwork
        try:
            self.network = DISTSNetwork()
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # a URLError is an OSError
            raise FileNotFoundError(how_to_provide("DISTS", BACKBONES["vgg"], error)) from None
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """(B, C, H, W) twice, in [-1, 1] -> (B,), float32; gray counts as RGB, alpha is left out."""
        pair = (colours_of(x).float() / 2 + 0.5 for x in (images, references))
        return self.network(*pair).reshape(-1)


class VIF(nn.Module):
    """Visual information fidelity in the pixel domain (Sheikh & Bovik 2006): 1 for equal images, higher is better.

    The share of the reference's information that is left in an image, at four scales; above 1 for one of more
    contrast. Nothing is learned.
    """

    smallest = VIF_SMALLEST

    def __init__(self):
        super().__init__()
        with needs("metrics"):
            from torchmetrics.functional.image import visual_information_fidelity
        self.fidelity = visual_information_fidelity

    @torch.no_grad()
    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """(B, C, H, W) twice, in [-1, 1] -> (B,), float64: the mean over the channels, at 0 to 255."""
        pair = ((x.double() + 1) * 127.5 for x in (images, references))
        return self.fidelity(*pair, reduction="none")


FURTHER_METRICS: dict[str, Callable[[], nn.Module]] = {"dists": DISTS, "vif": VIF}
