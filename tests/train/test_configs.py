"""Every shipped recipe, tiny but with its own switches, compilation included: a whole run, and one restarted."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from kl_autoencoder import Autoencoder, KLAutoencoder
from tests.conftest import ROOT
from tests.processes import finish, start
from train.config import load_config
from train.loop import trainer
from train.smoke import STEPS, shrink
from train.tasks import task_maker

CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/family/*.yaml")])


def fit(path, folder):
    """A whole run at the sizes of `--smoke`, then its second half again, from the checkpoint in the middle.

    Compiled with aot_eager: forward and backward are traced as for inductor, but run by torch's own kernels.
    """
    recipe = load_config(path)
    small = shrink(recipe, folder / "whole")
    if recipe.train.compile:
        small = compiled(small, folder)
    if recipe.task == "code_prior":  # of a model that another recipe trains
        small = replace(small, model=replace(small.model, autoencoder=discrete_model(folder / "codes")))
    torch.compile = partial(torch.compile, backend="aot_eager")
    make_task = task_maker(small, small=True)
    trainer.Trainer(small, make_task).fit()
    name = f"checkpoints/step-{STEPS // 2:06d}"
    shutil.copytree(folder / "whole" / name, folder / "resumed" / name)
    trainer.Trainer(replace(small, output_dir=str(folder / "resumed")), make_task).fit()


def compiled(small, folder):
    """The same run compiled, with a network of two levels of one residual block each: tracing takes seconds.

    Every kind of layer is in it; `--smoke` runs the recipe's own number of levels.
    """
    two_levels = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
    model = small.model
    if model.pretrained is None:
        model = replace(model, **two_levels)
    else:
        KLAutoencoder(latent_channels=4, **two_levels).save_pretrained(folder / "pretrained")
        model = replace(model, pretrained=str(folder / "pretrained"), subfolder=None)
    return replace(small, model=model, train=replace(small.train, compile=True))


def discrete_model(folder):
    """A small autoencoder of gray images with a code book, untrained: its folder."""
    shape = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    Autoencoder(sample_size=8, bottleneck={"kind": "vq", "codes": 6}, **shape).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_trains_to_the_end_and_a_restart_gives_the_same_weights(path, tmp_path):
    recipe, log = load_config(path), tmp_path / "log.txt"
    assert finish(start(log, fit, path, tmp_path)) == [0], log.read_text()
    last = f"checkpoints/step-{STEPS:06d}"
    files = {file.name for file in (tmp_path / "whole" / last).glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors"} <= files
    if recipe.task == "autoencoder":
        assert ("discriminator.safetensors" in files) == (recipe.loss.adversarial.weight > 0)
    for file in files:
        ours, whole = (load_file(tmp_path / run / last / file) for run in ("resumed", "whole"))
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[key], whole[key]) for key in ours), file
    if recipe.task != "autoencoder":
        return
    kept = (tmp_path / "whole" / "export" / "training_state").is_dir()
    assert kept == recipe.export.training_state


def test_kl_f8_512_continues_with_the_discriminator_that_kl_f8_exports():
    first, then = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("kl_f8", "kl_f8_512"))
    before, after = first.loss.adversarial, then.loss.adversarial
    assert first.export.training_state and then.model.pretrained == f"{first.output_dir}/export"
    assert after.pretrained and after.weight == before.weight and after.disc_start == 0
    assert (after.channels, after.layers) == (before.channels, before.layers)
