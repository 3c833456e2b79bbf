"""The term `alignment`: its optimum, its numbers, and its learned layer through training, restart and ranks."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.processes import finish, run_python, start, start_ranks
from tests.train.runs import make, small_config
from train.config import load_config, to_yaml
from train.parts.alignment import AlignmentConfig, FrozenFeatures, alignment, misalignment

WIDTH, PATCH = 16, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small random vision transformers on disk: DINOv2 without a processor, ViT with one."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"patch_size": PATCH, "image_size": 16}
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(folder / "dino")
    ViTModel(ViTConfig(**sizes, intermediate_size=32)).save_pretrained(folder / "vit")
    processor = ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(folder / "vit")
    return folder


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_misalignment_is_the_formula_of_the_paper():
    projected, features = normal(2, 5, 3, 4), normal(3, 5, 3, 4)[:2]
    a, b = (x.flatten(2).double().numpy() for x in (projected, features))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    cosine = np.maximum(0, 1 - 0.5 - (a * b).sum(1)).mean()
    alike = [np.abs(a[i].T @ a[i] - b[i].T @ b[i]) for i in range(2)]
    expected = cosine + np.maximum(0, np.stack(alike) - 0.25).mean()
    assert misalignment(projected, features, 0.5, 0.25).item() == pytest.approx(expected, rel=1e-5)


def test_the_misalignment_is_zero_where_features_are_linear_in_the_latents():
    z, matrix = normal(2, 4, 6, 6), nn.Conv2d(4, WIDTH, 1, bias=False).requires_grad_(False)
    features = matrix(z)
    assert misalignment(3 * matrix(z), features, 0, 0).item() == pytest.approx(0, abs=1e-5)
    layer = nn.Conv2d(4, WIDTH, 1, bias=False)
    before = misalignment(layer(z), features, 0, 0).item()
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        misalignment(layer(z), features, 0, 0).backward()
        optimizer.step()
    assert misalignment(layer(z), features, 0, 0).item() < 0.02 * before


@pytest.mark.parametrize("name", ["dino", "vit"])
def test_features_are_those_of_the_network_on_the_grid_of_the_latents(folders, name):
    from transformers import AutoModel

    images = normal(2, 3, 24, 16).clamp(-1, 1)
    found = FrozenFeatures(str(folders / name))(images, 6, 4)
    assert found.shape == (2, WIDTH, 6, 4)
    if name == "vit":
        x, more = ((images + 1) / 2 - 0.5) / 0.25, {"interpolate_pos_encoding": True}
    else:
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x, more = ((images + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), {}
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folders / name).eval()(pixel_values=x, **more).last_hidden_state
    for row, column in ((0, 0), (2, 3), (5, 1)):
        torch.testing.assert_close(found[:, :, row, column], tokens[:, 1 + 4 * row + column])


def aligned(photographs, folder, features, **sections):
    term = {"kind": "alignment", "features": str(features), "weight": 0.5}
    loss = {
        "perceptual": {"weight": 0.0},
        "terms": [term],
        "view": {"kind": "equivariance", "smallest_side": 16},
    }
    sections = {"data": {"batch_size": 2}, "train": {"steps": 4}, "checkpoint": {"every": 2}} | sections
    return small_config(photographs, folder, loss=loss, **sections)


def fit(path):
    make(load_config(path)).fit()


def test_the_layer_is_trained_and_saved_and_a_restart_gives_the_same_weights(photographs, folders, tmp_path):
    log, done = tmp_path / "log.txt", {}
    for name in ("whole", "resumed"):
        folder, path = tmp_path / name, tmp_path / f"{name}.yaml"
        if name == "resumed":
            shutil.copytree(tmp_path / "whole/checkpoints/step-000002", folder / "checkpoints/step-000002")
        path.write_text(to_yaml(aligned(photographs, folder, folders / "dino")))
        assert finish(start(log, fit, path)) == [0], log.read_text()
        done[name] = load_file(folder / "checkpoints/step-000004/model.safetensors")
    whole, half = done["whole"], load_file(tmp_path / "whole/checkpoints/step-000002/model.safetensors")
    assert all(torch.equal(done["resumed"][key], whole[key]) for key in whole)
    assert [key for key in whole if not key.startswith("vae.")] == ["learned.alignment.weight"]
    assert not torch.equal(whole["learned.alignment.weight"], half["learned.alignment.weight"])
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == 4
    for line in logged:
        rest = line["train/loss"] - line["train/reconstruction"] - 1e-6 * line["train/kl"]
        assert rest == pytest.approx(0.5 * line["train/alignment"], rel=1e-4) and rest > 0


def gradients_of_a_rank(photographs, folder, features, batch_size):
    config = aligned(photographs, folder, features, data={"batch_size": batch_size})
    run = make(replace(config, train=replace(config.train, steps=1)))
    [player] = run.task.players
    player.update = lambda: {player.gradient_norm: torch.ones(())}
    run.train_step([next(iter(run.loader))])
    if run.is_main:
        torch.save({name: p.grad for name, p in run.task.model.named_parameters()}, folder / "gradients.pt")
    run.accelerator.end_training()


def test_two_ranks_give_the_gradients_of_one_process(photographs, folders, tmp_path):
    found, log = {}, tmp_path / "log.txt"
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        arguments = photographs, folder, folders / "dino", 4 // processes
        assert finish(*start_ranks(processes, log, gradients_of_a_rank, *arguments)) == [0] * processes, (
            log.read_text()
        )
        found[processes] = torch.load(folder / "gradients.pt")
    assert found[1]["learned.alignment.weight"].norm() > 1e-3
    for name, wanted in found[1].items():
        assert (found[2][name] - wanted).norm() < 1e-4 * max(wanted.norm().item(), 1e-3), name


def test_features_that_cannot_be_used_are_refused(folders, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = SimpleNamespace(train=SimpleNamespace(decoder_only=False, mixed_precision="no"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "none"}')
    for source in (tmp_path / "nowhere", tmp_path / "text"):
        with pytest.raises(
            ValueError, match=r"alignment.features: .* cannot be loaded .*; allowed: "
        ) as caught:
            alignment(AlignmentConfig(features=str(source)), run)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    run.train.decoder_only = True
    with pytest.raises(ValueError, match="alignment with train.decoder_only"):
        alignment(AlignmentConfig(features=str(folders / "dino")), run)
    config = aligned(photographs, tmp_path / "run", folders / "dino")
    with pytest.raises(ValueError, match="loss.terms: alignment is there twice"):
        make(replace(config, loss=replace(config.loss, terms=config.loss.terms * 2)))


def test_transformers_is_imported_only_where_it_is_used():
    program = "import sys, train.parts; print('transformers' in sys.modules)"
    result = run_python(program)
    assert result.stdout.strip() == "False", result.stderr
