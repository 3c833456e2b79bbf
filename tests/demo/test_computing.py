"""The numbers and pictures that the demo page computes, without a browser."""

import gc
import html
import json
import re
import socket
import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.codec.public import codec_of
from kl_autoencoder.data.image_io import load_image, tensor_to_images
from kl_autoencoder.demo import address, latent_edits, latent_pictures, photographs, reconstruction
from kl_autoencoder.demo.measuring import Meter
from kl_autoencoder.demo.picture_files import PictureFiles
from kl_autoencoder.demo.studio import Studio
from kl_autoencoder.networks.distributions import DiagonalGaussian


@pytest.fixture(scope="module")
def models(two_models):
    return {name: KLAutoencoder.from_pretrained(two_models / name / "export") for name in ("first", "second")}


@pytest.fixture(scope="module")
def latents():
    return (
        torch.randn(1, 5, 6, 7, generator=torch.Generator().manual_seed(0))
        * torch.arange(1.0, 6)[:, None, None]
    )


@pytest.mark.parametrize(("longest", "size"), [(None, (90, 141)), (50, (32, 50)), (500, (90, 141))])
def test_a_photograph_is_scaled_down_and_never_up(tmp_path, longest, size):
    Image.fromarray(data.chelsea()[:90, :141]).save(tmp_path / "cat.png")
    photograph = photographs.read_photograph(tmp_path / "cat.png", longest)
    assert photograph.size == size and photograph.original_size == (90, 141) and photograph.name == "cat.png"
    if longest != 50:
        assert torch.equal(photograph.images, load_image(tmp_path / "cat.png", multiple_of=1))


