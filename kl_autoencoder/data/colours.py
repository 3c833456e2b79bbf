"""The colours of a PIL image: any mode -> upright gray, RGB in sRGB, or RGBA, of 8 bits."""

import io

import numpy as np
from PIL import Image, ImageCms

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> PIL's mode
# EXIF 2.32, tag 0x0112: how to turn an image that was stored with this orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SRGB = ImageCms.createProfile("sRGB")
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # PIL mode -> ICC colour space


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """A PIL image of any mode -> an upright one of `channels` channels: 1, mode L; 3, RGB; 4, RGBA.

    RGB is that of `to_rgb`. Gray is its luma (ITU-R BT.601, as Pillow converts), which of a gray image is its very
    values. RGBA keeps colours and transparency beside each other, the transparency 255 where an image has none.
    Raises as `to_rgb`.
    """
    if channels == 4:
        rgb, alpha, turned = _colours_and_alpha(image)
        rgb.putalpha(255 if alpha is None else alpha)
        return _upright(rgb, turned)
    return to_rgb(image).convert(MODES[channels]) if channels != 3 else to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> upright RGB in sRGB, transparency over white; see `image_io.open_image`.

    Single channels of more than 8 bits: modes I;16 and I are read as 0 to 65535, mode F as 0 to 1. A colour
    profile that is broken or belongs to another kind of image is ignored, as browsers do. The pixels of an
    image that is plain RGB already are kept exactly. Raises ValueError for a damaged or truncated image and
    for values outside those ranges.
    """
    rgb, alpha, turned = _colours_and_alpha(image)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return _upright(rgb, turned)


def decode(image: Image.Image) -> None:
    """Read an image's pixels. Raises ValueError if it is damaged or truncated."""
    try:
        image.load()
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error ... by format
        raise ValueError(f"damaged or truncated image ({error})") from error


def orientation(image: Image.Image) -> int:
    """How an image lies, by its EXIF: 1 upright, the others in `UPRIGHT`."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # EXIF that cannot be parsed says nothing; the pixels may still be sound
        return 1


def _colours_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None, int]:
    """RGB in sRGB, the transparency (mode L) where there is one, and the orientation; neither is turned yet."""
    decode(image)
    turned, profile = orientation(image), image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    alpha = None
    if image.has_transparency_data:  # as a channel, or as a colour key or palette entries beside the pixels
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    return _to_srgb(image, profile), alpha, turned


def _upright(image: Image.Image, turned: int) -> Image.Image:
    if turned in UPRIGHT:
        image = image.transpose(UPRIGHT[turned])
    # A new image, so that neither the rotation nor the profile can be applied a second time.
    return Image.fromarray(np.asarray(image))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I (0 to 65535) and F (0 to 1) -> L."""
    top = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= top):  # written so that NaN fails too
        raise ValueError(
            f"mode {image.mode} with values from {values.min():g} to {values.max():g}, allowed are 0 to {top:g}"
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image without transparency -> RGB, through its ICC profile if that one is usable."""
    if image.mode not in PROFILE_SPACES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() == PROFILE_SPACES[image.mode]:
                converted = ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
                assert converted is not None  # it is None only where the image is changed in place
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")
