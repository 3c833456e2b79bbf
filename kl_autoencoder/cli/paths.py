"""Find what the command line names: models, photographs, and the paths to write pictures to.

Only names and small files are looked at, so that mistakes are reported before torch is imported.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ..data.formats import READABLE, WRITERS, check_writable
from ..files import PICKLED, check_tensor_file, clipped
from ..models.folder import CONFIG, HUB_ID, read_json
from ..models.packaged import PACKAGED, packaged
from ..models.run_folder import newer_checkpoint

# class names, in config.json, of the models that commands read
MODELS = ("AutoencoderKL", "AutoencoderKLFlux2", "Autoencoder")
OTHERS = (  # classes of diffusers that `evaluate` compares with them: other autoencoders of images in [-1, 1]
    *("AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE"),
    *("AutoencoderTiny", "ConsistencyDecoderVAE", "VQModel"),
)


def check_model(name: str, kinds: Sequence[str] = MODELS) -> None:
    """Raise ValueError or FileNotFoundError for a name that is not a model of one of these `kinds`.

    Large files are not read, and a hub id is not looked up.
    """
    path = model_path(name)
    if path.is_dir() and name:
        if not newer_checkpoint(path):
            model_folder(path, kinds)
    elif path.is_file():
        check_tensor_file(path)
    elif path.suffix in (".safetensors", *PICKLED):
        raise FileNotFoundError(f"{name}: no such file")
    elif not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r}: no such model, neither a folder nor a file nor a hub id (owner/name) "
            f"nor {' nor '.join(map(repr, PACKAGED))}"
        )


def model_path(name: str) -> Path:
    """A model's name as a path; for one that comes with the package, its folder there."""
    return Path(packaged(name))


def model_folder(path: Path, kinds: Sequence[str] = MODELS) -> Path:
    """The diffusers VAE folder: `path` itself, vae/ of a pipeline, or export/ of a training run.

    Raises ValueError if there is none, or if its class is not one of `kinds`.
    """
    for folder in (path, path / "vae", path / "export"):
        if (folder / CONFIG).is_file():
            kind = read_json(folder / CONFIG).get("_class_name")
            if kind is None:
                raise ValueError(f"{folder / CONFIG}: not the config of a diffusers model (no _class_name)")
            if kind not in kinds:
                held = clipped(str(kind), 60)
                raise ValueError(f"{folder}: holds a {held}, expected an {' or '.join(kinds)}")
            return folder
    raise ValueError(
        f"{path}: no model in it (no config.json here, in vae/ or in export/, no whole checkpoint in checkpoints/)"
    )


def readable_folder(path: Path) -> Path:
    """The folder to read a model from: a run's newest checkpoint if its export is missing or older."""
    return newer_checkpoint(path) or model_folder(path)


def find_photographs(inputs: Sequence[str]) -> list[tuple[Path, str]]:
    """List the images in files and folders as (path, name); the name is the path relative to the given folder.

    A file given itself has its file name. Raises FileNotFoundError for missing inputs, ValueError for a folder
    without images.
    """
    found = []
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such file or folder")
        if not given.is_dir():
            found.append((given, given.name))
            continue
        inside = [path.relative_to(given) for path in sorted(given.rglob("*")) if path.is_file()]
        inside = [p for p in inside if p.suffix.lower() in READABLE and not p.name.startswith(".")]
        if not inside:
            raise ValueError(f"{given}: no photographs in it ({', '.join(READABLE)})")
        found += [(given / path, path.as_posix()) for path in inside]
    return found


def plan_targets(output: str, names: Sequence[str], single: bool) -> list[Path]:
    """The paths of the pictures `names`: `output` itself for a `single` one with a suffix, else PNGs inside it.

    In a folder, a second picture of the same name is called name-2.png. Raises ValueError if `output` is one
    picture and there are several.
    """
    path = Path(output)
    is_picture = path.suffix.lower() in WRITERS and not path.is_dir()
    if single and path.suffix and not path.is_dir():
        if not is_picture:
            check_writable(path)
        return [path]
    if is_picture:
        raise ValueError(f"{path}: is one picture; give a folder for several photographs")
    return names_in_folder(path, names, ".png")


def names_in_folder(folder: Path, names: Sequence[str], suffix: str) -> list[Path]:
    """A path in `folder` for each of `names`, with this suffix; a second one of the same name is called name-2."""
    targets = {}  # used as an ordered set
    for name in names:
        target, n = (folder / name).with_suffix(suffix), 1
        while target in targets:
            n += 1
            target = (folder / name).with_name(f"{Path(name).stem}-{n}{suffix}")
        targets[target] = name
    return list(targets)


def refuse_existing(targets: Sequence[Path], inputs: Sequence, overwrite: bool) -> None:
    """Raise ValueError if a target is an input, is a folder, or exists and `overwrite` is false.

    Raises OSError if it could not be written; missing parent folders are not an error, as they are made later.
    """
    sources = {Path(path).resolve() for path in inputs}
    for target in targets:
        if target.resolve() in sources:
            raise ValueError(f"{target}: is an input and is never overwritten")
        if target.is_dir():
            raise ValueError(f"{target}: is a folder")
        if target.exists() and not overwrite:
            raise ValueError(f"{target}: exists already; --overwrite replaces it")
    for folder in {target.parent for target in targets}:
        _refuse_unwritable(folder)


def _refuse_unwritable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder}: cannot be made, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written to, by the rights of {there}")


def inside(name: str, source: str) -> str:
    """Return `name`, a photograph's name read from `source`. Raises ValueError if it leads out of a folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
        raise ValueError(f"{source}: names a photograph {name!r}, which is outside the output folder")
    return name
