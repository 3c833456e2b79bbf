"""The first lines of a run, and what becomes of rates, steps and averages when the batch grows."""

import re
import shlex

import pytest

from tests.conftest import ROOT
from train.config import Config, build, load_config
from train.loop.announcement import first_lines, for_the_same_samples
from train.loop.schedules import LearningRate

KL_F8 = ROOT / "configs" / "kl_f8.yaml"


def lines(batch, **sections):
    values = {"output_dir": "runs/a", "data": {"train": "photos", "batch_size": 4}} | sections
    config = build(Config, values)
    ranks = batch // 4
    return first_lines(config, LearningRate(config, ranks), 1234567, ranks, "cuda", counted={}).splitlines()


def test_without_a_rule_the_rate_is_that_of_this_batch():
    first, batch, rate = lines(4, optimizer={"learning_rate": 7e-4}, train={"steps": 1500})
    assert first == "runs/a: 1,234,567 trainable parameters on 1 x cuda, no mixed precision"
    assert batch == "batch 4 = 4 x 1 rank x 1 accumulated; 1,500 steps = 6,000 samples"
    assert rate == "learning rate 0.0007 for this batch (optimizer.scale_rule: none)"


@pytest.mark.parametrize(
    "rule, effective, factor", [("linear", "0.0064", "(64 / 4)"), ("sqrt", "0.0016", "sqrt(64 / 4)")]
)
def test_with_a_rule_the_rate_is_shown_with_its_origin(rule, effective, factor):
    optimizer = {"learning_rate": 4e-4, "reference_batch": 4, "scale_rule": rule, "warmup_steps": 50,
                 "schedule": "cosine"}  # fmt: skip
    *_, rate, scaled = lines(64, optimizer=optimizer, train={"steps": 1600}, ema={"decay": 0.999})
    assert rate == (
        f"learning rate {effective} = 0.0004 x {factor}, after 50 steps of warm-up, then falling to 0 (cosine)"
    )
    assert scaled.startswith("16 times the reference batch") and scaled.endswith(
        "train.steps=100, ema.decay=0.98412"
    )


def test_the_reference_batch_itself_needs_no_advice():
    assert len(lines(4, optimizer={"reference_batch": 4, "scale_rule": "sqrt"})) == 3


def test_an_average_over_as_many_samples():
    """After n samples the first has the same weight: decay^(n / b), with the reference batch b and with k b."""
    config = build(Config, {"output_dir": "a", "data": {"train": "p"}, "ema": {"decay": 0.999},
                            "optimizer": {"reference_batch": 8}})  # fmt: skip
    decay = for_the_same_samples(config, 8 * 16, counted={})["ema.decay"]
    assert decay ** (4096 / 128) == pytest.approx(0.999 ** (4096 / 8), rel=1e-9)


# ------------------------------------------------------------------ one truth for 1, 8 and 64 GPUs


def start_of_the_discriminator(config):
    """What the task counts in steps."""
    return {"loss.adversarial.disc_start": config.loss.adversarial.disc_start}


def table():
    """Row name -> cells of the table of GPUs in configs/README.md."""
    rows = re.findall(r"^\| ([^|]+) \|(.+)\|$", (ROOT / "configs" / "README.md").read_text(), re.MULTILINE)
    return {name.strip(): [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_table_of_gpus_is_what_kl_f8_does():
    config, rows = load_config(KL_F8), table()
    for column, gpus in enumerate((1, 8, 64)):
        batch = config.data.batch_size * gpus
        same = for_the_same_samples(config, batch, start_of_the_discriminator(config))
        assert rows["batch at 12 a device"][column] == f"{batch}"
        rate = LearningRate(config, gpus).peak()
        assert float(rows["learning rate (`sqrt`)"][column]) == pytest.approx(rate, rel=0.01)
        for name, key in (("train.steps", "train.steps"), ("disc_start", "loss.adversarial.disc_start")):
            cell = rows[f"`{name}` for the same samples"][column]
            assert int(cell.replace(",", "")) == same[key], name
        assert float(rows["`ema.decay` for the same samples"][column]) == pytest.approx(
            same["ema.decay"], abs=5e-5
        )


def test_the_command_in_slurm_sh_is_that_of_64_gpus():
    text = (ROOT / "configs" / "slurm.sh").read_text()
    nodes, gpus = (int(re.search(rf"--{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node"))
    command = re.search(r"sbatch configs/slurm.sh ((?:.+\\\n#)*.+)", text)[1].replace("\\\n#", " ")
    recipe, *overrides = shlex.split(command)
    config = load_config(ROOT / recipe, overrides)
    assert nodes * gpus == 64 and config.optimizer.scale_rule == "sqrt"
    reference = load_config(KL_F8)
    counted = start_of_the_discriminator(reference)
    same = for_the_same_samples(reference, 64 * config.data.batch_size, counted)
    assert config.train.steps == same["train.steps"]
    assert config.loss.adversarial.disc_start == same["loss.adversarial.disc_start"]
    assert config.ema.decay == pytest.approx(same["ema.decay"], abs=5e-5)
    assert LearningRate(config, 64).peak() == pytest.approx(4.32e-4, rel=1e-3)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_no_recipe_scales_the_rate_of_adam_linearly(path):
    assert load_config(path).optimizer.scale_rule in ("none", "sqrt")
