"""Configurations: what is written is what is read, and every mistake is named."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from train.config import Config, load_config, to_yaml

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
SMALL = "output_dir: runs/a\ndata: {train: photos, resolution: 64, batch_size: 2}\n"


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_written_back_the_same(path, tmp_path):
    config = load_config(path)
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config
    header = path.read_text().split("\n\n")[0].lower()
    assert all(word in header for word in ("purpose:", "command:", "hardware:", "expected:"))


def test_overrides_are_typed_and_nested(small):
    overrides = [
        "train.steps=7",
        "optimizer.learning_rate=1e-4",
        "loss.kl.weight=1",
        "train.mixed_precision=no",
    ]
    config = load_config(small, [*overrides, "model.block_out_channels=[8, 16]", "ema.enabled=false"])
    assert config.train.steps == 7 and config.optimizer.learning_rate == 1e-4 and config.loss.kl.weight == 1.0
    assert config.train.mixed_precision == "no" and config.model.network() == {"block_out_channels": (8, 16)}
    assert not config.ema.enabled


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stepz=7", "train.stepz: no such key; did you mean train.steps?"),
        ("optimiser.learning_rate=1", "optimiser: no such key; did you mean optimizer?"),
        ("train.steps=many", "train.steps: 'many'; allowed: a whole number"),
        ("train.steps=1.5", "train.steps: 1.5; allowed: a whole number"),
        ("train.steps=0", "train.steps: 0; allowed: at least 1"),
        ("train.compile=1", "train.compile: 1; allowed: true or false"),
        ("optimizer.name=sgdd", "optimizer.name: 'sgdd'; allowed: adamw"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: 0.0; allowed: above 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: inf; allowed: a finite number"),
        ("optimizer.betas=[0.5, 1.0]", "two numbers in"),
        ("ema.decay=1.5", "ema.decay: 1.5; allowed: at least 0 and at most 1"),
        ("loss.perceptual=vgg", "loss.perceptual: 'vgg'; allowed: keys and values"),
        ("seed.value=1", "seed: 1; allowed|seed has no keys"),
        ("steps", "steps: not an override; allowed: key=value"),
        ("data.train=null", "data.train: None; allowed: text"),
    ],
)
def test_mistakes_are_named(small, override, message):
    small.write_text(SMALL + "seed: 1\n")
    with pytest.raises(ValueError) as error:
        load_config(small, [override])
    assert any(part in str(error.value) for part in message.split("|")) and "\n" not in str(error.value)


def numeric_keys(cls, prefix=""):
    """Every key of a configuration that takes a number, or numbers."""
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from numeric_keys(kind, f"{prefix}{name}.")
        elif (
            {int, float} & {kind, *typing.get_args(kind)}
            or "float, ..." in str(kind)
            or "int, ..." in str(kind)
        ):
            yield prefix + name, "..." in str(kind)


@pytest.mark.parametrize("key, several", list(numeric_keys(Config)))
def test_every_number_has_an_upper_bound(small, key, several):
    """One line below 300 characters for numbers that no machine holds, whichever way they are written."""
    values = (2**63 - 1, 2**64, "1e300", f"1{'0' * 400}", f"9{'0' * 5000}", f"-1{'0' * 400}")
    for value in values[key == "seed" :]:  # the one key for which 2^63 - 1 is as good as any
        text = f"[{value}, {value}]" if several else value
        with pytest.raises(ValueError, match=re.escape(key)) as error:
            load_config(small, [f"{key}={text}"])
        said = str(error.value)
        assert "\n" not in said and len(said) < 300 and "allowed" in said
    assert len(list(numeric_keys(Config))) > 40


@pytest.mark.parametrize("text", ["seed: 2020-13-45", f"seed: 9{'0' * 5000}", "[" * 5000, "seed: \x00"])
def test_yaml_that_python_refuses_is_named(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(SMALL + text)
    with pytest.raises(ValueError, match="odd.yaml: not a YAML file") as error:
        load_config(path)
    assert len(str(error.value)) < 300 + len(str(tmp_path)) and "\n" not in str(error.value)


def test_a_pretrained_model_takes_no_network_keys(small):
    with pytest.raises(ValueError, match=r"model.latent_channels: given beside model.pretrained"):
        load_config(small, ["model.pretrained=a/b", "model.latent_channels=8"])


def test_missing_keys_and_files_are_named(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_config(tmp_path / "none.yaml")
    small.write_text("data: {train: photos}")
    with pytest.raises(ValueError, match="output_dir: not given"):
        load_config(small)
    small.write_text("a: [")
    with pytest.raises(ValueError, match="small.yaml: not a YAML file"):
        load_config(small)
    small.write_text("- a")
    with pytest.raises(ValueError, match="holds a list"):
        load_config(small)
