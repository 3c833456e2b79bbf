"""PatchDiscriminator: is each patch of an image real? A logit a patch, after pix2pix and VQGAN."""

from torch import Tensor, nn

MAX_WIDENING = 8  # channels double from layer to layer up to this many times `channels`


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix (Isola et al. 2017, section 3.2.2) without normalisation.

    4x4 convolutions: `layers` of stride 2, doubling the channels, one more of stride 1 and one to the logits, with
    LeakyReLU(0.2) between them. Three layers see patches of 70x70 pixels (one 16, two 34, four 142). Weights
    start from N(0, 0.02), biases from 0, so the first logits are near 0.

    BatchNorm would make a logit depend on the other images of the batch: on the number of ranks, and on whether
    real and fake images go through together. GroupNorm would make it depend on the whole image, no longer on a
    patch. With neither there are no buffers for DDP to broadcast, one forward over real and fake images is two
    forwards, and the gradient penalty R1 differentiates convolutions alone.

    Raises ValueError for arguments below 1 and for images that are too small or have other channels.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("channels", channels), ("layers", layers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"discriminator {name}: {value!r}; allowed: whole numbers from 1 on")
        self.in_channels, self.smallest_side = in_channels, 3 * 2**layers
        widths = [in_channels, *(channels * min(2**i, MAX_WIDENING) for i in range(layers + 1))]
        modules = []
        for i in range(layers + 1):
            stride = 2 if i < layers else 1
            modules += [nn.Conv2d(widths[i], widths[i + 1], 4, stride, padding=1), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) in [-1, 1] -> logits (B, 1, H // f - 2, W // f - 2), f = 2**layers.

        Real is above 0, fake below.
        """
        if (
            images.ndim != 4
            or images.shape[1] != self.in_channels
            or min(images.shape[2:]) < self.smallest_side
        ):
            raise ValueError(
                f"discriminator: images of shape {tuple(images.shape)}; allowed: "
                f"(B, {self.in_channels}, H, W) with H and W at least {self.smallest_side}"
            )
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)
