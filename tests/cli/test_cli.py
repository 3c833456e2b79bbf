"""The command line: its files equal what the library computes, and each error is one line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.data.image_io import load_image, pad_to_multiple, tensor_to_images
from kl_autoencoder.latents.latent_files import load_latents
from kl_autoencoder.models.single_file import family_of
from tests.published import PUBLISHED, reduced

CONFIG = {**reduced(PUBLISHED["sd3"], (16, 16, 16, 16)), "latent_channels": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, in diffusers' layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "vae"
    KLAutoencoder(**CONFIG).save_pretrained(path)
    return path


@pytest.fixture
def vae(folder):
    return KLAutoencoder.from_pretrained(folder)


@pytest.fixture
def photo(tmp_path):
    return picture(tmp_path / "photo.png", 33, 50)


def picture(path, height, width, seed=0):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Run a command that must fail with code 2; returns its one line on stderr."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kl-autoencoder: error: ")
    return lines[0].removeprefix("kl-autoencoder: error: ")


@torch.no_grad()
def expected(vae, path, posterior=lambda p: p.mode(), **options):
    """The reconstruction that the library computes, as levels (H, W, 3)."""
    images = load_image(path, multiple_of=1, **options)
    height, width = images.shape[2:]
    z = posterior(vae.encode(pad_to_multiple(images, 8)).latent_dist)
    (image,) = tensor_to_images(vae.decode(z).sample[:, :, :height, :width])
    return np.asarray(image).astype(int)


def same(got, wanted):
    """Whether two pictures differ by one level at most: threads may split a convolution differently."""
    return got.shape == wanted.shape and np.abs(got - wanted).max() <= 1


class TestHelp:
    @pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"], ["encode"]])
    def test_imports_nothing_heavy(self, arguments):
        command = [sys.executable, "-X", "importtime", "-m", "kl_autoencoder", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == (0 if "--help" in arguments else 2)
        imported = {
            line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line
        }
        assert "argparse" in imported
        assert not imported & {"torch", "numpy", "PIL", "diffusers", "safetensors", "tqdm", "huggingface_hub"}

    def test_names_the_commands(self, capsys):
        with pytest.raises(SystemExit) as done:
            run("--help")
        assert done.value.code == 0
        told = capsys.readouterr().out
        assert all(
            command in told for command in ("encode", "decode", "reconstruct", "export", "info", "examples")
        )

    def test_as_a_program(self, tmp_path):
        command = [sys.executable, "-m", "kl_autoencoder"]
        bad = subprocess.run([*command, "info", str(tmp_path)], capture_output=True, text=True, timeout=120)
        assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
        assert "no model in it" in bad.stderr


class TestReconstruct:
    def test_a_photograph_keeps_its_size(self, folder, vae, tmp_path):
        photo = picture(tmp_path / "photo.jpg", 513, 771)
        assert run("reconstruct", photo, "--model", folder, "-o", tmp_path / "out.png") == 0
        assert pixels(tmp_path / "out.png").shape == (513, 771, 3)
        assert same(pixels(tmp_path / "out.png"), expected(vae, photo))

    def test_compare(self, folder, vae, photo, tmp_path, capsys):
        assert run("reconstruct", photo, "--model", folder, "-o", tmp_path / "out.png", "--compare") == 0
        grid, output = pixels(tmp_path / "out.png"), expected(vae, photo)
        grid = grid[grid.shape[0] - 33 :]  # below the headings
        assert grid.shape == (33, 3 * 50 + 2 * 4, 3)
        assert (grid[:, :50] == pixels(photo)).all()
        assert same(grid[:, 54:104], output)
        assert np.abs(grid[:, 108:] - np.abs(pixels(photo) - output).clip(0, 255 / 4) * 4).max() <= 4
        assert f"photo.png -> {tmp_path / 'out.png'}" in capsys.readouterr().out

    def test_folders(self, folder, vae, tmp_path):
        photos = [tmp_path / "in" / name for name in ("a.jpg", "b.png", "sub/a.webp", "sub/b.JPG")]
        for seed, path in enumerate(photos):
            picture(path, 16 + seed, 24, seed)
        (tmp_path / "in" / "notes.txt").write_text("no photograph")
        (tmp_path / "in" / ".hidden.png").write_bytes(b"")
        lone = picture(tmp_path / "b.png", 9, 9)
        assert run("reconstruct", tmp_path / "in", lone, "--model", folder, "-o", tmp_path / "out") == 0
        written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
        assert written == {"a.png", "b.png", "b-2.png", "sub/a.png", "sub/b.png"}
        for path, name in zip(
            [*photos, lone], ["a.png", "b.png", "sub/a.png", "sub/b.png", "b-2.png"], strict=True
        ):
            assert same(pixels(tmp_path / "out" / name), expected(vae, path)), name

    def test_size(self, folder, vae, photo, tmp_path):
        assert run("reconstruct", photo, "--model", folder, "-o", tmp_path / "out.png", "--size", 20) == 0
        assert same(pixels(tmp_path / "out.png"), expected(vae, photo, size=20))

    def test_a_bad_photograph_among_others_is_skipped(self, folder, tmp_path, capsys):
        for name in ("a.png", "c.png"):
            picture(tmp_path / "in" / name, 8, 8)
        (tmp_path / "in" / "b.png").write_bytes(b"nothing")
        assert run("reconstruct", tmp_path / "in", "--model", folder, "-o", tmp_path / "out") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and "skipped" in lines[0] and "b.png" in lines[0]
        assert "1 of 3 photographs could not be read" in lines[1]
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_halves(self, folder, vae, photo, tmp_path, dtype):
        assert run("reconstruct", photo, "--model", folder, "-o", tmp_path / "out.png", "--dtype", dtype) == 0
        assert 0 < np.abs(pixels(tmp_path / "out.png") - expected(vae, photo)).mean() < 5


class TestLatents:
    def test_there_and_back(self, folder, vae, tmp_path, capsys):
        photo = picture(tmp_path / "photo.jpg", 513, 771)
        assert run("encode", photo, "--model", folder, "-o", tmp_path / "z.safetensors") == 0
        assert "1 photograph\n" in capsys.readouterr().out
        assert run("decode", tmp_path / "z.safetensors", "-o", tmp_path / "back.png") == 0
        assert same(pixels(tmp_path / "back.png"), expected(vae, photo))
        file = load_latents(tmp_path / "z.safetensors")
        assert file.sizes == [(513, 771)] and file.names == ["photo.jpg"] and file.model == str(folder)
        assert file.latents[0].shape == (5, 65, 97) and not file.scaled

    def test_scaled(self, folder, vae, photo, tmp_path):
        for name, options in {"raw": [], "scaled": ["--scaled"]}.items():
            assert (
                run("encode", photo, "--model", folder, "-o", tmp_path / f"{name}.safetensors", *options) == 0
            )
            assert run("decode", tmp_path / f"{name}.safetensors", "-o", tmp_path / f"{name}.png") == 0
            assert same(pixels(tmp_path / f"{name}.png"), expected(vae, photo))
        (raw,), (scaled,) = (load_latents(tmp_path / f"{n}.safetensors").latents for n in ("raw", "scaled"))
        assert torch.equal(scaled, (raw - 0.0609) * 1.5305)

    def test_samples(self, folder, vae, tmp_path):
        photos = [picture(tmp_path / f"{i}.png", 16, 16, seed=7) for i in range(2)]  # the same photograph
        for name, seed in {"a": 3, "b": 3, "c": 4}.items():
            options = ["--model", folder, "-o", tmp_path / f"{name}.safetensors", "--sample", "--seed", seed]
            assert run("encode", *photos, *options) == 0
        a, b, c = (load_latents(tmp_path / f"{name}.safetensors").latents for name in "abc")
        assert torch.equal(torch.stack(a), torch.stack(b))
        assert not torch.equal(a[0], a[1]) and torch.equal(a[1], c[0])
        with torch.no_grad():
            posterior = vae.encode(load_image(photos[0])).latent_dist
        assert torch.allclose(a[0], posterior.sample(torch.Generator().manual_seed(3))[0], atol=1e-5)

    def test_many_sizes_and_files(self, folder, vae, tmp_path):
        photos = [picture(tmp_path / "in" / f"{i}.png", 8 + i, 30 - i, i) for i in range(3)]
        assert (
            run("encode", tmp_path / "in", "--model", folder, "-o", tmp_path / "new" / "z.safetensors") == 0
        )
        assert run("encode", photos[0], "--model", folder, "-o", tmp_path / "y.safetensors") == 0
        files = [tmp_path / "new" / "z.safetensors", tmp_path / "y.safetensors"]
        assert run("decode", *files, "-o", tmp_path / "out") == 0
        for name, photo in {"0": 0, "1": 1, "2": 2, "0-2": 0}.items():
            assert same(pixels(tmp_path / "out" / f"{name}.png"), expected(vae, photos[photo]))

    def test_the_latents_of_readable_photographs_are_kept(self, folder, tmp_path, capsys):
        picture(tmp_path / "in" / "a.png", 8, 8)
        (tmp_path / "in" / "b.png").write_bytes(b"nothing")
        assert run("encode", tmp_path / "in", "--model", folder, "-o", tmp_path / "z.safetensors") == 2
        assert load_latents(tmp_path / "z.safetensors").names == ["a.png"]
        assert "could not be read" in capsys.readouterr().err

    def test_a_name_that_leads_elsewhere(self, folder, tmp_path, capsys):
        from kl_autoencoder.latents.latent_files import save_latents

        for name in ("../evil.png", str(tmp_path / "evil.png"), "a/../../evil.png"):
            z = tmp_path / "z.safetensors"
            save_latents(
                z, [torch.zeros(5, 1, 1)] * 2, [name, "b"], [(8, 8)] * 2, config=CONFIG, model=str(folder)
            )
            assert "outside the output folder" in refused(capsys, "decode", z, "-o", tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"z.safetensors"}

    def test_another_model(self, folder, photo, tmp_path, capsys):
        other = tmp_path / "other"
        KLAutoencoder(**{**CONFIG, "latent_channels": 3}).save_pretrained(other)
        assert run("encode", photo, "--model", folder, "-o", tmp_path / "z.safetensors") == 0
        told = refused(
            capsys, "decode", tmp_path / "z.safetensors", "--model", other, "-o", tmp_path / "a.png"
        )
        assert "latents of 5 channels" in told and "takes 3" in told
        assert not (tmp_path / "a.png").exists()


class TestRefused:
    def test_one_line_and_code_2(self, folder, photo, tmp_path, capsys):
        out, model = ["-o", tmp_path / "out.png"], ["--model", folder]
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "text.safetensors").write_text("no tensors")
        (tmp_path / "empty").mkdir()
        cases = {
            ("reconstruct", tmp_path / "absent.png", *model, *out): "absent.png: no such file or folder",
            ("reconstruct", tmp_path / "text.png", *model, *out): "text.png: not an image",
            ("reconstruct", tmp_path / "empty", *model, "-o", tmp_path / "o"): "empty: no photographs in it",
            ("reconstruct", photo, photo, *model, *out): "out.png: is one picture; give a folder",
            (
                "reconstruct",
                photo,
                *model,
                "-o",
                tmp_path / "out.xyz",
            ): "unknown image suffix '.xyz', allowed are .png",
            ("reconstruct", photo, "--model", tmp_path / "nowhere", *out): "nowhere': no such model",
            ("reconstruct", photo, "--model", tmp_path / "empty", *out): "empty: no model in it",
            ("reconstruct", photo, "--model", tmp_path / "text.safetensors", *out): "not a safetensors file",
            ("reconstruct", photo, *model, *out, "--device", "toaster"): "toaster",
            ("reconstruct", photo, *model, *out, "--dtype", "int8"): "invalid choice: 'int8'",
            ("reconstruct", photo, *model, *out, "--size", 0): "must be at least 1",
            ("reconstruct", photo, *model): "required: -o/--output",
            (
                "encode",
                photo,
                *model,
                "-o",
                tmp_path / "z.png",
            ): "z.png: latents are written to a .safetensors",
            ("decode", tmp_path / "absent.safetensors", *out): "absent.safetensors: no such file",
            ("decode", folder / "diffusion_pytorch_model.safetensors", *out): "not a file of latents",
            ("export", folder, "-o", folder): "is the model itself",
            ("export", folder, "-o", photo): "is a file",
            ("export", folder, "-o", tmp_path / "vae.ckpt", "--single-file"): "written to a .safetensors",
            ("info", tmp_path / "text.png"): "suffix '.png'",
            ("info", ""): "no such model",
            ("fly", photo): "invalid choice: 'fly'",
            (): "required: COMMAND",
        }
        for arguments, told in cases.items():
            assert told in refused(capsys, *arguments), arguments
        assert {p.name for p in tmp_path.iterdir()} == {"photo.png", "text.png", "text.safetensors", "empty"}

    def test_nothing_is_overwritten(self, folder, photo, tmp_path, capsys):
        before = photo.read_bytes()
        existing = picture(tmp_path / "out" / "photo.png", 4, 4)
        for output in (existing, tmp_path / "out"):
            told = refused(capsys, "reconstruct", photo, "--model", folder, "-o", output)
            assert "photo.png: exists already; --overwrite replaces it" in told
        assert pixels(existing).shape == (4, 4, 3)
        assert run("reconstruct", photo, "--model", folder, "-o", tmp_path / "out", "--overwrite") == 0
        assert pixels(existing).shape == (33, 50, 3)
        for output in (photo, tmp_path):
            told = refused(capsys, "reconstruct", photo, "--model", folder, "-o", output, "--overwrite")
            assert "is an input and is never overwritten" in told
        assert photo.read_bytes() == before

    def test_latents_are_not_overwritten(self, folder, photo, tmp_path, capsys):
        z = tmp_path / "z.safetensors"
        assert run("encode", photo, "--model", folder, "-o", z) == 0
        assert "exists already" in refused(capsys, "encode", photo, "--model", folder, "-o", z)
        assert run("encode", photo, "--model", folder, "-o", z, "--overwrite") == 0

    def test_a_config_that_is_not_a_vae(self, tmp_path, capsys):
        for text, told in {
            '{"_class_name": "UNet2DConditionModel"}': "holds a UNet2DConditionModel, expected an AutoencoderKL",
            "{": "config.json: not JSON",
            "[]": "config.json: []; allowed: a JSON object",
            "{}": "not the config of a diffusers model",
        }.items():
            (tmp_path / "config.json").write_text(text)
            assert told in refused(capsys, "info", tmp_path)

    def test_broken_weights(self, folder, tmp_path, capsys):
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        assert "no .safetensors file" in refused(capsys, "info", tmp_path)
        weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[:5000])
        assert "damaged, truncated" in refused(capsys, "info", tmp_path)

    def test_hub_id_without_a_hub(self, capsys, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        told = "nobody/nothing: the hub (https://huggingface.co) cannot be reached, and the model is not in"
        assert refused(capsys, "info", "nobody/nothing") == f"{told} the cache"

    def test_interrupted(self, folder, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("kl_autoencoder.cli.loading.load_model", interrupt)
        assert run("info", folder) == 130


class TestExport:
    def test_folder(self, vae, tmp_path):
        """Export the model of a training run, with its model card; plain diffusers loads it."""
        run_folder = tmp_path / "run"
        vae.save_pretrained(run_folder / "export")
        (run_folder / "export" / "README.md").write_text("the card")
        (run_folder / "export" / "entropy_model.safetensors").write_bytes(b"of the codec")
        assert run("export", run_folder, "-o", tmp_path / "new" / "vae") == 0
        exported = tmp_path / "new" / "vae"
        assert {p.name for p in exported.iterdir()} == {
            "config.json",
            "diffusion_pytorch_model.safetensors",
            "entropy_model.safetensors",
            "README.md",
        }
        assert {p.name for p in (tmp_path / "new").iterdir()} == {"vae"}
        theirs = AutoencoderKL.from_pretrained(exported)
        assert theirs.config.shift_factor == 0.0609
        for name, tensor in vae.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], tensor)

    def test_single_file_and_back(self, folder, tmp_path, capsys):
        assert run("export", folder, "-o", tmp_path / "vae.safetensors", "--single-file") == 0
        assert "decoder.up.3.upsample.conv.weight" in load_file(tmp_path / "vae.safetensors")
        assert run("export", tmp_path / "vae.safetensors", "-o", tmp_path / "back") == 0
        ours, back = (
            load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder, tmp_path / "back")
        )
        assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
        assert KLAutoencoder.from_pretrained(tmp_path / "back").config.norm_num_groups == 8
        told = refused(capsys, "export", folder, "-o", tmp_path / "vae.safetensors", "--single-file")
        assert "exists already" in told

    def test_keeps_the_type_or_converts(self, folder, tmp_path):
        def dtype(name):
            return {
                t.dtype for t in load_file(tmp_path / name / "diffusion_pytorch_model.safetensors").values()
            }

        assert run("export", folder, "-o", tmp_path / "half", "--dtype", "bfloat16") == 0
        assert run("export", tmp_path / "half", "-o", tmp_path / "kept") == 0
        assert run("export", tmp_path / "half", "-o", tmp_path / "whole", "--dtype", "float32") == 0
        assert (dtype("half"), dtype("kept"), dtype("whole")) == ({torch.bfloat16},) * 2 + ({torch.float32},)

    def test_existing_folder(self, folder, tmp_path, capsys):
        target = tmp_path / "vae"
        target.mkdir()
        (target / "mine.txt").write_text("keep me")
        told = refused(capsys, "export", folder, "-o", target)
        assert "is not empty; --overwrite" in told
        assert [p.name for p in target.iterdir()] == ["mine.txt"]
        assert run("export", folder, "-o", target, "--overwrite") == 0
        assert (target / "mine.txt").read_text() == "keep me" and (target / "config.json").is_file()
        assert {p.name for p in tmp_path.iterdir()} == {"vae"}

    def test_its_own_weights_are_never_overwritten(self, vae, tmp_path, capsys):
        vae.save_pretrained(tmp_path / "run" / "export")
        own = tmp_path / "run" / "export" / "diffusion_pytorch_model.safetensors"
        before = own.read_bytes()
        for arguments in (["-o", own, "--single-file"], ["-o", own.parent]):
            told = refused(capsys, "export", tmp_path / "run", *arguments, "--overwrite")
            assert "never overwritten" in told or "is the model itself" in told
        assert own.read_bytes() == before


class TestInfo:
    def test_tells(self, folder, vae, capsys):
        assert run("info", folder) == 0
        told = capsys.readouterr().out
        count = sum(p.numel() for p in vae.parameters())
        assert f"{count:,} (encoder" in told and f"float32, {count * 4 / 1e6:.1f} MB" in told
        for part in ("custom", "(B, 3, H, W)", "(B, 5, H/8, W/8), 38.4 times", "16, 16, 16, 16", "8 groups"):
            assert part in told
        assert "scaling_factor 1.5305, shift_factor 0.0609\n" in told and "1024x1024" in told

    def test_as_json(self, folder, vae, capsys):
        assert run("info", folder, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        size = sum(p.numel() for p in vae.parameters())
        assert (
            told["parameters"]["all"] == size and told["bytes"] == 4 * size and told["dtypes"] == ["float32"]
        )
        assert told["scaling"]["scaling_factor"] == 1.5305 and told["scaling"]["shift_factor"] == 0.0609
        assert told["config"]["block_out_channels"] == [16, 16, 16, 16] and told["downsampling"] == 8

    def test_a_check_as_json(self, folder, vae, capsys):
        assert run("fp16-check", folder, "--size", 64, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["safe"] and told["unsafe"] == []
        weights = {name.removesuffix(".weight") for name in vae.state_dict() if name.endswith(".weight")}
        assert "decoder.conv_out" in told["largest"] and "decoder.conv_out" in weights
        assert max(told["largest"].values()) < told["limit"]
        assert "without --fix" in refused(capsys, "fp16-check", folder, "--json", "--fix", "-o", "x")

    def test_pipeline_folder_and_half(self, vae, tmp_path, capsys):
        vae.half().save_pretrained(tmp_path / "pipeline" / "vae")
        assert run("info", tmp_path / "pipeline") == 0
        assert "float16, " in capsys.readouterr().out

    def test_a_lone_file_warns_in_one_line(self, folder, tmp_path, capsys):
        from safetensors.torch import save_file

        assert run("export", folder, "-o", tmp_path / "vae.safetensors", "--single-file") == 0
        save_file(load_file(tmp_path / "vae.safetensors"), tmp_path / "lone.safetensors")
        capsys.readouterr()
        run("info", tmp_path / "lone.safetensors")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "warning: " in lines[0] and "scaling_factor" in lines[0]

    def test_families(self):
        names = {"sd": "SD", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX", "no-attention": "custom"}
        for key, name in names.items():
            config = {"in_channels": 3, "out_channels": 3, "mid_block_add_attention": True, **PUBLISHED[key]}
            config = {"scaling_factor": 0.18215, **config}
            assert family_of(config) == name
        own = {**config, **PUBLISHED["flux"], "mid_block_add_attention": True, "scaling_factor": 0.5}
        assert family_of(own) == "custom (the network of SD3 and FLUX, its own scaling)"
        assert family_of({**own, "block_out_channels": (64, 64, 64, 64)}) == "custom"
