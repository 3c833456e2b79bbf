"""What is taught of the family, on digits of 8x8: latents of the shape of a prior, and posterior collapse."""

import torch

from kl_autoencoder.cli.labelled_images import binarised
from kl_autoencoder.data.samples.installed import digits
from kl_autoencoder.evaluation.variational.bounds import Likelihood, elbo, importance_weights
from kl_autoencoder.evaluation.variational.discrepancy import squared_mmd
from kl_autoencoder.evaluation.variational.information import active_units
from kl_autoencoder.networks.priors import PRIORS
from tests.conftest import ROOT
from train.autoencoder.task import AutoencoderTask
from train.config import load_config
from train.loop.trainer import Trainer


def trained(recipe, folder, *overrides):
    """The averaged model after the steps of a recipe of the family, which takes batches straight from memory."""
    path = ROOT / "configs" / "family" / f"{recipe}.yaml"
    keys = (f"output_dir={folder}", "validation.lpips_net=squeeze", *overrides)
    config = load_config(path, keys)
    task = Trainer(config, AutoencoderTask).task
    gray = torch.from_numpy(digits()[0][:1500])[:, None].float() / 127.5 - 1
    order = torch.Generator().manual_seed(0)
    for step in range(config.train.steps):
        for player in task.players:
            player.begin(step)
        sample = torch.arange(64) + 64 * step
        rows = torch.randint(len(gray), (64,), generator=order)
        task.micro_batch(step, {"images": binarised(gray[rows], "dynamic", seed=step), "sample": sample})
        task.end_step(step + 1)
    return task.exported


def images():
    """The digits of the training split, (1500, 1, 8, 8) in black and white."""
    gray = torch.from_numpy(digits()[0][:1500])[:, None].float()
    return binarised(gray / 127.5 - 1, "dynamic", seed=0)


@torch.no_grad()
def distance_from_normal(model):
    latents = model.encode(images()).latent_dist.mode().flatten(1)
    prior = PRIORS["normal"].sample(3000, latents.shape[1], torch.Generator().manual_seed(1))
    return squared_mmd(latents, prior)


def test_latents_of_an_adversarial_autoencoder_are_ten_times_nearer_to_the_prior(tmp_path):
    """Makhzani et al. 2015; with the recipe's network, optimizer and discriminator."""
    steps = ("train.steps=200",)
    prior = "model.bottleneck={kind: adversarial, prior: normal}"
    adversarial = distance_from_normal(trained("aae_digits", tmp_path / "aae", *steps, prior))
    plain = distance_from_normal(
        trained("aae_digits", tmp_path / "ae", *steps, "model.bottleneck={kind: none}")
    )
    print("MMD", adversarial, plain)
    assert abs(adversarial) < plain / 10


def test_a_posterior_collapses_and_is_saved_by_annealing_or_free_bits(tmp_path):
    """Beta = 2 from the first step: no latent carries anything. Annealed to the same beta the bound is better."""
    base = ("train.steps=300", "model.hidden_sizes=[128, 128]", "model.latent_channels=8", "loss.kl.weight=2",
            "optimizer.learning_rate=2.0e-3")  # fmt: skip
    cures = {"none": (), "annealing": ("loss.kl.warmup_steps=225",), "free bits": ("loss.kl.free_bits=0.25",)}
    found = {
        name: carried(trained("vae_digits", tmp_path / name, *base, *cure)) for name, cure in cures.items()
    }
    print(found)
    active, rate, collapsed = found["none"]
    assert active == 0 and rate < 0.05
    for cure, least in (("annealing", 0.15), ("free bits", 0.8)):  # rates in nats an image
        active, rate, bound = found[cure]
        assert active >= 5 and rate > least and bound > collapsed + 0.1, cure


@torch.no_grad()
def carried(model):
    """Active units, rate and ELBO in nats an image."""
    x = images()
    posterior = model.encode(x).latent_dist
    weights = importance_weights(model, x, Likelihood("bernoulli", None), 4, torch.Generator().manual_seed(0))
    bound = elbo(weights, posterior.kl()).mean()
    return int(active_units(posterior.mean.flatten(1)).sum()), float(posterior.kl().mean()), float(bound)
