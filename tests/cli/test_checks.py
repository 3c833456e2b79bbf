"""Mistakes that are refused before torch is imported, with the words of each error; full disks, closed pipes."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from kl_autoencoder.cli.main import main
from kl_autoencoder.models.packaged import COMPACT
from tests.conftest import ROOT
from tests.processes import finish, start

# numpy is allowed: it takes a tenth of a second, and is needed to look into a file of latents
HEAVY = {
    "torch",
    "PIL",
    "diffusers",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "pyarrow",
    "tqdm",
    "gradio",
}
PHOTO = str(ROOT / "tests" / "benchmarks" / "results" / "compact.jpg")
# Command, run in an empty folder -> a part of its error. PHOTO and COMPACT are paths in this repository.
REFUSED = {
    "recontruct a.jpg -o b.png": "choice: 'recontruct'; did you mean reconstruct? (see kl-autoencoder --help)",
    "trian a.yaml": "did you mean train?",
    "info compact --tracebak": "unrecognized arguments: --tracebak; did you mean --traceback?",
    "encode absent.jpg -o z.safetensors": "absent.jpg: no such file or folder",
    "encode PHOTO -o z.png": "z.png: latents are written to a .safetensors file",
    "encode PHOTO --model nowhere -o z.safetensors": "'nowhere': no such model",
    "decode absent.safetensors -o a.png": "absent.safetensors: no such file",
    "decode COMPACT/diffusion_pytorch_model.safetensors -o a.png": "not a file of latents",
    "decode COMPACT/config.json -o a.png": "suffix '.json'",
    "reconstruct PHOTO -o a.xyz": "a.xyz: unknown image suffix '.xyz', allowed are .png",
    "reconstruct PHOTO -o COMPACT/config.json/a.png": "config.json is a file",
    "reconstruct PHOTO --model models/vae.safetensors -o a.png": "models/vae.safetensors: no such file",
    "reconstruct PHOTO --device toaster -o a.png": "--device: 'toaster'; allowed: cpu, cuda",
    "compress PHOTO -o a.png": "a.png: compressed images are written to .klc files",
    "compress PHOTO PHOTO -o a.klc": "a.klc: is one file; give a folder for several images",
    "compress PHOTO --quality 101 -o a.klc": "argument --quality: must be from 1 to 100, not 101",
    "compress PHOTO --bpp 0 -o a.klc": "argument --bpp: must be above 0 and at most 24, not 0",
    "compress PHOTO --bytes 9 --bpp 1 -o a.klc": "argument --bpp: not allowed with argument --bytes",
    "decompress absent.klc -o a.png": "absent.klc: no such file",
    "decompress PHOTO -o b.png": "not a file of `kl-autoencoder compress` (begins with b'",
    "decompress COMPACT -o out": ": no .klc files in it",
    "info absent.klc": "absent.klc: no such file",
    "demo --model nowhere": "'nowhere': no such model",
    "demo --model compact --model compact": "--model: compact, compact; allowed: each model once",
    "demo --model a/b --model c/d --model e/f --model g/h": "--model: 4 of them; allowed: up to 3",
    "demo --port 70000": "--port: 70000; allowed: 0 (a free one) to 65535",
    "demo --host nowhere.invalid": "--host: 'nowhere.invalid'",
    "evaluate --model compact --data no/such/folder -o report": "--data: 'no/such/folder' is no file or folder",
    "evaluate --model compact --data COMPACT -o report": "--data: no images in",
    "evaluate --model compact --data sample-photographs -o PHOTO": "is a file; a folder is written",
    "study compact --data no/such/folder -o out": "--data: 'no/such/folder' is no file or folder",
    "study compact --data sample-digits -o PHOTO": "is a file; a folder is written",
    "export compact -o vae.ckpt --single-file": "written to a .safetensors file",
    "export COMPACT -o COMPACT": "is the model itself",
    "export compact --onnx --single-file -o vae": "--onnx, --torch-export and --single-file: one of them",
    "export compact --onnx --dtype bfloat16 -o vae": "--dtype: 'bfloat16'; allowed with --onnx: float32, float16",
    "export compact --torch-export --onnx -o vae": "--onnx, --torch-export and --single-file: one of them",
    "export compact --torch-export --dtype bfloat16 -o vae": "allowed with --torch-export: float32, float16",
    "export compact --onnx -o PHOTO": "is a file; with --onnx a folder is written",
    "push compact --to nobody": "--to: 'nobody'; allowed: owner/name",
    "push compact --to a/b --license Mine!": "--license: 'Mine!'; allowed: an identifier",
    "push compact --to a/b --dry-run": "--dry-run and -o FOLDER belong together",
    "push COMPACT --to a/b --dry-run -o COMPACT": "is the model itself",
    "fp16-check compact --fix": "--fix and -o FOLDER belong together",
    "fp16-check compact --images COMPACT": "no photographs in it",
    "encode-dataset --model nowhere --data sample-photographs --size 64 -o out": "'nowhere': no such model",
    "encode-dataset --model compact --data a/b/c --size 64 -o out": "--data: 'a/b/c' is no file or folder",
    "set-scaling compact --from latents": "export compact -o FOLDER makes one",
    "set-scaling COMPACT --from latents": "--from takes what encode-dataset wrote",
    "interpolate PHOTO absent.jpg -o a.png": "absent.jpg: no such file",
    "interpolate PHOTO PHOTO -o a.txt": "a.txt: unknown image suffix",
    "sample compact --fit channel -o a.png": "--fit and --data SOURCE belong together",
    "sample compact -o a": "a: unknown image suffix ''",
    "attribute PHOTO --plus nowhere/a/b --minus c -o a.png": "--plus: 'nowhere/a/b' is no file or folder",
    "attribute PHOTO --data a --plus b -o a.png": "--plus, --data; allowed: --plus with --minus, or --data with",
    "anomaly compact --reference a --data b -o a.png": "scores are written to a .csv file",
}


def words(command):
    return [word.replace("PHOTO", PHOTO).replace("COMPACT", str(COMPACT)) for word in command.split()]


def test_refused_commands_import_nothing_heavy(tmp_path):
    """All commands run in one new interpreter, which lists its modules at the end."""
    program = f"""
