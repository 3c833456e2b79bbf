"""Further similarity metrics, from torchmetrics, chosen by name: `evaluate --metrics dists vif`.

Like LPIPS they judge what people see rather than each pixel. Inputs are 8-bit images on any device (`as_saved`).
"""

import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..extras import needs
from .metrics import BACKBONES, colours_of, how_to_provide

VIF_SMALLEST = 41  # side in pixels; smaller images are left out


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020): 0 for equal images, lower is better.

    Unlike LPIPS it tolerates that a texture is replaced by another sample of the same texture. Computed on features
    of VGG16 with the authors' weights. Raises FileNotFoundError, which names the file of VGG16's weights, if that
    can be neither found nor downloaded.
    """

    smallest = 16  # side in pixels; of smaller images nothing is left in the last layers of VGG16

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
        """Two (B, C, H, W) in [-1, 1] -> (B,), float32; gray is repeated to RGB, alpha is left out."""
        pair = (colours_of(x).float() / 2 + 0.5 for x in (images, references))
        return self.network(*pair).reshape(-1)


class VIF(nn.Module):
    """Visual information fidelity in the pixel domain (Sheikh & Bovik 2006): 1 for equal images, higher is better.

    The share of the reference's information that is left in the image, over four scales; above 1 if the image has
    more contrast than the reference. It has no learned weights.
    """

    smallest = VIF_SMALLEST

    def __init__(self):
        super().__init__()
        with needs("metrics"):
            from torchmetrics.functional.image import visual_information_fidelity
        self.fidelity = visual_information_fidelity

    @torch.no_grad()
    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Two (B, C, H, W) in [-1, 1] -> (B,), float64: mean over channels, computed on values from 0 to 255."""
        pair = ((x.double() + 1) * 127.5 for x in (images, references))
        return self.fidelity(*pair, reduction="none")


FURTHER_METRICS: dict[str, Callable[[], nn.Module]] = {"dists": DISTS, "vif": VIF}
