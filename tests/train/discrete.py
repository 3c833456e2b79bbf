"""A discrete autoencoder without weights: the brightness of patches, in steps."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F


class Brightness:
    """Patches of 8x8 pixels -> one of 16 levels of brightness, and back."""

    codes, downsampling, device, dtype, is_discrete = 16, 8, torch.device("cpu"), torch.float32, True
    config = SimpleNamespace(sample_size=32, in_channels=3, classes=0)

    def encode_indices(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, H/8, W/8) int64."""
        brightness = F.avg_pool2d(images.mean(dim=1, keepdim=True), self.downsampling)[:, 0]
        return ((brightness + 1) * self.codes / 2).long().clamp(0, self.codes - 1)

    def decode_indices(self, indices):
        """The middle of each level, over the whole patch."""
        brightness = (indices.float() + 0.5) * 2 / self.codes - 1
        images = F.interpolate(brightness[:, None], scale_factor=self.downsampling)
        return images.expand(-1, 3, -1, -1)
