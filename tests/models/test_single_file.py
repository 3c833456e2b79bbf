"""Names of LDM and diffusers, configs read from tensors, and files that are damaged or hostile."""

import json
import os
import pickle
import warnings

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from kl_autoencoder.files import read_tensors, save_tensors
from kl_autoencoder.models.single_file import (
    check_state,
    config_from_tensors,
    diffusers_to_ldm,
    ldm_to_diffusers,
    load_single_file,
    save_single_file,
)
from tests.published import PUBLISHED, reduced

# Structures beyond the published ones: other depths, other numbers of levels, other channels.
CUSTOM = {
    "two-levels": {**reduced(PUBLISHED["sd"], (32, 64)), "layers_per_block": 1},
    "five-levels": {**reduced(PUBLISHED["sd3"], (32, 32, 64, 64, 64)), "layers_per_block": 3},
    "one-level": {
        **reduced(PUBLISHED["sd"], (32,)),
        "in_channels": 1,
        "out_channels": 2,
        "latent_channels": 7,
    },
    "half-quant": {**reduced(PUBLISHED["sd"]), "use_quant_conv": False},
}
for _config in CUSTOM.values():
    _config["down_block_types"] = ("DownEncoderBlock2D",) * len(_config["block_out_channels"])
    _config["up_block_types"] = ("UpDecoderBlock2D",) * len(_config["block_out_channels"])
CONFIGS = {**{name: reduced(config) for name, config in PUBLISHED.items()}, **CUSTOM}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def state_of(config):
    """Random weights of diffusers' own class, biases and norms too, so that no two tensors are equal."""
    generator = torch.Generator().manual_seed(0)
    state = AutoencoderKL(**config).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def small_sd():
    return state_of(CONFIGS["sd"])


