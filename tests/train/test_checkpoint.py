"""Checkpoints on disk: each is whole or absent, is verified when it is read, and is deleted in rotation."""

import hashlib
import json
import random
import resource
import shutil

import pytest
import torch

from tests.processes import finish, start
from tests.train.runs import make, small_config
from train.loop.checkpoints.files import (
    checkpoints,
    damage,
    load_checkpoint,
    load_optimizer,
    newest,
    optimizer_tensors,
    rotate,
    save_checkpoint,
)


def contents(step=0):
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(3, 4, 5, 6, generator=generator)
    return {
        "model": {"a": image.to(memory_format=torch.channels_last), "b.c": torch.arange(5), "s": torch.tensor(2.5)},
        "half": {"x": torch.randn(7, generator=generator).bfloat16()},
        "empty": {},
    }  # fmt: skip


def save(root, *steps):
    return [save_checkpoint(root, step, contents(step), {"samples": 8 * step}) for step in steps]


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_loads_as_it_was_saved(tmp_path):
    [path] = save(tmp_path, 12)
    assert path == tmp_path / "step-000012"
    tensors, state = load_checkpoint(path)
    assert state == {"step": 12, "samples": 96}
    assert tensors.keys() == contents().keys()
    for group, expected in contents(12).items():
        assert tensors[group].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(tensors[group][name], value, rtol=0, atol=0)


def test_the_manifest_holds_sizes_and_hashes_of_every_file(tmp_path):
    [path] = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert {*manifest, "manifest.json"} == {file.name for file in path.iterdir()}
    for name, entry in manifest.items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def remove(path):
    (path / "model.safetensors").unlink()
    return "model.safetensors is missing"


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-7])
    return f"model.safetensors has {len(data) - 7} bytes where {len(data)} were written"


def lengthen(path):
    with (path / "state.json").open("a") as file:
        file.write(" ")
    return "state.json has"


def flip(path):
    data = bytearray((path / "half.safetensors").read_bytes())
    data[-1] ^= 128
    (path / "half.safetensors").write_bytes(data)
    return "half.safetensors is not what was written (its SHA-256 differs)"


def lose_manifest(path):
    (path / "manifest.json").unlink()
    return "manifest.json cannot be read"


def halve_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])
    return "manifest.json cannot be read"


def empty_manifest(path):
    (path / "manifest.json").write_text("{}")
    return "manifest.json does not list state.json"


def list_manifest(path):
    (path / "manifest.json").write_text("[1, 2]")
    return "manifest.json cannot be read"


def leave_nothing(path):
    shutil.rmtree(path)
    path.mkdir()
    return "manifest.json cannot be read"


@pytest.mark.parametrize("harm", [
    remove, truncate, lengthen, flip, lose_manifest, halve_manifest, empty_manifest, list_manifest, leave_nothing,
], ids=lambda harm: harm.__name__)  # fmt: skip
def test_every_damage_is_named_and_set_aside_and_the_one_before_is_used(tmp_path, harm):
    first, second = save(tmp_path, 1, 2)
    message, said = harm(second), []
    with pytest.raises(ValueError, match="step-000002: ") as error:
        load_checkpoint(second)
    assert message in str(error.value)
    assert newest(tmp_path, said.append) == first
    assert len(said) == 1 and str(second) in said[0] and message in said[0]
    assert "set aside as step-000002.damaged" in said[0]
    assert names(tmp_path) == ["step-000001", "step-000002.damaged"]
    assert load_checkpoint(first)[1]["samples"] == 8
    save(tmp_path, 2)  # the run takes the step again; what was set aside stays for whoever wants to look
    assert newest(tmp_path, said.append) == second and len(said) == 1


def test_any_flipped_bit_of_any_file_is_found(tmp_path):
    [path] = save(tmp_path, 1)
    rng = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for at in rng.sample(range(len(whole)), min(40, len(whole))):
            data = bytearray(whole)
            data[at] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            assert damage(path) is not None, f"{file.name}, byte {at}"
        file.write_bytes(whole)
    assert damage(path) is None


def test_all_damaged_leaves_nothing_to_continue(tmp_path):
    said = []
    for path in save(tmp_path, 1, 2):
        flip(path)
    assert newest(tmp_path, said.append) is None and len(said) == 2
    assert newest(tmp_path / "none", said.append) is None and len(said) == 2


def test_half_written_and_half_removed_checkpoints_are_cleared_away(tmp_path):
    [path] = save(tmp_path, 1)
    for name in (".step-000002.writing", ".step-000000.removing"):
        shutil.copytree(path, tmp_path / name)
    said = []
    assert newest(tmp_path, said.append) == path
    assert names(tmp_path) == ["step-000001"]
    assert len(said) == 1 and ".step-000002.writing: half written" in said[0]


