"""`PatchDiscriminator`: a logit for each patch of an image, real or reconstructed, after pix2pix and VQGAN."""

from torch import Tensor, nn

MAX_WIDENING = 8  # channels double from layer to layer, up to this many times `channels`


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix (Isola et al. 2017, section 3.2.2) without normalisation.

    It consists of 4x4 convolutions: `layers` of stride 2, which double the channels, one more of stride 1, and one
    to the logits, with LeakyReLU(0.2) between them. With three layers a logit sees a patch of 70x70 pixels (with
    one 16, two 34, four 142). Weights start from N(0, 0.02^2), biases from 0, so the first logits are near 0.

    Why no normalisation: with BatchNorm a logit would depend on the other images of the batch, and so on the number
    of ranks and on whether real and fake images are in one batch. With GroupNorm it would depend on the whole
    image, not on a patch. With neither, there are no buffers for DDP to broadcast, one forward over real and fake
    images gives the same as two, and the R1 penalty differentiates nothing but convolutions and LeakyReLUs.

    in_channels: of the images. channels: width of the first layer. Raises ValueError for arguments below 1.
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

        Above 0 means real, below 0 fake. Raises ValueError for images with a side below `smallest_side` or with
        another number of channels.
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
