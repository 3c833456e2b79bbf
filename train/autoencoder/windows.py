"""Random windows of images, in random sizes, for LPIPS as a loss.

LPIPS's networks have strides, and so look at some rows and columns of pixels more than at others; and they see
detail of a few pixels otherwise than detail of many. An autoencoder, whose own grid of 8 pixels has a fixed
place upon theirs, adapts to both: its images are near the originals for that network, upon that grid and in that
size alone. Random windows and sizes prevent it, as random transformations do against adversarial images
(E-LPIPS, Kettunen et al. 2019, arXiv 1906.03973).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kl_autoencoder.evaluation.metrics import LPIPS_SMALLEST

from ..config import PerceptualConfig
from ..parts import Draws
from ..parts.draws import WINDOW_PLACE, WINDOW_SCALE

# The defaults of `shift` and `scale`. The first layers of squeeze and alex have strides of 2 and 4, vgg's of 1.
SHIFT = {"squeeze": 7, "alex": 7, "vgg": 0}
SCALE = {"squeeze": 2.0, "alex": 2.0, "vgg": 1.0}


@dataclass(frozen=True)
class Windows:
    """A window for each image of a batch; all have one size.

    corners: (B, 2) int64, row and column of each window's upper left pixel. sides: height and width of a window in
    pixels. resized: height and width that LPIPS sees it in.
    """

    corners: Tensor
    sides: tuple[int, int]
    resized: tuple[int, int]

    def split(self, at_a_time: int) -> list["Windows"]:
        """The same windows, for `at_a_time` images each."""
        return [Windows(corners, self.sides, self.resized) for corners in self.corners.split(at_a_time)]

    def cut(self, images: Tensor) -> Tensor:
        """Cut out the windows and resize them, bicubically: (B, C, H, W) -> (B, C, *resized), channels_last."""
        if self.sides == self.resized == images.shape[2:]:
            return images
        height, width = self.sides
        corners = zip(images, self.corners.tolist(), strict=True)
        cut = torch.stack([one[:, y : y + height, x : x + width] for one, (y, x) in corners])
        if self.resized != self.sides:
            cut = F.interpolate(cut, self.resized, mode="bicubic", antialias=True)
        return cut.contiguous(memory_format=torch.channels_last)


def draw_windows(config: PerceptualConfig, images: Tensor, draws: Draws | None) -> Windows:
    """Draw the place of each window, and one size for all of a step. Without `draws` they are whole images.

    The factor is log-uniform between 1 / `config.scale` and `config.scale`. Windows that are to be enlarged are cut
    so much smaller, so LPIPS costs no more than on whole images. Images that are hardly larger than LPIPS needs are
    shifted and shrunk less.
    """
    height, width = images.shape[2:]
    if draws is None:
        return Windows(torch.zeros(len(images), 2, dtype=torch.int64), (height, width), (height, width))
    least, smallest = LPIPS_SMALLEST[config.net], min(height, width)
    shift = min(SHIFT[config.net] if config.shift is None else config.shift, smallest - least)
    largest = SCALE[config.net] if config.scale is None else config.scale
    factor = largest ** draws.of_step(WINDOW_SCALE).uniform(-1, 1)
    factor = max(factor, least / (smallest - shift))
    sides, resized = (
        (round((height - shift) * by), round((width - shift) * by))
        for by in (min(1, 1 / factor), min(1, factor))
    )
    places = draws.for_purpose(WINDOW_PLACE)
    corners = [places.whole(0, height - sides[0]), places.whole(0, width - sides[1])]
    return Windows(torch.tensor(corners).T, sides, resized)
