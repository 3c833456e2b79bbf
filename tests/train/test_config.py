"""Configurations: what is written is what is read, and every mistake is named."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from train import __main__ as program
from train.config import TASKS, AutoencoderConfig, Config, build, load_config, to_yaml
from train.config.keys import describe, keys

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/**/*.yaml"))
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
    assert config.train.mixed_precision == "no" and config.model.options() == {"block_out_channels": (8, 16)}
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
        ("model.block_out_channels=[8, x]", "model.block_out_channels[1]: 'x'; allowed: a whole number"),
        ("model.block_out_channels=8", "model.block_out_channels: 8; allowed: a list"),
        ("task=autoencodr", "task: 'autoencodr'; allowed: autoencoder"),
        ("task=autoencodr", "did you mean autoencoder?"),
        ("task=[1]", "task: (1,); allowed: autoencoder"),
        ("plugins=[no_such_module]", "plugins: 'no_such_module' cannot be imported"),
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


@pytest.mark.parametrize("key, several", list(numeric_keys(AutoencoderConfig)))
def test_every_number_has_an_upper_bound(small, key, several):
    """One line below 300 characters for numbers that no machine holds, whichever way they are written."""
    values = (2**63 - 1, 2**64, "1e300", f"1{'0' * 400}", f"9{'0' * 5000}", f"-1{'0' * 400}")
    for value in values[key == "seed" :]:  # the one key for which 2^63 - 1 is as good as any
        text = f"[{value}, {value}]" if several else value
        with pytest.raises(ValueError, match=re.escape(key)) as error:
            load_config(small, [f"{key}={text}"])
        said = str(error.value)
        assert "\n" not in said and len(said) < 300 and "allowed" in said
    assert len(list(numeric_keys(AutoencoderConfig))) > 40


@pytest.mark.parametrize("text", ["seed: 2020-13-45", f"seed: 9{'0' * 5000}", "[" * 5000, "seed: \x00"])
def test_yaml_that_python_refuses_is_named(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(SMALL + text)
    with pytest.raises(ValueError, match="odd.yaml: not a YAML file") as error:
        load_config(path)
    assert len(str(error.value)) < 300 + len(str(tmp_path)) and "\n" not in str(error.value)


def test_a_pretrained_model_takes_no_network_keys(small):
    with pytest.raises(ValueError, match=r"model.norm_num_groups: given beside model.pretrained"):
        load_config(small, ["model.pretrained=a/b", "model.norm_num_groups=8"])


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


def test_a_key_that_stands_twice_is_refused(small):
    small.write_text(SMALL + "train:\n  steps: 1\n  compile: true\n  steps: 2\n")
    with pytest.raises(ValueError, match=r"small.yaml: steps: given twice \(line 6\)"):
        load_config(small)


def test_a_file_is_based_on_another(small, tmp_path):
    above = tmp_path / "sub" / "above.yaml"
    above.parent.mkdir()
    above.write_text("base: ../small.yaml\ndata: {batch_size: 3}\nseed: 5\n")
    config = load_config(above, ["train.steps=9"])
    assert (config.data.batch_size, config.data.resolution, config.seed, config.train.steps) == (3, 64, 5, 9)
    small.write_text("base: sub/above.yaml\n")
    with pytest.raises(ValueError, match="is based on itself"):
        load_config(above)


def test_every_key_has_a_sentence_a_type_and_a_default():
    described = list(keys())
    by_name = {key.name: key for key in described}
    assert by_name["train.steps"][1:4] == ("whole number", "1000", "at least 1 and at most 1,000,000,000")
    assert by_name["ema.decay"].range == "at least 0 and at most 1"
    assert by_name["loss.adversarial.loss"].type == "hinge | logistic"
    widths = by_name["model.block_out_channels"]
    assert widths[1:4] == ("list of whole number or null", "null", "at least 1 and at most 65,536")
    assert not [key.name for key in described if len(key.doc) < 5]
    written = yaml.safe_load(to_yaml(build(Config, {"output_dir": "a", "data": {"train": "b"}})))
    assert {*leaves(written)} - {"loss.terms"} <= {*by_name} and by_name["loss.view.high"].doc.startswith(
        "noise: "
    )


def test_every_task_has_its_keys_under_its_name_and_shared_ones_once():
    shared, *own = describe().split("\n\nWith task: ")
    names = [line.split(":")[0] for line in shared.splitlines() if not line.startswith(" ")]
    assert names[0] == "task" and "optimizer.learning_rate" in names and "model.latent_channels" not in names
    assert [text.split("\n")[0] for text in own] == list(TASKS)
    for text, cls in zip(own, TASKS.values(), strict=True):
        besides = [line.split(":")[0] for line in text.splitlines()[2:] if not line.startswith(" ")]
        assert {*names, *besides} == {key.name for key in keys(cls)} and not {*names} & {*besides}


def leaves(values, prefix=""):
    for name, value in values.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def test_messages_are_short_whatever_a_file_holds():
    for values in (
        {"x" * 5000: 1},
        {1: 2},
        {"data": [1] * 5000},
        {"seed": 10**2000},
        {"output_dir": {"a": "b" * 5000}},
    ):
        with pytest.raises(ValueError) as error:
            build(Config, {"output_dir": "a", "data": {"train": "b"}, **values})
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_the_program_prints_keys_and_the_resolved_configuration(small, capsys):
    assert program.main(["--keys"]) == 0
    assert (
        "optimizer.learning_rate: number, above 0 and at most 100, default 0.0001" in capsys.readouterr().out
    )
    assert program.main([str(small), "--print", "seed=4"]) == 0
    assert build(Config, yaml.safe_load(capsys.readouterr().out)) == load_config(small, ["seed=4"])
