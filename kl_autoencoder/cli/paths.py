"""What the command line names: models, photographs, and where pictures are to go."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from ..data.image_io import WRITERS
from ..models.autoencoder_kl import COMPACT, KLAutoencoder

PHOTOGRAPHS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif"),
    *(".jp2", ".jfif", ".ppm", ".pgm", ".tga", ".mpo"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load_model(name: str, device: str | None, dtype: str | None) -> KLAutoencoder:
    """A folder, run, single file, hub id or "compact" -> the model for inference on `device`.

    `device` None is the best there is, `dtype` None the type that the tensors are stored in.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with _quiet_diffusers():
        vae = _load(name)
    return move_model(vae, device, dtype).eval().requires_grad_(False)


def move_model(vae: KLAutoencoder, device: str, dtype: str | None) -> KLAutoencoder:
    """The same model, on `device` and in the type `dtype` (None: as it is)."""
    with _quiet_diffusers():
        return vae.to(device=torch.device(device), dtype=getattr(torch, dtype) if dtype else None)


def _load(name: str) -> KLAutoencoder:
    path = model_path(name)
    if path.is_dir() and name:
        folder = model_folder(path)
        return KLAutoencoder.from_pretrained(folder, torch_dtype=_stored_dtype(folder))
    if path.is_file():
        return KLAutoencoder.from_single_file(path)
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name!r}: no such model, neither a folder nor a file nor a hub id (owner/name) nor 'compact'"
        )
    try:
        return KLAutoencoder.from_pretrained(name)
    except OSError as error:
        try:  # not a VAE's own repository: perhaps a pipeline's
            return KLAutoencoder.from_pretrained(name, subfolder="vae")
        except OSError:
            message = "no such folder or file, and no model on the hub could be loaded under that name"
            raise FileNotFoundError(f"{name}: {message} ({error})") from error


def model_path(name: str) -> Path:
    """A model's name as a path; "compact" is the folder in the package, unless something local is called so."""
    path = Path(name)
    return COMPACT if name == COMPACT.name and not path.exists() else path


def model_folder(path: Path) -> Path:
    """The diffusers VAE folder that `path` is, or that a pipeline (vae/) or a training run (export/) holds."""
    for folder in (path, path / "vae", path / "export"):
        if (folder / "config.json").is_file():
            try:
                kind = json.loads((folder / "config.json").read_text())["_class_name"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / 'config.json'}: not the config of a diffusers model") from error
            if kind != "AutoencoderKL":
                raise ValueError(f"{folder}: holds a {kind}, expected an AutoencoderKL")
            return folder
    raise ValueError(f"{path}: no model in it (no config.json here, in vae/ or in export/)")


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type of the tensors in a model folder; diffusers reads them into float32 unless told."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(next(iter(file.keys()))).dtype
        except (SafetensorError, StopIteration) as error:
            raise ValueError(f"{path}: damaged, truncated or not a safetensors file ({error})") from error
    raise FileNotFoundError(f"{folder}: no .safetensors file in it")


def find_photographs(inputs: Sequence[str]) -> list[tuple[Path, str]]:
    """Files and folders -> (path, name) each; a name is the path within the folder given, or the file's name."""
    found = []
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such file or folder")
        if not given.is_dir():
            found.append((given, given.name))
            continue
        inside = [path.relative_to(given) for path in sorted(given.rglob("*")) if path.is_file()]
        inside = [p for p in inside if p.suffix.lower() in PHOTOGRAPHS and not p.name.startswith(".")]
        if not inside:
            raise ValueError(f"{given}: no photographs in it ({', '.join(PHOTOGRAPHS)})")
        found += [(given / path, path.as_posix()) for path in inside]
    return found


def plan_targets(output: str, names: Sequence[str], single: bool) -> list[Path]:
    """Where to write the pictures `names`: `output` itself for a single one, else PNG files in that folder.

    In a folder, the second of two pictures of one name is called name-2.png.
    """
    path = Path(output)
    is_picture = path.suffix.lower() in WRITERS and not path.is_dir()
    if single and path.suffix and not path.is_dir():
        if not is_picture:
            raise ValueError(
                f"{path}: unknown image suffix {path.suffix!r}, allowed are {', '.join(WRITERS)}"
            )
        return [path]
    if is_picture:
        raise ValueError(f"{path}: is one picture; give a folder for several photographs")
    targets = {}  # as an ordered set
    for name in names:
        target, n = (path / name).with_suffix(".png"), 1
        while target in targets:
            n += 1
            target = (path / name).with_name(f"{Path(name).stem}-{n}.png")
        targets[target] = name
    return list(targets)


def refuse_existing(targets: Sequence[Path], inputs: Sequence, overwrite: bool) -> None:
    """ValueError if a target is an input, a folder, or there already and not to be overwritten."""
    sources = {Path(path).resolve() for path in inputs}
    for target in targets:
        if target.resolve() in sources:
            raise ValueError(f"{target}: is an input and is never overwritten")
        if target.is_dir():
            raise ValueError(f"{target}: is a folder")
        if target.exists() and not overwrite:
            raise ValueError(f"{target}: exists already; --overwrite replaces it")


def inside(name: str, source: str) -> str:
    """A photograph's name that was read from `source`, held to stay within the folder that it will be joined to."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).name:
        raise ValueError(f"{source}: names a photograph {name!r}, which is outside the output folder")
    return name


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Only errors from diffusers' log, which otherwise talks about precision on every `.to`."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
