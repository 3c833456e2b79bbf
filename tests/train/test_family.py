"""The same promises for each bottleneck and network: restarts, ranks, errors, and an export that loads again."""

import json
import os
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from kl_autoencoder import Autoencoder, KLAutoencoder, load_image
from kl_autoencoder.cli.loading import load_model
from kl_autoencoder.evaluation.other_autoencoders import OtherAutoencoder
from tests.processes import finish, free_ports, start_ranks
from tests.train.runs import small_config
from train.autoencoder.task import AutoencoderTask
from train.loop.trainer import Trainer

STEPS = 4
MLP = {"network": "mlp", "hidden_sizes": [24], "block_out_channels": None, "norm_num_groups": None,
       "sample_size": 32}  # fmt: skip
UNSET = {"block_out_channels": None, "norm_num_groups": None, "latent_channels": None}
CASES = {
    "none": {"model": {"bottleneck": {"kind": "none", "sparsity": 0.1}}},
    "denoising": {"model": {"bottleneck": {"kind": "none"}}, "loss": {"denoising": 0.3}},
    "vq": {"model": {"bottleneck": {"kind": "vq", "codes": 24, "decay": 0.5}}},
    "vq, gradient": {"model": {"bottleneck": {"kind": "vq", "codes": 24, "codebook": "gradient"}}},
    "fsq": {"model": {"bottleneck": {"kind": "fsq", "levels": [5, 4]}}},
    "gumbel": {"model": {"bottleneck": {"kind": "gumbel", "codes": 8, "anneal_steps": 3}},
               "loss": {"kl": {"weight": 0.1, "warmup_steps": 3}}},
    "adversarial": {"model": {"bottleneck": {"kind": "adversarial", "prior": "swiss_roll"}},
                    "loss": {"latent_adversarial": {"hidden": 8, "learning_rate": 1e-2}}},
    "mlp": {"model": MLP, "loss": {"kl": {"weight": 1.0}, "reconstruction": "bernoulli"}},
    "mlp, vq": {"model": MLP | {"bottleneck": {"kind": "vq", "codes": 4}}},
}  # fmt: skip


def config_of(case, photographs, folder, **sections):
    given = {name: dict(section) for name, section in CASES[case].items()}
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return small_config(photographs, folder, **{"train": {"steps": STEPS}} | given)


def run(config):
    trainer = Trainer(config, partial(AutoencoderTask, statistics_samples=4))
    summary = trainer.fit()
    trainer.accelerator.free_memory()
    return trainer, summary


