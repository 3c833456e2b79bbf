"""Image files of every kind to tensors and back, and what is refused."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from kl_autoencoder.data.colours import to_rgb
from kl_autoencoder.data.crops import Crop, read_crop, read_part
from kl_autoencoder.data.image_io import (
    difference_image,
    image_grid,
    image_size,
    image_to_tensor,
    load_image,
    open_image,
    pad_to_multiple,
    save_image,
    tensor_to_images,
)

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (11, 17, 3), dtype=np.uint8)  # H 11, W 17


def smooth(height, width):
    """A photograph-like image: smooth, so that JPEG and scaling change it little."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / 9 + phase) * np.cos(y / 7) for phase in (0, 1, 2)]
    return np.stack(waves, -1).round().astype(np.uint8)


def levels(tensor):
    """(1, 3, H, W) in [-1, 1] -> (H, W, 3) in 0 .. 255, not rounded."""
    assert tensor.dtype == torch.float32 and tensor.shape[:2] == (1, 3)
    return ((tensor[0].permute(1, 2, 0).double() + 1) * 127.5).numpy()


def read(image, tmp_path, suffix=".png", **options):
    path = tmp_path / f"photo{suffix}"
    image.save(path, **options)
    return levels(load_image(path, multiple_of=1))


def profile(space, tags):
    """A small ICC version 2 profile: `tags` maps signatures to data (ICC.1:2001-04, sections 6.1 to 6.5)."""
    tags = {b"desc": b"desc" + struct.pack(">II", 0, 2) + b"t\0" + bytes(79), **tags}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    tags[b"cprt"] = b"text\0\0\0\0none\0"
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def gamma(value):
    return b"curv" + struct.pack(">IIH", 0, 1, round(value * 256))


def xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


# Adobe RGB (1998): the colorants adapted to D50, from its specification's profile, and gamma 563/256.
ADOBE_XYZ = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
# sRGB's own, adapted to D50 (IEC 61966-2-1 through Bradford).
SRGB_XYZ = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])


def srgb_encode(linear):
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