@pytest.mark.parametrize("keep_last, keep_every, kept", [
    (1, None, [7]), (2, None, [6, 7]), (9, None, [1, 2, 3, 4, 5, 6, 7]), (1, 3, [3, 6, 7]), (2, 2, [2, 4, 6, 7]),
])  # fmt: skip
def test_rotation(tmp_path, keep_last, keep_every, kept):
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, {"model": {"a": torch.ones(1)}}, {})
        rotate(tmp_path, keep_last, keep_every)
    assert names(tmp_path) == [f"step-{step:06d}" for step in kept]
    assert all(damage(path) is None for path in checkpoints(tmp_path))


def test_checkpoints_are_ordered_by_number(tmp_path):
    save(tmp_path, 1_000_000, 999_999, 5)
    (tmp_path / "step-000007.damaged").mkdir()
    (tmp_path / "step-1").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]


# ------------------------------------------------------------------ a full disk


def refuse_large_files(size):
    """The kernel refuses to write more than `size` bytes into a file of this process, as it does on a full disk."""
    # Python ignores SIGXFSZ, the signal of this limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def save_one_too_large(root):
    save_checkpoint(root, 1, contents(1), {"samples": 8})
    refuse_large_files(200_000)
    try:
        save_checkpoint(root, 2, {"small": contents(2)["model"], "large": {"a": torch.ones(250_000)}}, {})
    except OSError as error:
        print(error)
        return 0
    return 1


def test_a_full_disk_is_a_clear_error_and_leaves_the_older_checkpoint(tmp_path):
    root, log = tmp_path / "checkpoints", tmp_path / "log.txt"
    assert finish(start(log, save_one_too_large, root)) == [0]
    assert f"{root / 'step-000002'}: the checkpoint could not be written" in log.read_text()
    assert "File too large" in log.read_text() and "earlier ones are intact" in log.read_text()
    assert names(root) == ["step-000001"]
    assert newest(root, pytest.fail) == root / "step-000001"


# ------------------------------------------------------------------ optimizer state


def convolution():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    return layer, torch.optim.AdamW(layer.parameters(), 1e-2, fused=True)


def steps(layer, optimizer, *seeds):
    for seed in seeds:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        layer(images.to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_loaded_moments_have_the_memory_layout_of_their_parameters(tmp_path):
    """The fused kernel walks weights and moments side by side: in another layout it would pair them wrongly."""
    layer, optimizer = convolution()
    steps(layer, optimizer, 1, 2)
    path = save_checkpoint(tmp_path, 2, {"m": layer.state_dict(), "o": optimizer_tensors(optimizer)}, {})
    tensors, _ = load_checkpoint(path)
    other, other_optimizer = convolution()
    other.load_state_dict(tensors["m"])
    load_optimizer(other_optimizer, tensors["o"])
    for name in ("exp_avg", "exp_avg_sq"):
        moment = other_optimizer.state[other.weight][name]
        assert moment.is_contiguous(memory_format=torch.channels_last)
        assert moment.stride() == other.weight.stride()
        assert torch.equal(moment, optimizer.state[layer.weight][name])
    steps(layer, optimizer, 3)
    steps(other, other_optimizer, 3)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


def test_the_state_of_other_parameters_is_refused():
    layer, optimizer = convolution()
    steps(layer, optimizer, 1)
    tensors = optimizer_tensors(optimizer)
    fewer = {key: value for key, value in tensors.items() if key.startswith("0.")}
    with pytest.raises(RuntimeError, match="state of 1 parameters where 2 are trained"):
        load_optimizer(convolution()[1], fewer)
    with pytest.raises(RuntimeError, match=r"exp_avg of shape \(5,\) where the parameter has \(4,\)"):
        load_optimizer(convolution()[1], tensors | {"1.exp_avg": torch.zeros(5)})


@pytest.mark.parametrize("section, values, message", [
    ("model", {"latent_channels": 4}, "size mismatch"),
    ("train", {"decoder_only": True}, "are trained"),
    ("loss", {"adversarial": {"weight": 0.5, "disc_start": 1, "channels": 8}}, "size mismatch"),
])  # fmt: skip
def test_a_checkpoint_of_another_configuration_is_refused_and_kept(
    photographs, tmp_path, section, values, message
):
    first = {
        "loss": {
            "perceptual": {"weight": 0.0},
            "adversarial": {"weight": 0.5, "disc_start": 1, "channels": 4},
        }
    }
    make(small_config(photographs, tmp_path, train={"steps": 2}, **first)).fit()
    written = (tmp_path / "config.yaml").read_text()
    changed = first | {section: first.get(section, {}) | values, "resume": {"force": True}}
    changed["train"] = {"steps": 2} | changed.get("train", {})
    with pytest.raises(ValueError, match="step-000002 is of another configuration: .*" + message):
        make(small_config(photographs, tmp_path, **changed))
    assert (tmp_path / "config.yaml").read_text() == written
    assert damage(tmp_path / "checkpoints" / "step-000002") is None