def test_errors_name_the_file_without_its_folder(tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    Image.new("RGB", (15, 99)).save(tmp_path / "thin.png")
    for name, said in (("no.png", "not an image"), ("thin.png", "15x99 pixels; allowed: 16x16 and more")):
        with pytest.raises(ValueError, match=f"^{name}: {said}"):
            photographs.read_photograph(tmp_path / name)


def test_the_examples_are_those_of_scikit_image(tmp_path):
    paths = photographs.write_examples(tmp_path)
    assert len(paths) == 5 and (np.array(Image.open(paths[0])) == data.astronaut()).all()


def test_memory_and_time_of_a_block():
    gc.collect()
    with Meter(torch.device("cpu")) as meter:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        del held
    assert 60e6 < meter.peak_bytes < 100e6 and meter.seconds > 0


def test_memory_that_was_used_before_counts_again():
    """Blocks of a size that glibc keeps when they are freed."""
    found = []
    for _ in range(4):
        with Meter(torch.device("cpu")) as meter:
            blocks = [torch.ones(3 << 20, dtype=torch.uint8) for _ in range(10)]
            time.sleep(0.1)  # time for the thread that measures, even beside a busy process
            del blocks
        found.append(meter.peak_bytes)
    assert 31e6 < min(found) <= max(found) < 40e6


def test_every_model_and_codec_with_its_figures(models):
    images = photographs.image_to_tensor(Image.fromarray(data.coffee()[:101, :77]))[None]
    outcomes = list(reconstruction.compare(models, images, lpips=None))
    assert [o.name for o in outcomes] == [
        "first", "second", "JPEG like first", "WebP like first", "JPEG like second", "WebP like second",
    ]  # fmt: skip
    original = np.asarray(tensor_to_images(images)[0])
    for outcome in outcomes:
        seen = np.asarray(tensor_to_images(outcome.images)[0])
        assert outcome.values["psnr"] == pytest.approx(peak_signal_noise_ratio(original, seen), abs=1e-6)
        assert set(outcome.values) == {"psnr", "ssim"}
    first, second = outcomes[:2]
    assert (first.bytes, second.bytes) == (4 * 13 * 10, 2 * 26 * 20) and first.detail == "4 channels of 10x13"
    assert outcomes[4].bytes <= second.bytes and outcomes[4].detail == "at most as many bytes"
    with torch.inference_mode():
        whole = models["first"](load_image(tensor_to_images(images)[0])).sample[:, :, :101, :77]
    assert (first.images - whole.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-5
    assert first.costs.encode_ms > 0 and first.costs.peak_bytes >= 0


def test_a_photograph_that_does_not_fit_is_refused(models, monkeypatch):
    monkeypatch.setattr("kl_autoencoder.models.large_images.available_host_memory", lambda: 1e6)
    with pytest.raises(
        ValueError, match=r"^first: 512x512 pixels need .* are free; choose a smaller longest side$"
    ):
        reconstruction.reconstruct("first", models["first"], torch.zeros(1, 3, 512, 512), None)


def test_principal_components_are_those_of_numpy(latents):
    components, share = latent_pictures.principal_components(latents)
    vectors = latents[0].numpy().reshape(5, -1).astype(np.float64)
    left, singular, right = np.linalg.svd(vectors - vectors.mean(1, keepdims=True), full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(0), range(5)])
    expected = (signs * singular)[:3, None] * right[:3]
    np.testing.assert_allclose(components.numpy().reshape(3, -1), expected, atol=1e-4)
    np.testing.assert_allclose(share.numpy(), (singular**2 / (singular**2).sum())[:3], atol=1e-6)


def test_components_of_few_channels_and_of_even_latents():
    components, share = latent_pictures.principal_components(torch.ones(1, 2, 4, 4))
    assert components.shape == (2, 4, 4) and share.tolist() == [0, 0]
    picture = latent_pictures.component_picture(components)
    assert picture.shape == (1, 3, 4, 4) and not picture.any()


def test_a_channel_is_gray_at_its_mean_and_white_from_two_and_a_half_deviations(latents):
    pictures = latent_pictures.channel_pictures(latents)
    channel = latents[0, 4].numpy()
    expected = np.clip((channel - channel.mean()) / channel.std() / 2.5, -1, 1)
    assert pictures.shape == (5, 3, 6, 7)
    np.testing.assert_allclose(pictures[4].numpy(), np.broadcast_to(expected, (3, 6, 7)), atol=1e-5)


def test_noise_is_in_deviations_of_each_channel():
    z = (
        torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1, 5, 9.0])[:, None, None]
    )
    added = latent_edits.noisy(z, 0.5, seed=7) - z
    torch.testing.assert_close(added.std(dim=(2, 3)), 0.5 * z.std(dim=(2, 3)), rtol=0.03, atol=0)
    assert torch.equal(latent_edits.noisy(z, 0.5, seed=7) - z, added)
    assert torch.equal(latent_edits.noisy(z, 0.0, seed=7), z)


@pytest.mark.parametrize("spherical", [False, True])
def test_a_place_between_two(latents, spherical):
    a, b = latents, latents.flip(3)
    for place, expected in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(latent_edits.between(a, b, place, spherical), expected)
    half = latent_edits.between(a, b, 0.5, spherical)
    torch.testing.assert_close(half / half.norm(), (a + b) / (a + b).norm())


def test_an_attribute_is_the_difference_of_the_means():
    def posteriors(*means):
        return [
            DiagonalGaussian(torch.cat([torch.full((1, 2, 3, 3), m), torch.zeros(1, 2, 3, 3)], 1))
            for m in means
        ]

    direction = latent_edits.attribute(posteriors(1.0, 4.0), posteriors(0.5))
    torch.testing.assert_close(direction, torch.full((1, 2, 3, 3), 2.0))


def test_samples_are_counted_by_their_seed():
    gaussian = DiagonalGaussian(torch.zeros(1, 4, 8, 8))
    assert torch.equal(latent_edits.draws(gaussian, 3, seed=0)[1:], latent_edits.draws(gaussian, 2, seed=1))


def test_decoding_is_cropped_and_of_8_bits(models):
    images = torch.zeros(1, 3, 20, 20)
    decoded = latent_edits.decode(
        models["first"], latent_edits.encode(models["first"], images).mode(), (20, 20)
    )
    assert decoded.shape == images.shape
    torch.testing.assert_close((decoded + 1) * 127.5, ((decoded + 1) * 127.5).round(), atol=1e-3, rtol=0)