import sys
from kl_autoencoder.cli import main
for command in {[words(command) for command in REFUSED]!r}:
    assert main(command) == 2, command
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(REFUSED)
    for told, (command, wanted) in zip(lines, REFUSED.items(), strict=True):
        assert wanted in told and told.startswith("kl-autoencoder: error: "), f"{command}: {told}"
        assert len(told) < 420, told
    assert done.stdout == "[]\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_device_that_is_not_here_is_refused(capsys, tmp_path):
    assert main(["sample", "compact", "--device", "cuda:1", "-o", str(tmp_path / "a.png")]) == 2
    told = capsys.readouterr().err
    assert "--device: 'cuda:1'; torch" in told and "none of that kind here; leave --device out" in told


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    """A limit on the size of files stands in for a full disk: the kernel fails the write alike."""
    Image.new("RGB", (300, 300), "red").save(tmp_path / "a.png")
    arguments = ("encode", str(tmp_path / "a.png"), "-o", str(tmp_path / "new" / "z.safetensors"))
    assert finish(start(tmp_path / "log", with_small_files, *arguments)) == [2]
    (told,) = [line for line in (tmp_path / "log").read_text().splitlines() if "error" in line]
    assert "File too large; free space there or write elsewhere" in told
    assert list((tmp_path / "new").iterdir()) == []


def with_small_files(*arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return main(arguments)


def test_the_traceback_of_an_error_is_printed_on_request(capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    command = ["reconstruct", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*command, "--traceback"]) == 2
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told and told.splitlines()[-1].startswith(
        "kl-autoencoder: error"
    )


@pytest.mark.parametrize(
    "command", ["--help", "encode --help", "--version", "info compact", "train --keys", "train --help"]
)
def test_a_closed_pipe_is_no_error(command, tmp_path):
    assert finish(start(tmp_path / "log", without_a_reader, main, command.split())) == [141]
    assert (tmp_path / "log").read_text() == ""


def test_a_closed_pipe_is_no_error_at_the_exit_of_the_program():
    """At the exit Python itself flushes the standard output."""
    for module, words in (("kl_autoencoder", ["--help"]), ("train", ["--keys"])):
        ours, theirs = os.pipe()
        os.close(ours)
        done = subprocess.run(
            [sys.executable, "-m", module, *words], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE
        )
        os.close(theirs)
        assert (done.returncode, done.stderr) == (141, b""), module


def without_a_reader(program, arguments):
    """Run a program whose standard output is a pipe with nobody at its other end, as `| head -1` leaves it."""
    ours, theirs = os.pipe()
    os.dup2(theirs, 1)
    os.close(ours)
    return program(arguments)


def test_the_versions_of_the_package_and_of_torch_are_printed(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    told = capsys.readouterr().out.split("\n")
    assert told[0].startswith("kl-autoencoder ") and f"torch {torch.__version__.partition('+')[0]}" in told
