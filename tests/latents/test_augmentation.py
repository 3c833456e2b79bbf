"""Variants of images: where their latents lie, what they depend on, and that a model with classes is told them."""

from types import SimpleNamespace

import pytest
import torch

from kl_autoencoder.latents.augmentation import Augmenter, Variant
from kl_autoencoder.networks.distributions import DiagonalGaussian

NAMES = ["cats/a.png", "cats/b.png", "cats/c.png", "dogs/a.png", "dogs/b.png", "owls/a.png"]
IMAGES = {name: torch.full((1, 1, 5, 6), i / 10) for i, name in enumerate(NAMES)}


class Known:
    """A model whose latents are the pixels, its posterior's deviation 0.1; with classes, it adds 10 a class."""

    device, dtype, size_multiple = torch.device("cpu"), torch.float32, 4

    def __init__(self, classes=None):
        self.config = SimpleNamespace(classes=classes)
        self.told = []

    def encode(self, images, labels=None):
        assert images.shape[2:] == (8, 8)  # padded
        self.told.append(labels)
        logvar = torch.full_like(images, 0.1).log() * 2
        return SimpleNamespace(latent_dist=DiagonalGaussian(torch.cat([images, logvar], 1)))

    def decode(self, z, labels=None):
        return SimpleNamespace(sample=z if labels is None else z + 10 * labels.item())


def read(name, size):
    return IMAGES[name] if size is None else IMAGES[name][..., : size[0], : size[1]]


def augmenter(model=None, **more) -> Augmenter:
    return Augmenter(model or Known(), read, NAMES, **more)


def test_the_plan_keeps_classes_and_has_nothing_between_one():
    variants = augmenter().plan(["noise", "between"], 2)
    assert len(variants) == len(set(variants)) == 6 * 2 + 5 * 2
    assert Variant("noise", "owls/a.png", 1) in variants
    assert not [v for v in variants if v.kind == "between" and v.name == "owls/a.png"]


def test_noise_is_the_posteriors_times_the_strength():
    for strength in (1.0, 2.5):
        made = torch.cat(
            [augmenter(strength=strength).make(Variant("noise", "dogs/a.png", n)) for n in range(80)]
        )
        assert made.shape == (80, 1, 5, 6)
        assert made.mean().item() == pytest.approx(0.3, abs=5 * 0.1 * strength / 2400**0.5)
        assert made.std().item() == pytest.approx(0.1 * strength, rel=0.08)


def test_between_lies_up_to_half_of_the_way_to_another_of_the_class():
    made = torch.cat([augmenter().make(Variant("between", "cats/a.png", n)) for n in range(60)])
    assert made.amax((1, 2, 3)).equal(made.amin((1, 2, 3)))
    values = made[:, 0, 0, 0]
    # half of the way to cats/c.png, 0.2
    assert 0 <= values.min() < 0.01 and 0.09 < values.max() <= 0.1 + 1e-6


def test_a_variant_depends_on_the_seed_and_its_name_alone():
    wanted = [Variant(kind, "cats/b.png", 3) for kind in ("noise", "between")]
    alone = Augmenter(Known(), read, NAMES[:3], seed=1)
    for variant in wanted:
        first = augmenter(seed=1).make(variant)
        augmenting = augmenter(seed=1)
        augmenting.make(Variant("noise", "dogs/b.png", 0))
        assert first.equal(augmenting.make(variant)) and first.equal(alone.make(variant))
        assert not first.equal(augmenter(seed=2).make(variant))
        assert not first.equal(augmenter(seed=1).make(variant._replace(number=4)))


def test_a_model_with_classes_is_told_the_number_of_each_folder():
    model = Known(classes=3)
    drawn = augmenter(model).make(Variant("drawn", "owls/a.png", 0))
    assert [label.tolist() for label in model.told] == [[2]]
    assert (drawn - 20).std().item() == pytest.approx(1, abs=0.4)  # 30 standard normal values, and the class
    between = augmenter(model).make(Variant("between", "dogs/a.png", 0))
    assert between.min() >= 10.3 and between.max() <= 10.35 + 1e-5


@pytest.mark.parametrize(
    ("model", "kinds", "message"),
    [
        (Known(), ["drawn"], "drawn: the model knows no classes; allowed: noise, between"),
        (Known(classes=4), ["noise"], "3 class folders; allowed: 4, which the model knows"),
    ],
)
def test_kinds_that_a_model_cannot_make_are_refused(model, kinds, message):
    with pytest.raises(ValueError, match=message):
        augmenter(model).plan(kinds, 1)


def test_an_encoder_without_a_posterior_has_no_noise():
    model = Known()
    model.encode = lambda images: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: images))
    with pytest.raises(ValueError, match="noise: the model's encoder has no posterior; allowed: between"):
        augmenter(model).make(Variant("noise", "cats/a.png", 0))
    assert augmenter(model).make(Variant("between", "cats/a.png", 0)).shape == (1, 1, 5, 6)