class TestModes:
    def test_rgb_is_exact(self, tmp_path):
        assert np.abs(read(Image.fromarray(NOISE), tmp_path) - NOISE).max() < 1e-4

    @pytest.mark.parametrize("suffix", [".bmp", ".tif", ".webp", ".png", ".ppm", ".gif"])
    def test_formats_without_loss(self, tmp_path, suffix):
        image = Image.fromarray(NOISE[:, :, 0])
        options = {"lossless": True} if suffix == ".webp" else {}
        expected = np.repeat(NOISE[:, :, :1], 3, 2)
        assert np.abs(read(image, tmp_path, suffix, **options) - expected).max() < 1e-4

    def test_jpeg(self, tmp_path):
        picture = smooth(40, 60)
        got = read(Image.fromarray(picture), tmp_path, ".jpg", quality=100, subsampling=0)
        assert np.abs(got - picture).mean() < 1

    def test_gray(self, tmp_path):
        got = read(Image.fromarray(NOISE[:, :, 0]), tmp_path)
        assert np.abs(got - NOISE[:, :, :1]).max() < 1e-4

    def test_one_bit(self, tmp_path):
        bits = NOISE[:, :, 0] > 127
        assert np.abs(read(Image.fromarray(bits), tmp_path) - 255 * bits[..., None]).max() < 1e-4

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_lies_over_white(self, tmp_path, mode):
        channels = len(mode)
        pixels = RNG.integers(0, 256, (11, 17, channels), dtype=np.uint8)
        got = read(Image.fromarray(pixels, mode), tmp_path)
        alpha = pixels[..., -1:] / 255
        assert np.abs(got - (pixels[..., :-1] * alpha + 255 * (1 - alpha))).max() <= 1

    @pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "YCbCr", "HSV", "LAB"])
    def test_rarer_modes(self, mode):
        image = Image.new(mode, (4, 3))
        assert image_to_tensor(image).shape == (3, 3, 4)

    def test_premultiplied_alpha(self):
        image = Image.new("RGBA", (2, 2), (200, 100, 0, 128)).convert("RGBa")
        expected = np.array([200, 100, 0]) * 128 / 255 + 255 - 128
        assert np.abs(levels(load_image(image, multiple_of=1)) - expected).max() <= 1.5

    def test_palette(self, tmp_path):
        image = Image.fromarray(NOISE).quantize(16)
        assert image.mode == "P"
        assert np.abs(read(image, tmp_path) - np.asarray(image.convert("RGB"))).max() < 1e-4

    def test_palette_with_transparent_entry(self, tmp_path):
        image = Image.new("P", (4, 2), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((0, 0), 0)
        got = read(image, tmp_path, transparency=0)
        assert got[0, 0].tolist() == [255, 255, 255] and got[0, 1].tolist() == [0, 0, 255]

    @pytest.mark.parametrize("mode, key", [("RGB", (10, 20, 30)), ("L", 10)])
    def test_colour_key(self, tmp_path, mode, key):
        image = Image.new(mode, (4, 2), 0)
        image.putpixel((0, 0), key)
        got = read(image, tmp_path, transparency=key)
        assert got[0, 0].tolist() == [255, 255, 255] and got[0, 1].tolist() == [0, 0, 0]

    def test_cmyk(self, tmp_path):
        inks = np.zeros((8, 8, 4), np.uint8)
        inks[:, 4:] = [255, 0, 0, 0]
        got = read(Image.fromarray(inks, "CMYK"), tmp_path, ".tif")
        assert np.abs(got[0, 0] - 255).max() < 1e-4 and np.abs(got[0, 5] - [0, 255, 255]).max() < 1e-4
        jpeg = read(Image.fromarray(inks, "CMYK"), tmp_path, ".jpg", quality=100)
        assert np.abs(jpeg[0, 0] - 255).max() < 6 and np.abs(jpeg[0, 7] - [0, 255, 255]).max() < 6

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
    def test_16_bit_gray(self, tmp_path, suffix):
        values = np.array([[0, 257, 128], [32768, 65535, 1000]], np.uint16)
        got = read(Image.fromarray(values), tmp_path, suffix)
        assert np.abs(got[..., 0] - values / 257).max() <= 0.5
        assert got[0, 1, 0] == pytest.approx(1, abs=1e-4) and got[1, 1, 0] == pytest.approx(255, abs=1e-4)

    def test_16_bit_big_endian_tiff(self):
        values = np.array([[0, 514, 65535]], np.uint16)
        image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
        assert np.abs(levels(load_image(image, multiple_of=1))[0, :, 0] - [0, 2, 255]).max() < 1e-4

    def test_float(self, tmp_path):
        values = np.array([[0, 0.25, 1]], np.float32)
        assert np.abs(read(Image.fromarray(values), tmp_path, ".tif")[0, :, 0] - [0, 64, 255]).max() < 1e-4

    @pytest.mark.parametrize("values", [[[0.0, 1.5]], [[0.0, float("nan")]], [[-0.1, 0.0]]])
    def test_float_out_of_range(self, tmp_path, values):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / "deep.tif")
        with pytest.raises(ValueError, match=r"deep\.tif: mode F .* allowed are 0 to 1"):
            load_image(tmp_path / "deep.tif")

    def test_32_bit_out_of_range(self):
        with pytest.raises(ValueError, match="allowed are 0 to 65535"):
            to_rgb(Image.fromarray(np.array([[0, 70000]], np.int32)))


class TestAlikeEverywhere:
    """The readers of commands (`load_image`), of encode-dataset (`read_part`) and of training (`read_crop`)."""

    @staticmethod
    def readings(file):
        def opened():
            content = io.BytesIO(file.read_bytes())
            content.name = str(file)
            return content

        yield lambda: levels(load_image(file, multiple_of=1))
        yield lambda: read_part(opened(), [(4, 4)]).pixels
        yield lambda: read_crop(opened(), (4, 4), Crop(1.0, 0.0, 0.0, False))

    @pytest.mark.parametrize("values", [[0, 255], [0, 65535], [-5, 70000]])
    def test_integers_of_32_bits_are_refused(self, tmp_path, values):
        Image.fromarray(np.array([values * 2] * 4, np.int32)).save(tmp_path / "deep.tif")
        for read in self.readings(tmp_path / "deep.tif"):
            with pytest.raises(ValueError, match=r"deep\.tif: integers of 32 bits.*allowed: 8 or 16 bits"):
                read()

    @pytest.mark.parametrize("suffix", [".gif", ".png", ".tif"])
    def test_the_first_frame_and_white_under_transparency(self, tmp_path, suffix):
        first, second = (Image.new("RGBA", (4, 4), color) for color in ((0, 0, 0, 0), (255, 0, 0, 255)))
        first.putpixel((0, 0), (0, 0, 255, 255))
        first.save(tmp_path / f"two{suffix}", save_all=True, append_images=[second])
        wanted = np.full((4, 4, 3), 255)
        wanted[0, 0] = (0, 0, 255)
        for read in self.readings(tmp_path / f"two{suffix}"):
            assert np.abs(read() - wanted).max() < 1e-3