def last(folder, steps=STEPS):
    """All tensors of the checkpoint of the last step: "file/name" -> tensor."""
    files = (Path(folder) / "checkpoints" / f"step-{steps:06d}").glob("*.safetensors")
    return {f"{file.stem}/{name}": t for file in files for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """A case's run of one process, made once: its folder, its Trainer and its summary."""

    @cache
    def made(case):
        folder = tmp_path_factory.mktemp("whole")
        return folder, *run(config_of(case, photographs, folder, checkpoint={"every": 2, "keep_last": 9}))

    return made


def train_cases(photographs, folder, ports):
    """Run in each of two ranks: all cases in turn, with half of the batch; the ranks meet anew for each."""
    for case, port in zip(CASES, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        run(config_of(case, photographs, folder / case, data={"batch_size": 2}))
        AcceleratorState._reset_state(reset_partial_state=True)
    return 0


@pytest.fixture(scope="module")
def two_ranks(photographs, tmp_path_factory):
    """The folder of the runs of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    processes = start_ranks(2, folder / "log.txt", train_cases, photographs, folder, free_ports(len(CASES)))
    assert finish(*processes) == [0, 0], (folder / "log.txt").read_text()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_run_continued_from_the_middle_ends_with_the_same_weights(case, photographs, whole, tmp_path):
    folder, _, _ = whole(case)
    first = folder / "checkpoints" / "step-000002"
    shutil.copytree(first, tmp_path / "checkpoints" / first.name)
    run(config_of(case, photographs, tmp_path))
    a, b = last(folder), last(tmp_path)
    assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == STEPS and all(value == value for line in logged for value in line.values())
    if case.startswith(("vq", "gumbel", "fsq")):
        assert all(line["train/codes/perplexity"] >= 1 for line in logged)


def assert_ranks_equal_one_process(two, one):
    """Compare all tensors of two checkpoints but the state of optimizers."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if "optimizer" not in name:
            torch.testing.assert_close(
                two[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_weights_of_one_process_with_the_doubled_batch(case, whole, two_ranks):
    assert_ranks_equal_one_process(last(two_ranks / case), last(whole(case)[0]))


@pytest.mark.parametrize("case", CASES)
def test_the_export_loads_again_and_is_the_average(case, photographs, whole, tmp_path):
    _, trainer, summary = whole(case)
    model = Autoencoder.from_pretrained(summary["export"])
    exported = trainer.task.exported.state_dict()
    assert all(torch.equal(t, exported[name]) for name, t in model.state_dict().items())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(images).sample, trainer.task.exported(images).sample)
    card = (summary["export"] / "README.md").read_text()
    assert "from kl_autoencoder import Autoencoder" in card
    if model.is_discrete:
        indices = model.encode_indices(images)
        assert indices.shape[0] == 2 and indices.max() < model.codes
        torch.testing.assert_close(model.decode_indices(indices), model(images).sample)
    values = {"pretrained": str(summary["export"]), **UNSET}
    again = Trainer(small_config(photographs, tmp_path, model=values), AutoencoderTask)
    torch.testing.assert_close(again.task.vae(images).sample, trainer.task.exported(images).sample)


def test_labels_condition_both_networks_and_can_be_dropped():
    torch.manual_seed(0)
    for network in (
        {"network": "mlp", "sample_size": 8},
        {"block_out_channels": (8, 16), "norm_num_groups": 4},
    ):
        model = Autoencoder(classes=3, latent_channels=2, **network)
        for projection in [*model.encoder.condition.projections, *model.decoder.condition.projections]:
            torch.nn.init.normal_(projection.weight)  # they start at zero: no condition
        images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 2])
        by_label = model(images, labels).sample
        assert not torch.allclose(by_label, model(images, torch.tensor([1, 1])).sample)
        torch.testing.assert_close(by_label[:1], model(images[:1], labels[:1]).sample)
        torch.testing.assert_close(model(images).sample, model(images, torch.tensor([3, 3])).sample)
    with pytest.raises(ValueError, match="labels: given to a model without classes"):
        Autoencoder(network="mlp", sample_size=8)(images, labels)


def test_an_untrained_condition_changes_nothing():
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    conditional, plain = Autoencoder(classes=5, **shape), Autoencoder(**shape)
    plain.load_state_dict({k: v for k, v in conditional.state_dict().items() if "condition" not in k})
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(conditional(images, torch.tensor([1, 4])).sample, plain(images).sample)


def test_the_convolutional_kl_autoencoder_is_diffusers_class(photographs, tmp_path):
    _, summary = run(small_config(photographs, tmp_path))
    assert json.loads((summary["export"] / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    KLAutoencoder.from_pretrained(summary["export"])


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"bottleneck": {"kind": "vq", "codes": 1}}}, "model.bottleneck.codes: 1; allowed"),
        ({"model": {"bottleneck": {"kind": "vq", "code": 9}}}, "model.bottleneck.code: no such key"),
        (
            {"model": {"bottleneck": {"kind": "fsq", "levels": [4, 4, 4]}}},
            "levels: .*; allowed: 2 whole numbers",
        ),
        (
            {"model": {"bottleneck": {"kind": "fsq"}, "use_quant_conv": True}},
            "model.use_quant_conv: no key of",
        ),
        ({"model": {"bottleneck": {"kind": "none"}, "start": "enlargement"}}, "model.start: no key of"),
        ({"model": MLP | {"sample_size": 16}}, "data.resolution: 32; allowed for an mlp: 16"),
        ({"model": {"label_dropout": 0.1}}, "model.label_dropout: .* without model.classes"),
        (
            {"model": MLP, "loss": {"adversarial": {"weight": 1.0, "disc_start": 1}}},
            "loss.adversarial.weight: .*mlp",
        ),
    ],
)
def test_impossible_models_are_refused_by_key(sections, message, photographs, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(small_config(photographs, tmp_path, **sections), AutoencoderTask)


def test_classes_without_labels_are_refused(photographs, tmp_path):
    trainer = Trainer(small_config(photographs, tmp_path, model={"classes": 10}), AutoencoderTask)
    with pytest.raises(ValueError, match="model.classes: 10, but .* has no labels; allowed: with data.label"):
        trainer.fit()


def test_a_pretrained_bottleneck_is_not_configured_again(photographs, whole, tmp_path):
    _, _, summary = whole("vq")
    values = {"pretrained": str(summary["export"]), **UNSET, "bottleneck": {"kind": "fsq", "levels": [4, 4]}}
    with pytest.raises(ValueError, match="model.bottleneck: given beside model.pretrained"):
        Trainer(small_config(photographs, tmp_path, model=values), AutoencoderTask)


def test_commands_read_such_a_run(photographs, whole, tmp_path, capsys):
    from kl_autoencoder.cli import main

    folder, _, summary = whole("fsq")
    picture = sorted(photographs.iterdir())[0]
    assert main(["info", str(summary["export"])]) == 0
    target = tmp_path / "again.png"
    assert main(["reconstruct", str(picture), "--model", str(folder), "-o", str(target)]) == 0
    assert load_image(target).shape == load_image(picture).shape
    capsys.readouterr()
    # as evaluate has it
    other = OtherAutoencoder("fsq", load_model(str(summary["export"]), "cpu", None), seed=0)
    images = load_image(picture)
    (reproduction,) = other.reproduce(images, [0])
    with torch.no_grad():
        torch.testing.assert_close(reproduction.images, other.vae(images).sample)
