"""Images to bytes and back: sizes, qualities, other models, and what each error says."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, features
from skimage import data as photographs

from kl_autoencoder import KLAutoencoder, compress, decompress, load_image
from kl_autoencoder.codec import container
from kl_autoencoder.codec.codec import Codec, rounded
from kl_autoencoder.codec.public import codec_of
from kl_autoencoder.codec.steps import step_of
from kl_autoencoder.data.image_io import pad_to_multiple, tensor_to_images
from kl_autoencoder.evaluation import baselines
from kl_autoencoder.evaluation.metrics import LPIPS, psnr
from tests.codec.damage import damaged
from tests.conftest import backbone_missing

CHANNELS = 16  # of the latents of compact-codec


@pytest.fixture(scope="module")
def codec():
    return codec_of("compact-codec")


@pytest.fixture(scope="module")
def astronaut():
    return Image.fromarray(photographs.astronaut()[:200, 150:350])


@pytest.fixture(scope="module")
def other():
    """A small model of eight channels in patches of 2x2, untrained."""
    from kl_autoencoder import KLAutoencoderFlux2

    torch.manual_seed(0)
    return KLAutoencoderFlux2(
        block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), norm_num_groups=2, latent_channels=2
    ).eval()


@pytest.mark.parametrize(
    ("model", "quality"), [("compact", 10), ("compact", 60), ("compact", 100), ("compact-codec", 30)]
)
def test_the_image_is_what_the_decoder_makes_of_the_latents(astronaut, model, quality):
    """Latents are decoded to the expected values within their steps, for compact-codec to the middles."""
    images, codec = pad_to_multiple(load_image(astronaut, multiple_of=1), 8), codec_of(model)
    vae, step, data = codec.vae, step_of(quality), compress(astronaut, quality, model=model)
    symbols, latents = codec.decoded(*container.unpack(data))
    with torch.inference_mode():
        z = vae.scale(vae.encode(images).latent_dist.mode())
        wanted = vae.decode(vae.unscale(torch.from_numpy(latents)[None] * step)).sample[:, :, :200, :200]
    np.testing.assert_array_equal(symbols, (z[0] / step + 0.5).floor().numpy())
    errors = [np.square(z[0].numpy() - each * step).mean() for each in (latents, symbols)]
    evenly = 1.01 if quality == 100 else 1  # within so small a step all places are about equally likely
    if model == "compact":
        assert errors[0] < errors[1] * evenly and 0 < np.abs(latents - symbols).max() < 0.5
    else:
        np.testing.assert_array_equal(latents, symbols)
    found = decompress(data)
    assert found.size == (200, 200) and found.mode == "RGB"
    difference = np.asarray(found).astype(int) - np.asarray(tensor_to_images(wanted)[0]).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_higher_quality_takes_more_bytes_and_has_a_higher_psnr(astronaut):
    original = load_image(astronaut)
    files = [compress(astronaut, quality) for quality in (5, 20, 35, 55, 75)]
    sizes = [len(file) for file in files]
    quality = [psnr(load_image(decompress(file)), original).item() for file in files]
    assert sizes == sorted(sizes) and quality == sorted(quality)
    assert quality[-1] - quality[0] > 5


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (33, 250)])
def test_an_image_of_any_size_keeps_its_size(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = decompress(compress(Image.fromarray(pixels)))
    assert (image.height, image.width) == size


def test_a_file_and_a_tensor_of_one_image_give_the_same_bytes(astronaut, tmp_path):
    wanted = compress(astronaut, 50)
    astronaut.save(tmp_path / "a.png")
    assert compress(tmp_path / "a.png", 50) == wanted
    assert compress(load_image(astronaut, multiple_of=1), 50) == wanted
    assert compress(load_image(astronaut, multiple_of=1)[0], 50) == wanted
    transparent = astronaut.convert("RGBA")
    transparent.putalpha(0)
    assert compress(transparent, 50) == compress(Image.new("RGB", (200, 200), "white"), 50)


def test_a_limit_of_bytes_takes_the_best_quality_that_fits(astronaut):
    found = compress(astronaut, max_bytes=700)
    header, _ = container.unpack(found)
    assert len(found) <= 700 < len(compress(astronaut, header.quality + 1))
    assert compress(astronaut, bits_per_pixel=0.14) == found
    with pytest.raises(ValueError, match="20 bytes are too few; at quality 1 it takes"):
        compress(astronaut, max_bytes=20)
    with pytest.raises(ValueError, match="one of them"):
        compress(astronaut, 50, max_bytes=700)


def test_large_images_are_coded_in_tiles(codec):
    latents = torch.randn(CHANNELS, 130, 300, generator=torch.Generator().manual_seed(0))
    data = codec.packed(latents, (1040, 2400), 40)
    header, chunks = container.unpack(data)
    assert len(chunks) == 6
    np.testing.assert_array_equal(codec.decoded(header, chunks)[0], rounded(latents, 40))
    with pytest.raises(ValueError, match="damaged: 5 chunks for 2400x1040 pixels"):
        codec.decoded(header, chunks[1:])


def test_the_hash_of_a_model_depends_on_its_scaling_and_not_on_its_precision(codec, astronaut):
    half = Codec(KLAutoencoder.from_pretrained("compact-codec", torch_dtype=torch.float16), "half")
    assert half.model_hash == codec.model_hash
    vae = KLAutoencoder.from_pretrained("compact-codec")
    vae.register_to_config(scaling_factor=1.0)
    with pytest.raises(ValueError, match="was made with the model 'compact-codec' of weights .*; .* has "):
        decompress(compress(astronaut), model=vae)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow cannot write AVIF here")
@pytest.mark.skipif(backbone_missing("alex"), reason="the LPIPS backbone alex is not in TORCH_HOME")
def test_at_few_bytes_a_photograph_looks_more_like_itself_than_as_avif():
    image = load_image(Image.fromarray(photographs.astronaut()))
    file = compress(image, bits_per_pixel=0.12)
    (avif, sizes), lpips = baselines.codec(image, "AVIF", len(file)), LPIPS("alex")
    assert sizes[0] <= len(file)
    with torch.inference_mode():
        ours, others = (lpips(decoded, image).item() for decoded in (load_image(decompress(file)), avif))
    assert ours < 0.85 * others


def test_a_file_says_which_packaged_model_decompresses_it(astronaut):
    data = compress(astronaut, model="compact")
    assert container.unpack(data)[0].model_name == "compact"
    wanted = np.asarray(decompress(data, model="compact"))
    np.testing.assert_array_equal(np.asarray(decompress(data)), wanted)
    with pytest.raises(
        ValueError, match="was made with the model 'compact' of weights .*; compact-codec has "
    ):
        decompress(data, model="compact-codec")


def test_latents_in_patches(other, astronaut):
    image = decompress(compress(astronaut, model=other), model=other)
    assert image.size == astronaut.size


def test_damaged_files_with_right_checksums_are_refused_or_decoded(codec):
    """An attacker could write such files: they cause no crash, and no symbols beyond the bounds."""
    chance, size = random.Random(0), (160, 160)
    latents = torch.randn(CHANNELS, 20, 20, generator=torch.Generator().manual_seed(0))
    header, (chunk,) = container.unpack(codec.packed(latents, size, 40))
    refused = 0
    for _ in range(100):
        try:
            found, _ = codec.decoded(*container.unpack(container.pack(header, [damaged(chunk, chance)])))
            assert found.shape == (CHANNELS, 20, 20) and np.abs(found).max() < 1 << 17
        except ValueError as error:
            assert "damage" in str(error) or "more coded" in str(error)
            refused += 1
    assert refused > 10


def test_three_hundred_damaged_files_are_refused_in_one_line(astronaut):
    chance, data = random.Random(1), compress(astronaut)
    for _ in range(300):
        with pytest.raises(ValueError) as told:
            decompress(damaged(data, chance))
        assert "\n" not in str(told.value) and len(str(told.value)) < 160


def test_decoded_latents_do_not_depend_on_the_fast_path_or_threads(codec, astronaut):
    """The encoder computes latents in floats; every decoder reads the same whole numbers from the file."""
    data = compress(astronaut, 70)
    header, chunks = container.unpack(data)
    wanted, _ = codec.decoded(header, chunks)
    in_training = KLAutoencoder.from_pretrained("compact-codec").train()  # nothing is executed in pieces
    whole = Codec(in_training, "compact-codec", codec.learned)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(whole.decoded(header, chunks)[0], wanted)
        pixels = np.asarray(whole.decompress(data)).astype(int)
    finally:
        torch.set_num_threads(threads)
    assert np.abs(pixels - np.asarray(decompress(data)).astype(int)).max() <= 1