# What a viewer must do with each orientation (EXIF 2.32, 0x0112), in numpy.
TURN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


class TestRotation:
    @pytest.mark.parametrize("orientation", TURN)
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
    def test_upright(self, tmp_path, orientation, suffix):
        picture = smooth(11, 17) if suffix == ".jpg" else NOISE
        image = Image.fromarray(picture)
        exif = image.getexif()
        exif[0x0112] = orientation
        options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
        got = read(image, tmp_path, suffix, exif=exif, **options)
        expected = TURN[orientation](picture)
        assert got.shape == expected.shape
        assert np.abs(got - expected).mean() < (2 if suffix == ".jpg" else 1e-4)
        assert image_size(tmp_path / f"photo{suffix}") == expected.shape[:2]

    def test_only_once(self):
        image = Image.fromarray(NOISE)
        image.getexif()[0x0112] = 6
        upright = to_rgb(image)
        assert (np.asarray(upright) == np.rot90(NOISE, -1)).all()
        assert (np.asarray(to_rgb(upright)) == np.asarray(upright)).all()

    def test_broken_exif_is_no_reason_to_refuse(self, tmp_path):
        for exif in (b"Exif\0\0" + bytes(range(200)), b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = read(Image.fromarray(smooth(11, 17)), tmp_path, ".jpg", exif=exif)
            assert got.shape == (11, 17, 3)


class TestColour:
    @pytest.mark.parametrize("with_alpha", [False, True])
    def test_adobe_rgb(self, tmp_path, with_alpha):
        tags = {name: xyz(row) for name, row in zip((b"rXYZ", b"gXYZ", b"bXYZ"), ADOBE_XYZ, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(563 / 256))
        picture = smooth(11, 17) // 2 + 64  # inside sRGB's gamut
        linear = (picture / 255) ** (563 / 256)
        expected = 255 * srgb_encode(linear @ ADOBE_XYZ @ np.linalg.inv(SRGB_XYZ))
        assert np.abs(expected - picture).max() > 10  # the profile matters
        image = Image.fromarray(picture)
        if with_alpha:
            image.putalpha(Image.new("L", image.size, 51))
            expected = expected * 0.2 + 255 * 0.8
        got = read(image, tmp_path, icc_profile=profile(b"RGB ", tags))
        assert np.abs(got - expected).max() < 1.6

    @pytest.mark.parametrize("alpha", [None, 51])
    def test_gray(self, tmp_path, alpha):
        image = Image.fromarray(NOISE[:, :, 0])
        expected = 255 * srgb_encode((NOISE[:, :, :1] / 255) ** 1.8)
        assert np.abs(expected - NOISE[:, :, :1]).max() > 10  # the profile matters
        if alpha:
            image.putalpha(alpha)
            expected = expected * 0.2 + 255 * 0.8
        got = read(image, tmp_path, icc_profile=profile(b"GRAY", {b"kTRC": gamma(1.8)}))
        assert np.abs(got - expected).max() < 1.6

    def test_srgb_keeps_the_pixels(self, tmp_path):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        assert np.abs(read(Image.fromarray(NOISE), tmp_path, icc_profile=srgb) - NOISE).max() < 1e-4

    @pytest.mark.parametrize(
        "bad", [b"no profile", profile(b"GRAY", {b"kTRC": gamma(1)}), profile(b"RGB ", {})]
    )
    def test_unusable_profile_is_ignored(self, tmp_path, bad):
        got = read(Image.fromarray(NOISE), tmp_path, icc_profile=bad)
        assert np.abs(got - NOISE).max() < 1e-4


class TestSize:
    def test_whole_pixels_when_only_cropping(self):
        got = levels(load_image(Image.fromarray(NOISE), size=11, multiple_of=1))
        assert np.abs(got - NOISE[:, 3:14]).max() < 1e-4
        got = levels(load_image(Image.fromarray(NOISE), size=(11, 10), multiple_of=1))
        assert np.abs(got - NOISE[:, 3:13]).max() < 1e-4

    @pytest.mark.parametrize("size, shape", [(16, (16, 16)), ((16, 40), (16, 40)), ((40, 16), (40, 16))])
    @pytest.mark.parametrize("source", [(64, 96), (96, 64), (5, 7), (16, 16)])
    def test_shape(self, size, shape, source):
        assert load_image(Image.fromarray(smooth(*source)), size=size).shape == (1, 3, *pad8(shape))

    def test_scales_and_crops_the_centre(self):
        picture = smooth(64, 96)
        got = levels(load_image(Image.fromarray(picture), size=32, multiple_of=1))
        boxes = picture[:, 16:80].reshape(32, 2, 32, 2, 3).mean((1, 3))  # area average of the centre square
        assert np.abs(got - boxes).mean() < 1.5

    def test_antialiased(self):
        checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
        got = levels(load_image(checks, size=13))
        assert np.abs(got - 127.5).max() < 30  # without antialiasing: 0 or 255

    def test_a_long_image_stays_small_in_memory(self):
        line = Image.new("L", (60_000, 1), 77)
        assert np.abs(levels(load_image(line, size=512)) - 77).max() < 1e-4  # scaled whole: 47 gigabytes

    @pytest.mark.parametrize("size", [0, -8, (8,), (8, 0), (8, 8, 3), 8.5, "8"])
    def test_impossible(self, size):
        with pytest.raises(ValueError, match="size"):
            load_image(Image.fromarray(NOISE), size=size)


def pad8(shape):
    return tuple(-(-side // 8) * 8 for side in shape)


class TestPadding:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 9), (8, 16), (513, 77), (2, 2)])
    @pytest.mark.parametrize("multiple", [1, 8, 64])
    def test_reflection(self, shape, multiple):
        images = torch.randn(2, 3, *shape)
        target = [-(-side // multiple) * multiple for side in shape]
        pads = [(0, 0), (0, 0), *((0, t - s) for s, t in zip(shape, target, strict=True))]
        assert (pad_to_multiple(images, multiple).numpy() == np.pad(images.numpy(), pads, "reflect")).all()

    def test_nothing_to_do(self):
        images = torch.zeros(1, 3, 16, 8)
        assert pad_to_multiple(images, 8) is images

    @pytest.mark.parametrize("multiple", [0, -1, 2.0])
    def test_impossible(self, multiple):
        with pytest.raises(ValueError, match="multiple"):
            pad_to_multiple(torch.zeros(1, 3, 8, 8), multiple)

    def test_load_pads_and_save_crops_back(self, tmp_path):
        Image.fromarray(NOISE).save(tmp_path / "in.png")
        images = load_image(tmp_path / "in.png")
        assert images.shape == (1, 3, 16, 24)
        assert load_image(tmp_path / "in.png", multiple_of=1).shape == (1, 3, 11, 17)
        save_image(images, tmp_path / "out.png", size=image_size(tmp_path / "in.png"))
        assert (np.asarray(Image.open(tmp_path / "out.png")) == NOISE).all()


class TestRefused:
    def test_missing(self, tmp_path):
        for function in (load_image, open_image, image_size):
            with pytest.raises(FileNotFoundError, match=r"absent\.png"):
                function(tmp_path / "absent.png")

    @pytest.mark.parametrize("content", [b"", b"hello", b"<html></html>", b"\x89PNG\r\n\x1a\n", bytes(1000)])
    def test_not_an_image(self, tmp_path, content):
        (tmp_path / "fake.png").write_bytes(content)
        for function in (load_image, image_size):
            with pytest.raises(ValueError, match=r"fake\.png"):
                function(tmp_path / "fake.png")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match="not an image"):
            load_image(tmp_path)

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".gif"])
    def test_truncated_anywhere(self, tmp_path, suffix):
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"whole{suffix}")
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        path = tmp_path / f"cut{suffix}"
        for part in (0.02, 0.1, 0.5, 0.9):
            path.write_bytes(whole[: int(len(whole) * part)])
            with pytest.raises(ValueError, match=rf"cut\{suffix}"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_image(path)

    def test_open_file(self):
        buffer = io.BytesIO()
        Image.fromarray(NOISE).save(buffer, "PNG")
        assert (np.asarray(open_image(buffer)) == NOISE).all()
        with pytest.raises(ValueError, match="the image"):
            open_image(io.BytesIO(buffer.getvalue()[:100]))

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("limit", [50, 150])  # PIL itself refuses from twice the limit on: 187 pixels
    def test_decompression_bomb(self, tmp_path, monkeypatch, limit):
        Image.fromarray(NOISE).save(tmp_path / "bomb.png")
        filters = list(warnings.filters)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for function in (load_image, image_size):
            with pytest.raises(ValueError, match=r"bomb\.png: refused as a decompression bomb"):
                function(tmp_path / "bomb.png")
        assert limit == Image.MAX_IMAGE_PIXELS and warnings.filters == filters
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 187)
        assert image_size(tmp_path / "bomb.png") == (11, 17)

    def test_postscript_is_not_run(self, tmp_path):
        Image.fromarray(NOISE).save(tmp_path / "page.eps")
        (tmp_path / "page.eps").rename(tmp_path / "page.jpg")
        with pytest.raises(ValueError, match="EPS"):
            load_image(tmp_path / "page.jpg")


