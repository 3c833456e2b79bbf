"""What a later run takes over: the discriminator beside an exported model, a moving average switched on or off."""

import pytest
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from tests.train.runs import equal, make, weights
from tests.train.test_adversarial import loss_section
from train.config import Config, ModelConfig, build
from train.loop.launch import PLUGINS


def going_on(config, folder):
    """The same configuration, from the model that a run exported."""
    object.__setattr__(config, "model", ModelConfig(pretrained=str(folder / "export")))
    return config


def test_another_run_goes_on_with_the_discriminator_and_its_optimizer(small, tmp_path):
    first = small(
        tmp_path / "first", loss=loss_section(), export={"training_state": True}, train={"steps": 3}
    )
    make(first).fit()
    AutoencoderKL.from_pretrained(tmp_path / "first" / "export")  # which the files beside it do not disturb
    loss = loss_section(pretrained=True)
    loss["adversarial"].pop("pretrained")
    config = going_on(small(tmp_path / "second", loss=loss), tmp_path / "first")
    object.__setattr__(config.loss.adversarial, "pretrained", True)
    adversary = make(config).task.adversary
    for name, tensors in adversary.tensors().items():
        assert equal(dict(tensors), weights(tmp_path / "first", 3, name)), name
    assert {int(value) for key, value in adversary.tensors()["discriminator_optimizer"].items()
            if key.endswith(".step")} == {3}  # fmt: skip
    object.__setattr__(config.loss.adversarial, "channels", 8)
    with pytest.raises(ValueError, match="of another shape than channels=8, layers=3"):
        make(config)


def test_a_model_without_a_discriminator_is_named(small, tmp_path):
    make(small(tmp_path / "first", loss=loss_section(), train={"steps": 1})).fit()
    assert not (tmp_path / "first" / "export" / "training_state").exists()
    config = going_on(small(tmp_path / "second", loss=loss_section()), tmp_path / "first")
    object.__setattr__(config.loss.adversarial, "pretrained", True)
    with pytest.raises(ValueError, match=r"loss.adversarial.pretrained: no discriminator in .*first/export"):
        make(config)


@pytest.mark.parametrize("section, message", [
    ({"export": {"training_state": True}}, "export.training_state: true in a run without a discriminator"),
    ({"loss": {"adversarial": {"weight": 0.5, "disc_start": 0, "pretrained": True}}},
     "loss.adversarial.pretrained: true; allowed: with"),
])  # fmt: skip
def test_keys_that_exclude_each_other_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        build(Config, {"output_dir": "a", "data": {"train": "b"}} | section)


def test_a_moving_average_can_be_switched_off_and_on_between_restarts(small, tmp_path, capsys):
    """Switched on it starts from the weights; the weights themselves do not notice."""
    whole = small(tmp_path / "whole", train={"steps": 4})
    make(whole).fit()
    for steps, on in ((1, True), (2, False), (3, True), (4, True)):
        run = make(small(tmp_path / "run", ema={"enabled": on}, train={"steps": steps}))
        if steps == 3:
            assert equal(dict(run.task.ema.network.state_dict()), dict(run.task.vae.state_dict()))
        run.fit()
        assert (tmp_path / f"run/checkpoints/step-{steps:06d}/ema.safetensors").exists() == on
    assert equal(weights(tmp_path / "run", 4), weights(tmp_path / "whole", 4))
    exported = load_file(tmp_path / "run" / "export" / "diffusion_pytorch_model.safetensors")
    assert not equal(exported, weights(tmp_path / "whole", 4, "ema"))
    said = capsys.readouterr().out
    assert said.count("it starts from the weights of this step") == 1
    assert said.count("the moving average so far ends here") == 1


@pytest.mark.parametrize("name, value, words", [
    *((name, "true", plugin) for name, plugin in PLUGINS.items()),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile=true"),
])  # fmt: skip
def test_accelerates_plugins_are_refused_in_words(small, tmp_path, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        make(small(tmp_path / "run"))
    assert name in str(error.value) and words in str(error.value) and len(str(error.value)) < 300
    assert not (tmp_path / "run").exists()
