"""Convert a PIL image of any mode to an upright 8-bit one: gray, RGB or RGBA, colours in sRGB."""

import io

import numpy as np
from PIL import Image, ImageCms

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # number of channels -> PIL mode
# EXIF 2.32, tag 0x0112: orientation of a stored image -> what turns it upright; 1 is upright already.
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
    """A PIL image of any mode -> an upright one, mode L for `channels` 1, RGB for 3, RGBA for 4.

    RGB is the result of `to_rgb`. Gray is the luma of that result (ITU-R BT.601, Pillow's conversion), which leaves
    the values of a gray image unchanged. RGBA keeps transparency as its fourth channel, 255 (opaque) where the
    image has none. Raises the errors of `to_rgb`.
    """
    if channels == 4:
        rgb, alpha, turned = _colours_and_alpha(image)
        rgb.putalpha(255 if alpha is None else alpha)
        return _upright(rgb, turned)
    return to_rgb(image).convert(MODES[channels]) if channels != 3 else to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> upright RGB in sRGB, transparency composited over white.

    White is 65535 in modes I;16 and I, and 1 in mode F. A colour profile that is broken or meant for another mode
    is ignored, as browsers do. An RGB image without profile and transparency keeps its exact pixel values. Raises
    ValueError for a damaged or truncated image, and for values of modes I;16, I or F below 0 or above white.
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
    """The EXIF orientation of an image: 1 upright, 2 to 8 as in `UPRIGHT`; from 5 on the sides are swapped."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # unreadable EXIF does not make the pixels unreadable
        return 1


def _colours_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None, int]:
    """Return the colours (RGB in sRGB), the alpha channel (mode L, or None) and the EXIF orientation.

    Colours and alpha are as stored, not yet turned upright.
    """
    decode(image)
    turned, profile = orientation(image), image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    alpha = None
    if image.has_transparency_data:  # an alpha channel, a transparent colour or transparent palette entries
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    return _to_srgb(image, profile), alpha, turned


def _upright(image: Image.Image, turned: int) -> Image.Image:
    """Turn an image upright that was stored with EXIF orientation `turned`."""
    if turned in UPRIGHT:
        image = image.transpose(UPRIGHT[turned])
    # A new image without metadata, so that nobody applies the EXIF rotation or the colour profile again.
    return Image.fromarray(np.asarray(image))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I (0 to 65535) and F (0 to 1) -> mode L. Raises ValueError for values outside these ranges."""
    top = 1.0 if image.mode == "F" else 65535.0
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= top):  # negated, so that NaN is refused too
        raise ValueError(
            f"mode {image.mode} with values from {values.min():g} to {values.max():g}, allowed are 0 to {top:g}"
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image without transparency -> RGB in sRGB, by its ICC profile if that is usable."""
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