def test_the_oldest_pictures_make_room(tmp_path):
    files = PictureFiles(tmp_path, most_bytes=3000)
    names = [files.add(torch.rand(1, 3, 20, 20) * 2 - 1) for _ in range(4)]  # two of them fit
    assert all(1000 < path.stat().st_size < 1500 for path in tmp_path.iterdir())
    assert [files.path(name) is not None for name in names] == [False, False, True, True]
    assert len(list(tmp_path.iterdir())) == 2
    assert files.path("../conftest.py") is None and files.path(names[-1]).is_file()


def test_an_address_is_bound_or_refused():
    with address.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address.url(first) == f"http://127.0.0.1:{port}" and address.is_local(first)
        with pytest.raises(ValueError, match=f"--port: {port} is taken; --port 0 takes a free one"):
            address.bind("127.0.0.1", port)
    with pytest.raises(ValueError, match="--host: '192.0.2.1' is no address of this machine"):
        address.bind("192.0.2.1", 0)
    with pytest.raises(ValueError, match="--host: 'no such host'"):
        address.bind("no such host", 0)
    with address.bind("0.0.0.0", 0) as everywhere:
        assert not address.is_local(everywhere) and "127.0.0.1" in address.url(everywhere)
    assert isinstance(everywhere, socket.socket)


def test_a_compressed_photograph_beside_codecs_of_equal_bytes(models):
    pytest.importorskip("constriction")
    images = photographs.image_to_tensor(Image.fromarray(data.coffee()[:96, :96]))[None]
    codec = codec_of(models["first"])
    first, jpeg, webp = reconstruction.compress("first", codec, images, 70, None)
    file = codec.compress(images, 70)
    assert (
        first.bytes == len(file) and first.detail == f"quality 70, {8 * len(file) / 96**2:.3f} bits a pixel"
    )
    assert tensor_to_images(first.images)[0].tobytes() == codec.decompress(file).tobytes()
    assert (jpeg.name, webp.name) == ("JPEG", "WebP") and jpeg.costs is None
    assert webp.bytes <= first.bytes or webp.detail == "its smallest file"


@pytest.fixture
def studio(models, tmp_path):
    (tmp_path / "pictures").mkdir()
    return Studio(models, None, PictureFiles(tmp_path / "pictures"))


def picture_of(studio, source):
    return load_image(studio.files.path(source.removeprefix("pictures/")), multiple_of=1)


def test_an_attribute_is_added_to_a_photograph(studio, five_photos):
    photo, plus, minus = (str(five_photos / f"{name}.png") for name in ("coffee", "astronaut", "chelsea"))
    page = studio.attribute(photo, [plus], [minus], "first", 0.5)
    (choice,) = json.loads(html.unescape(re.search(r'data-choices="([^"]*)"', page)[1]))
    assert choice["label"] == "strength +0.5"
    vae = studio.models["first"]
    z, with_it, without = (vae.encode(load_image(p, 256)).latent_dist.mode() for p in (photo, plus, minus))
    with torch.no_grad():
        wanted = vae.decode(z + 0.5 * (with_it - without)).sample.clamp(-1, 1)
    assert (picture_of(studio, choice["source"]) - wanted).abs().max() <= 1 / 255 + 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((None, ["a"], ["b"]), "choose a photograph first"), (("a.png", [], ["b"]), "one of each at least")],
)
def test_an_attribute_without_its_photographs_is_refused(studio, arguments, said):
    with pytest.raises(ValueError, match=said):
        studio.attribute(*arguments, "first", 1.0)


def test_names_of_files_are_text_on_the_page(studio, tmp_path):
    Image.fromarray(data.chelsea()[:64, :64]).save(tmp_path / "<img src=x>.png")
    _, figures = studio.reconstruct(str(tmp_path / "<img src=x>.png"), None)
    assert "<img src=x>" not in figures and "&lt;img src=x&gt;.png, 64x64 pixels." in figures
    assert studio.reconstruct(None, None) == ("", "")