def as_conv(tensors, dims):
    """Attention weights as convolutions of `dims` spatial dimensions."""
    return {
        name: tensor.reshape(*tensor.shape, *(1,) * dims)
        if "attentions" in name and tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


class TestNames:
    def test_equals_diffusers(self, config):
        state = state_of(config)
        ldm = diffusers_to_ldm(state)
        assert len(ldm) == len(state)
        assert_same(convert_ldm_vae_checkpoint(dict(ldm), dict(config)), state)
        assert_same(ldm_to_diffusers(ldm), state)

    def test_names_and_shapes_of_sd(self):
        """As CompVis/latent-diffusion, ldm/modules/diffusionmodules/model.py, makes them for kl-f8."""
        with torch.device("meta"):
            state = AutoencoderKL(**PUBLISHED["sd"]).state_dict()
        ldm = {name: tuple(tensor.shape) for name, tensor in diffusers_to_ldm(state).items()}
        assert len(ldm) == 248
        assert ldm["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
        assert ldm["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3)
        assert ldm["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
        assert ldm["decoder.up.1.block.0.conv1.weight"] == (256, 512, 3, 3)
        assert ldm["decoder.up.3.upsample.conv.bias"] == (512,)
        assert ldm["decoder.up.3.block.2.norm2.weight"] == (512,)
        assert (
            ldm["decoder.mid.attn_1.q.weight"]
            == ldm["encoder.mid.attn_1.proj_out.weight"]
            == (512, 512, 1, 1)
        )
        assert ldm["decoder.norm_out.weight"] == (128,) and ldm["quant_conv.weight"] == (8, 8, 1, 1)
        assert (
            "decoder.up.0.upsample.conv.weight" not in ldm
            and "encoder.down.3.downsample.conv.weight" not in ldm
        )

    @pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
    def test_inside_a_whole_checkpoint(self, prefix):
        state = small_sd()
        whole = {prefix + name: tensor for name, tensor in diffusers_to_ldm(state).items()}
        whole |= {"model.diffusion_model.out.2.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
        whole |= {
            "cond_stage_model.encoder.conv_in.weight": torch.zeros(1),
            f"{prefix}loss.logvar": torch.ones(1),
        }
        assert_same(ldm_to_diffusers(whole), state)
        assert_same(ldm_to_diffusers({**small_sd(), "loss.logvar": torch.ones(1)}), state)

    def test_training_checkpoint(self):
        state = small_sd()
        whole = diffusers_to_ldm(state) | {
            "loss.logvar": torch.zeros(()),
            "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(2),
            "loss.discriminator.main.0.weight": torch.zeros(2),
            "model_ema.decay": torch.zeros(()),
            "model_ema.encoderconv_inweight": torch.zeros(2),
        }
        assert_same(ldm_to_diffusers(whole), state)

    @pytest.mark.parametrize("dims", [0, 1, 2])
    def test_old_diffusers_attention(self, dims):
        state = small_sd()
        old = {}
        for name, tensor in as_conv(state, dims).items():
            for new_name, old_name in {
                "to_q": "query",
                "to_k": "key",
                "to_v": "value",
                "to_out.0": "proj_attn",
            }.items():
                name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
            old[name] = tensor
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
        assert_same(ldm_to_diffusers(old), state)
        assert_same(diffusers_to_ldm(old), diffusers_to_ldm(state))

    @pytest.mark.parametrize("dims", [0, 1, 2])
    def test_ldm_attention_of_any_shape(self, dims):
        state = small_sd()
        ldm = {
            name: tensor.reshape(*tensor.shape[:2], *(1,) * dims)
            if ".attn_1." in name and tensor.ndim == 4
            else tensor
            for name, tensor in diffusers_to_ldm(state).items()
        }
        assert_same(ldm_to_diffusers(ldm), state)

    def test_half_precision_is_kept(self):
        state = {name: tensor.bfloat16() for name, tensor in small_sd().items()}
        assert_same(ldm_to_diffusers(diffusers_to_ldm(state)), state)

    def test_nothing_is_dropped(self):
        for name in ("encoder.down.0.attn.0.q.weight", "bn.running_mean", "decoder.mid.block_3.norm1.weight"):
            with pytest.raises(ValueError, match=rf"no place for: {name}"):
                ldm_to_diffusers({**diffusers_to_ldm(small_sd()), name: torch.zeros(1)})
        with pytest.raises(ValueError, match=r"no place for: quantize\.embedding"):
            diffusers_to_ldm({**small_sd(), "quantize.embedding.weight": torch.zeros(1)})
        twice = {**small_sd(), "encoder.mid_block.attentions.0.query.weight": torch.zeros(1)}
        with pytest.raises(
            ValueError, match=r"two tensors for one place: .*to_q\.weight and .*query\.weight"
        ):
            ldm_to_diffusers(twice)

    @pytest.mark.parametrize(
        "foreign",
        [
            "text_model.encoder.layers.0.mlp.fc1.weight",
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
        ],
    )
    def test_foreign_model(self, foreign):
        with pytest.raises(ValueError, match=rf"expected an AutoencoderKL .*found {foreign}"):
            ldm_to_diffusers({foreign: torch.zeros(1)})
        with pytest.raises(ValueError, match="found nothing"):
            ldm_to_diffusers({})


class TestConfig:
    def test_structure(self, config):
        found = config_from_tensors(state_of(config))
        told_by_tensors = {*found} - {"norm_num_groups", "act_fn", "force_upcast"}
        expected = dict(AutoencoderKL(**config).config)
        for key in told_by_tensors:
            assert found[key] == (
                list(expected[key]) if isinstance(expected[key], tuple) else expected[key]
            ), key
        assert AutoencoderKL(**found).load_state_dict(state_of(config))

    @pytest.mark.parametrize(
        "widths, groups", [((128, 256), 32), ((32, 64), 32), ((48, 96), 24), ((24, 40), 8), ((20, 20), 20)]
    )
    def test_groups(self, widths, groups):
        with torch.device("meta"):
            config = {**CONFIGS["two-levels"], "block_out_channels": widths, "norm_num_groups": groups}
            assert config_from_tensors(AutoencoderKL(**config).state_dict())["norm_num_groups"] == groups

    @pytest.mark.parametrize(
        "name", ["encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_in.weight"]
    )
    def test_missing(self, name):
        state = small_sd()
        del state[name]
        with pytest.raises(ValueError, match=name):
            config_from_tensors(state)
        with pytest.raises(ValueError, match=r"encoder\.down_blocks\.0"):
            config_from_tensors({name: t for name, t in small_sd().items() if "encoder.down" not in name})


class TestSingleFile:
    def test_round_trip(self, tmp_path, config):
        state, path = state_of(config), tmp_path / "vae.safetensors"
        expected = json.loads(json.dumps({**config, "scaling_factor": 0.77}))
        save_single_file(path, state, {"_class_name": "AutoencoderKL", **expected})
        found, tensors = load_single_file(path)
        assert found == expected  # norm_num_groups 8 too, which the tensors do not tell
        assert_same(tensors, state)
        assert_same(load_file(path), diffusers_to_ldm(state))
        assert [p.name for p in tmp_path.iterdir()] == ["vae.safetensors"]

    def test_given_goes_first(self, tmp_path):
        save_single_file(tmp_path / "vae.safetensors", small_sd(), CONFIGS["sd"])
        assert load_single_file(tmp_path / "vae.safetensors", scaling_factor=0.5)[0]["scaling_factor"] == 0.5

    def test_diffusers_reads_it(self, tmp_path, config):
        """By its from_single_file, with every bit the same; and so is the file that is written of that again."""
        model = AutoencoderKL(**config)
        model.save_pretrained(tmp_path / "folder")
        save_single_file(tmp_path / "vae.safetensors", model.state_dict(), dict(model.config))
        theirs = AutoencoderKL.from_single_file(
            str(tmp_path / "vae.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
        )
        assert_same(theirs.state_dict(), model.state_dict())
        theirs.save_pretrained(tmp_path / "back")
        save_single_file(tmp_path / "back.safetensors", load_diffusers(tmp_path / "back"), dict(model.config))
        assert_same(load_single_file(tmp_path / "back.safetensors")[1], model.state_dict())

    def test_a_diffusers_file_is_read_too(self, tmp_path):
        save_file(small_sd(), tmp_path / "diffusion_pytorch_model.safetensors")
        config, tensors = load_single_file(
            tmp_path / "diffusion_pytorch_model.safetensors", scaling_factor=1.0
        )
        assert config["scaling_factor"] == 1.0
        assert_same(tensors, small_sd())

    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
    @pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3, "callbacks": {}}])
    def test_pickled(self, tmp_path, suffix, wrap):
        torch.save(wrap(diffusers_to_ldm(small_sd())), tmp_path / f"vae{suffix}")
        assert_same(load_single_file(tmp_path / f"vae{suffix}", scaling_factor=1.0)[1], small_sd())

    @pytest.mark.parametrize(
        "marks, config, expected",
        [
            (["model.diffusion_model.input_blocks.0.0.weight"], "sd", (0.18215, None, 512)),
            (
                ["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.x"],
                "sdxl",
                (0.13025, None, 1024),
            ),
            (["model.diffusion_model.joint_blocks.0.x"], "sd3", (1.5305, 0.0609, 1024)),
            (["double_blocks.0.img_attn.norm.key_norm.scale"], "flux", (0.3611, 0.1159, 1024)),
        ],
    )
    def test_scaling_from_the_surroundings(self, tmp_path, marks, config, expected):
        ldm = {f"first_stage_model.{n}": t for n, t in diffusers_to_ldm(state_of(CONFIGS[config])).items()}
        save_file(ldm | {mark: torch.zeros(1) for mark in marks}, tmp_path / "whole.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, _ = load_single_file(tmp_path / "whole.safetensors")
        assert (found["scaling_factor"], found["shift_factor"], found["sample_size"]) == expected
        assert found["force_upcast"] is True

    def test_scaling_that_was_measured(self, tmp_path):
        ldm = {f"first_stage_model.{n}": t for n, t in diffusers_to_ldm(small_sd()).items()}
        measured = {
            "scale_factor": torch.tensor(0.25),
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1),
        }
        save_file(ldm | measured, tmp_path / "ldm.safetensors")
        assert load_single_file(tmp_path / "ldm.safetensors")[0]["scaling_factor"] == 0.25

    def test_playground(self, tmp_path):
        ldm = {f"first_stage_model.{n}": t for n, t in diffusers_to_ldm(small_sd()).items()}
        mean, std = torch.tensor([-1.5, 2.0, -1.25, 2.5]), torch.tensor([8.5, 5.0, 6.5, 5.25])
        edm = {"edm_mean": mean.view(1, 4, 1, 1), "edm_std": std.view(1, 4, 1, 1)}
        save_file(
            ldm | edm | {"conditioner.embedders.0.x": torch.zeros(1)}, tmp_path / "playground.safetensors"
        )
        found, _ = load_single_file(tmp_path / "playground.safetensors")
        assert found["scaling_factor"] == 0.5 and found["sample_size"] == 1024
        assert found["latents_mean"] == mean.tolist() and found["latents_std"] == std.tolist()

    @pytest.mark.parametrize(
        "config, assumed, named",
        [("sd", (0.18215, None), "SDXL 0.13025"), ("flux", (1.5305, 0.0609), "FLUX 0.3611 / 0.1159")],
    )
    def test_a_lone_file_does_not_tell(self, tmp_path, config, assumed, named):
        save_file(diffusers_to_ldm(state_of(CONFIGS[config])), tmp_path / "ae.safetensors")
        with pytest.warns(UserWarning, match=rf"ae\.safetensors .*{named}.*give scaling_factor=") as caught:
            found, _ = load_single_file(tmp_path / "ae.safetensors")
        assert len(caught) == 1
        assert (found["scaling_factor"], found["shift_factor"]) == assumed
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, _ = load_single_file(
                tmp_path / "ae.safetensors", scaling_factor=0.3611, shift_factor=0.1159
            )
        assert (found["scaling_factor"], found["shift_factor"]) == (0.3611, 0.1159)

    @pytest.mark.parametrize("text", ["{not json", "[1, 2]"])
    def test_broken_config(self, tmp_path, text):
        save_tensors(
            tmp_path / "a.safetensors", diffusers_to_ldm(small_sd()), {"kl_autoencoder.config": text}
        )
        with pytest.raises(ValueError, match=r"a\.safetensors: the config in its metadata"):
            load_single_file(tmp_path / "a.safetensors")

    def test_error_names_the_file(self, tmp_path):
        save_file({"text_model.encoder.x": torch.zeros(1)}, tmp_path / "clip.safetensors")
        with pytest.raises(ValueError, match=r"clip\.safetensors: expected an AutoencoderKL .* text_model"):
            load_single_file(tmp_path / "clip.safetensors")


def load_diffusers(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


class Hostile:
    """Unpickled, it creates the file named."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestReading:
    @pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
    def test_hostile_pickle(self, tmp_path, suffix):
        proof, path = tmp_path / "proof", tmp_path / f"evil{suffix}"
        for protocol in (2, 4):
            content = {"state_dict": {"a": torch.zeros(2), "b": Hostile(proof)}}
            torch.save(content, path, pickle_protocol=protocol)
            with pytest.raises(ValueError, match=rf"evil\{suffix}: refused, and nothing in it was run"):
                read_tensors(path)
            path.write_bytes(pickle.dumps(Hostile(proof), protocol))
            with pytest.raises(ValueError, match=rf"evil\{suffix}"):
                load_single_file(path)
        assert not proof.exists()
        pickle.loads(path.read_bytes())  # it would have worked
        assert proof.exists()

    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    @pytest.mark.parametrize(
        "content, told",
        [
            (b"", "is empty"),
            (b"<!DOCTYPE html><html><body>Not found</body></html>", "is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "is a Git LFS pointer"),
            (b"hello", ""),
            (bytes(4096), ""),
            (b"\xff" * 4096, ""),
        ],
    )
    def test_not_a_checkpoint(self, tmp_path, suffix, content, told):
        (tmp_path / f"vae{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=rf"vae\{suffix}: {told}"):
            read_tensors(tmp_path / f"vae{suffix}")

    @pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
    def test_truncated(self, tmp_path, suffix, part):
        path = tmp_path / f"cut{suffix}"
        if suffix == ".safetensors":
            save_file({"a": torch.zeros(20_000)}, path)
        else:
            torch.save({"a": torch.zeros(20_000)}, path, _use_new_zipfile_serialization=suffix == ".ckpt")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
        with pytest.raises(ValueError, match=rf"cut\{suffix}: (damaged|refused)"):
            read_tensors(path)

    def test_refused_by_name(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
            read_tensors(tmp_path / "absent.ckpt")
        with pytest.raises(ValueError, match="is a folder"):
            read_tensors(tmp_path)
        (tmp_path / "vae.onnx").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"suffix '\.onnx'; expected a \.safetensors"):
            read_tensors(tmp_path / "vae.onnx")
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(ValueError, match=r"list\.pt: holds no tensors"):
            read_tensors(tmp_path / "list.pt")


class TestWriting:
    def test_views_and_layouts(self, tmp_path):
        whole = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        tensors = {"a": whole[1], "b": whole[:, 1:], "c": torch.nn.Parameter(whole)}
        tensors["d"] = tensors["a"]
        save_tensors(tmp_path / "a.safetensors", tensors, {"key": "value"})
        got, metadata = read_tensors(tmp_path / "a.safetensors")
        assert_same(got, tensors)
        assert metadata == {"format": "pt", "key": "value"}

    def test_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"must be \.safetensors, not '\.ckpt'"):
            save_single_file(tmp_path / "a.ckpt", small_sd(), {})
        with pytest.raises(ValueError, match="no tensors"):
            save_tensors(tmp_path / "a.safetensors", {}, {})
        with pytest.raises(FileNotFoundError, match="absent"):
            save_tensors(tmp_path / "absent" / "a.safetensors", {"a": torch.zeros(1)}, {})
        assert not list(tmp_path.iterdir())

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_tensors(path, {"a": torch.ones(2)}, {})
        with pytest.raises(Exception, match=r"str|metadata"):
            save_tensors(path, {"a": torch.zeros(2)}, {"number": 3})
        assert read_tensors(path)[0]["a"].tolist() == [1, 1]
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


class TestCheckState:
    def test_tensors_of_the_right_shapes_raise_nothing(self):
        state = small_sd()
        check_state({name: tensor.shape for name, tensor in state.items()}, state, "a file")

    def test_names_all(self):
        expected = {name: torch.Size([2]) for name in "abcd"}
        tensors = {"a": torch.zeros(2), "b": torch.zeros(3), "x": torch.zeros(2), "d": torch.zeros(2, 1)}
        with pytest.raises(ValueError) as error:
            check_state(expected, tensors, "vae.ckpt")
        message = str(error.value)
        assert message.startswith("vae.ckpt: ")
        assert "missing: c;" in message and "unexpected: x;" in message
        assert "wrongly shaped: b (3,) instead of (2,), d (2, 1) instead of (2,)" in message

    def test_counts_beyond_a_handful(self):
        with pytest.raises(ValueError, match=r"missing: t0, t1, t2, t3, t4, t5 and 34 more$"):
            check_state({f"t{i}": torch.Size([1]) for i in range(40)}, {}, "vae")
