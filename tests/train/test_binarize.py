"""Gray images made black and white, fixed or by chance, and the range that a Bernoulli likelihood takes."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from train.autoencoder.likelihoods import bernoulli
from train.autoencoder.validation import HeldOut
from train.data.config import DataConfig
from train.data.samples import binarised
from train.data.training_data import TrainingData

LEVELS = np.arange(256, dtype=np.uint8).repeat(4096).reshape(256, 64, 64, 1)


def config(**values) -> DataConfig:
    digits = {"train": "sample-digits", "validation": "sample-digits", "channels": 1, "resolution": 8}
    whole = {"crop_scale": (1.0, 1.0), "horizontal_flip": False, "batch_size": 4, "num_workers": 0}
    return DataConfig(**{**digits, **whole, **values})


def take(data: DataConfig, samples: int, start=0, ranks=1, seed=3) -> torch.Tensor:
    """(samples, 1, 8, 8), the samples from `start` on as `ranks` ranks see them."""
    seen = {}
    for rank in range(ranks):
        batches = TrainingData(data, seed).loader(start, rank, ranks)
        for batch in itertools.islice(batches, samples // (ranks * data.batch_size)):
            seen |= dict(zip(batch["sample"].tolist(), batch["images"], strict=True))
    return torch.stack([seen[n] for n in range(start, start + samples)])


def test_fixed_is_a_threshold_at_a_half():
    assert (binarised(LEVELS, "fixed", random.Random(0)) == 255 * (LEVELS / 255 >= 0.5)).all()
    gray, fixed = take(config(), 24), take(config(binarize="fixed"), 24)
    assert fixed.equal(torch.where(gray >= 0, 1.0, -1.0))


def test_dynamic_is_white_by_the_chance_that_gray_is():
    """4,096 pixels of each level: within 5 deviations of the binomial, and black and white exactly."""
    found = binarised(LEVELS, "dynamic", random.Random(1))
    assert set(np.unique(found)) == {0, 255}
    share, chance = (found == 255).mean(axis=(1, 2, 3)), np.arange(256) / 255
    assert share[0] == 0 and share[255] == 1
    assert (np.abs(share - chance) <= 5 * np.sqrt(chance * (1 - chance) / 4096)).all()
    neighbours = np.corrcoef(found[128, :, :-1].ravel(), found[128, :, 1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(4096)


def test_dynamic_draws_by_seed_and_sample_alone():
    """Ranks, workers and restarts change nothing; each epoch and each seed draws anew."""
    data = config(binarize="dynamic")
    alone = take(data, 48)
    again = torch.cat(
        [take(config(binarize="dynamic", num_workers=2), 24, ranks=2), take(data, 24, start=24)]
    )
    assert alone.equal(again) and set(alone.unique().tolist()) == {-1.0, 1.0}
    images = 1500
    epochs = {n: [] for n in range(8)}
    for start in (0, images):
        gray, drawn = take(config(), images, start), take(data, images, start)
        by_image = {x.numpy().tobytes(): y for x, y in zip(gray, drawn, strict=True)}
        for n, key in enumerate(sorted(by_image)[:8]):
            epochs[n].append(by_image[key])
    assert all(not first.equal(second) for first, second in epochs.values())
    assert not take(data, 8, seed=4).equal(alone[:8])


def test_held_out_images_are_drawn_once():
    data = config(binarize="dynamic", validation_images=20)
    first, again = (
        torch.cat(list(HeldOut(TrainingData(data, seed).held_out(), 4).batches())) for seed in (0, 7)
    )
    assert first.equal(again) and set(first.unique().tolist()) == {-1.0, 1.0}
    gray = torch.cat(list(HeldOut(TrainingData(config(validation_images=20), 0).held_out(), 4).batches()))
    assert ((first + 1) / 2)[gray == 1].all() and not ((first + 1) / 2)[gray == -1].any()


def test_colours_are_not_binarised():
    with pytest.raises(
        ValueError, match=r"data.binarize: fixed with data.channels=3; allowed: with data.channels=1"
    ):
        config(binarize="fixed", channels=3)
    with pytest.raises(ValueError, match=r"binarize"):
        config(binarize="random")


def test_no_level_of_eight_bits_is_outside_of_a_bernoullis_range():
    """All 256, as the loader makes floats of them."""
    data = TrainingData(config(), 0)
    images = data.loader()._floats(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    assert images.min() == -1 and images.max() == 1
    assert bernoulli(images, torch.zeros_like(images), None).isfinite().all()


@pytest.mark.parametrize("worst", [1.0001, -1.5])
def test_images_outside_of_a_bernoullis_range_are_refused(worst):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 3] = worst
    with pytest.raises(
        ValueError, match=r"loss.reconstruction: bernoulli of images from .*; allowed: -1 to 1"
    ):
        bernoulli(images, torch.zeros_like(images), None)