class TestSaving:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_clamps_and_rounds(self, dtype):
        images = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0], dtype=dtype).expand(1, 3, 1, 7)
        (image,) = tensor_to_images(images)
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]

    def test_every_level_survives(self, tmp_path):
        ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
        for suffix in (".png", ".webp", ".tif", ".tiff", ".bmp"):
            save_image(image_to_tensor(Image.fromarray(ramp)), tmp_path / f"a{suffix}")
            assert (np.asarray(Image.open(tmp_path / f"a{suffix}").convert("RGB")) == ramp).all()

    @pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG"])
    def test_jpeg(self, tmp_path, suffix):
        picture = smooth(40, 60)
        save_image(image_to_tensor(Image.fromarray(picture)), tmp_path / f"a{suffix}")
        assert np.abs(np.asarray(Image.open(tmp_path / f"a{suffix}")).astype(float) - picture).mean() < 2

    def test_batch_gets_numbered_names(self, tmp_path):
        images = torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 0.0, 1.0)])
        paths = save_image(images, tmp_path / "photo.png")
        assert [path.name for path in paths] == ["photo-000.png", "photo-001.png", "photo-002.png"]
        assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == [0, 128, 255]
        assert not (tmp_path / "photo.png").exists()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, tmp_path, bad):
        images = torch.zeros(1, 3, 4, 4, dtype=torch.float16)
        images[0, 0, 0, :2] = bad
        with pytest.raises(ValueError, match="2 of 48 image values are NaN or infinite"):
            save_image(images, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    def test_refused(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"a\.xyz: unknown image suffix '\.xyz', allowed are \.png, \.jpg"
        ):
            save_image(torch.zeros(1, 3, 4, 4), tmp_path / "a.xyz")
        with pytest.raises(FileNotFoundError, match="missing"):
            save_image(torch.zeros(1, 3, 4, 4), tmp_path / "absent" / "a.png")
        with pytest.raises(ValueError, match="cannot crop 4x4"):
            save_image(torch.zeros(1, 3, 4, 4), tmp_path / "a.png", size=(5, 4))
        for shape in [(4, 4), (1, 2, 8, 8), (1, 5, 8, 8), (0, 3, 4, 4), (1, 3, 0, 4)]:
            with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\)"):
                save_image(torch.zeros(shape), tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        save_image(torch.zeros(1, 3, 4, 4), tmp_path / "a.png")
        before = (tmp_path / "a.png").read_bytes()

        def disk_full(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr(Image.Image, "save", disk_full)
        with pytest.raises(OSError, match="no space"):
            save_image(torch.ones(1, 3, 4, 4), tmp_path / "a.png")
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == before


class TestGrid:
    def test_layout(self):
        left = torch.stack([torch.full((3, 5, 7), v) for v in (-1.0, 0.0)])
        right = torch.stack([torch.full((3, 5, 7), v) for v in (1.0, -0.5)])
        grid = np.asarray(image_grid([left, right], gap=2))
        assert grid.shape == (5 + 2 + 5, 7 + 2 + 7, 3)
        assert (grid[:5, :7] == 0).all() and (grid[:5, 9:] == 255).all()
        assert (grid[7:, :7] == 128).all() and (grid[7:, 9:] == 64).all()
        assert (grid[5:7] == 255).all() and (grid[:, 7:9] == 255).all()

    def test_labels(self):
        images = torch.zeros(1, 3, 64, 128)
        plain, labelled = (np.asarray(image_grid([images] * 2, labels)) for labels in (None, ["one", "two"]))
        top = labelled.shape[0] - plain.shape[0]
        assert top > 8 and (labelled[top:] == plain).all()
        assert (labelled[:top, :128] < 128).any() and (labelled[:top, 132:] < 128).any()

    def test_difference(self):
        a, b = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.25, 0.75, -1.0])
        got = difference_image(a.expand(1, 3, 1, 4), b.expand(1, 3, 1, 4), gain=4)
        assert got[0, 0, 0].tolist() == [-1, 0, 0, 1]

    def test_refused(self):
        images = torch.zeros(1, 3, 8, 8)
        with pytest.raises(ValueError, match="one shape"):
            image_grid([images, torch.zeros(1, 3, 8, 9)])
        with pytest.raises(ValueError, match="one shape"):
            image_grid([])
        with pytest.raises(ValueError, match="1 labels for 2 columns"):
            image_grid([images, images], ["one"])
