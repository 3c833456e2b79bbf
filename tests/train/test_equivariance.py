"""The view `equivariance`: on autoencoders that commute with it exactly, what is drawn, what it asks of a run."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from kl_autoencoder.networks.bottlenecks import KLBottleneck
from tests.train.runs import make, small_config
from tests.train.test_adversarial import assert_ranks_are_one_process, loss_section
from train.autoencoder.model import TrainedModel, build_autoencoder
from train.config import ModelConfig
from train.parts import Draws
from train.parts.equivariance import Equivariance, EquivarianceConfig

FACTOR = 8


def encode(images):
    """A toy encoder: means of 8x8 pixels."""
    return F.avg_pool2d(images, FACTOR)


def decode(z):
    return F.interpolate(z, scale_factor=FACTOR, mode="nearest")


def draws(step, images=4, seed=0):
    return Draws(seed, torch.arange(images), torch.device("cpu"), step=step)


def view(**keys):
    return Equivariance(EquivarianceConfig(**keys))


def test_a_toy_that_commutes_has_no_error_under_turns():
    turns = view(probability=1, smallest_scale=1, largest_scale=1)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        z, targets = turns(encode(images), decode(encode(images)), draws(step))
        assert torch.equal(decode(z), targets) and not torch.equal(targets, decode(encode(images)))
    turned = {
        k
        for k in range(1, 4)
        for i in range(4)
        if torch.equal(targets[i], decode(encode(images)).rot90(k, (2, 3))[i])
    }
    assert len(turned) > 1  # of one batch, not all alike


def test_a_toy_that_commutes_has_no_error_under_scales():
    """Flat areas at every scale; ramps, away from the edge, where the encoder commutes with the scale too."""
    scales = view(probability=1, rotate=False)
    x = torch.arange(256.0).expand(1, 3, 256, 256) / 128 - 1
    halves = torch.where(x < 0, -0.5, 0.75)
    for step in range(24):
        z, targets = scales(encode(halves), halves, draws(step, images=1))
        side = z.shape[-1]
        assert targets.shape[-1] == FACTOR * side and 8 <= side <= 31
        error = (decode(z) - targets).abs()
        seam = 2 * FACTOR  # pixels beside the line between the halves that a filter of latents reaches
        assert error[..., : targets.shape[-1] // 2 - seam].max() < 1e-6
        assert error[..., targets.shape[-1] // 2 + seam :].max() < 1e-6 < error.max()
        z, targets = scales(encode(x), x, draws(step, images=1))
        error = (encode(targets) - z)[..., 3:-3].abs().max()
        # half a latent where the two grids were not aligned
        assert error < 0.1 * (z[0, 0, 0, 4] - z[0, 0, 0, 3])


def test_draws_are_those_that_are_published():
    published = view()
    images, z = torch.zeros(1, 3, 256, 256), torch.zeros(1, 4, 32, 32)
    sides, kinds = Counter(), Counter()
    for step in range(2000):
        encoded = published.at_encoder(images, FACTOR, draws(step, 1))
        _, targets = published(z, images, draws(step, 1))
        assert encoded.shape[-1] == 256 or targets.shape[-1] == 256
        kinds["low" if encoded.shape[-1] < 256 else "both" if targets.shape[-1] < 256 else "none"] += 1
        sides[min(encoded.shape[-1], targets.shape[-1]) // 8] += 1
    assert kinds["both"] / 2000 == pytest.approx(0.5, abs=0.03)
    assert kinds["low"] / 2000 == pytest.approx(0.125, abs=0.02)
    assert set(sides) == {*range(8, 33)}
    assert max(sides[k] for k in range(8, 32)) < 2 * min(sides[k] for k in range(8, 32))


def test_a_step_has_one_scale_on_every_rank_and_a_sample_its_turn_in_every_batch():
    always = view(probability=1)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        z, targets = always(encode(images), images, draws(step))
        half = Draws(0, torch.arange(2, 4), images.device, step=step)
        later = always(encode(images[2:]), images[2:], half)
        assert torch.equal(later[0], z[2:]) and torch.equal(later[1], targets[2:])
    shapes = {always(encode(images), images, draws(step))[0].shape[-1] for step in range(20)}
    assert len(shapes) > 2
    assert [always(encode(images), images, draws(s, seed=1))[0].shape for s in range(20)] != [
        always(encode(images), images, draws(s))[0].shape for s in range(20)
    ]


def test_low_resolution_reaches_the_encoder_with_noise_of_its_size():
    vae = build_autoencoder(ModelConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2))
    small = view(probability=0, low_resolution=1, smallest_side=16)
    model = TrainedModel(vae, KLBottleneck(), small, False, False)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    output = model(images, torch.randn(2, 2, 16, 16), draws(0, 2))
    side = output.encoded.shape[-1]
    assert 16 <= side < 32 and side % 2 == 0
    assert output.targets is output.encoded and output.images.shape == output.targets.shape
    wanted = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    assert torch.equal(output.encoded, wanted)


def test_latent_terms_see_what_was_encoded():
    vae = build_autoencoder(ModelConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=2))
    model = TrainedModel(vae, KLBottleneck(), view(probability=1, smallest_side=16), False, False)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    output = model(images, torch.randn(2, 2, 16, 16), draws(0, 2))
    assert output.encoded is images and output.code.z.shape[-1] == 16
    assert output.images.shape == output.targets.shape and output.targets.shape[-1] < 32


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"smallest_side": 16}, r"loss.view.smallest_side: 16; allowed: at least 24 .*layers=3"),
        ({"smallest_side": 64}, r"loss.view.largest_scale: 0.96875; allowed for data.resolution=32"),
        ({"smallest_scale": 0.9, "largest_scale": 0.5}, r"loss.view.smallest_scale: 0.9; allowed: at most"),
    ],
)
def test_views_that_do_not_fit_the_run_are_refused(photographs, tmp_path, keys, message):
    loss = {"perceptual": {"weight": 0.0}, "adversarial": {"weight": 0.5, "disc_start": 0, "channels": 4}}
    with pytest.raises(ValueError, match=message) as caught:
        make(small_config(photographs, tmp_path, loss={**loss, "view": {"kind": "equivariance", **keys}}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("accumulation, probability", [(1, 1.0), (2, 0.0)], ids=["transformed", "small"])
def test_ranks_give_the_gradients_of_one_process(photographs, tmp_path, accumulation, probability):
    view = {"kind": "equivariance", "probability": probability, "low_resolution": 1.0, "smallest_side": 24}
    loss = {**loss_section(), "view": view}
    assert_ranks_are_one_process(photographs, tmp_path, 2, 2, accumulation, loss)
