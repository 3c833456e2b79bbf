"""Read files that may be damaged or hostile; write files whole or not at all."""

import os
import pickle
import re
import secrets
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the commands refuse and write files without torch, whose import takes seconds
    from torch import Tensor

MOST_SHOWN = 60  # characters of a value that somebody's file holds, in an error message
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
FLOATING = {  # what a model's tensors may be, in safetensors' words and torch's
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
COUNTER = ".num_batches_tracked"  # how the name of a batch norm's whole number ends


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the final name when the block ends well.

    By then its bytes are on the disk, and its rights are those of any new file (the umask's), whoever wrote it.
    If the block raises, the temporary file is removed and whatever `path` was before is still there.
    Raises FileNotFoundError, naming it, if the folder to write in is missing, and OSError naming `path` if no file
    can be made there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} is missing")
    temporary = temporary_beside(path)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    mode = temporary.stat().st_mode
    try:
        yield temporary
        _sync_file(temporary, mode)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A hidden name in the folder of `path` that no other thread or process uses.

    In the same folder, since a rename is only atomic within one file system.
    """
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")


def sync_files(files: Iterable[Path]) -> None:
    """Give files that others wrote the rights of a new file, and bring their bytes to the disk.

    safetensors writes its files readable by their owner alone. `files` lie in one folder.
    """
    files = list(files)
    if files:
        probe = temporary_beside(files[0])
        probe.touch(exist_ok=False)
        mode = probe.stat().st_mode
        probe.unlink()
        for path in files:
            _sync_file(path, mode)
        flush_folder(files[0].parent)


def _sync_file(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:
        path.chmod(stat.S_IMODE(mode))
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
) -> None:
    """Write a .safetensors file whole or not at all. ValueError for another suffix or no tensors."""
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the suffix must be .safetensors, not {path.suffix!r}")
    if not tensors:
        raise ValueError(f"{path}: no tensors to write")
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storages = set()
    for name, tensor in packed.items():  # safetensors refuses tensors that share a storage, and parts of one
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            packed[name] = tensor.clone()
        storages.add(storage.data_ptr())
    with replacing(path) as temporary:
        save_file(packed, temporary, metadata={"format": "pt", **metadata})


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """All tensors of a .safetensors, .ckpt, .pt, .pth or .bin file on the CPU, and its metadata (or {}).

    Nothing in a file is ever run: a pickle is read with weights_only=True, and one that holds more than tensors
    and plain containers is refused. `state_dict` is unwrapped. A .safetensors is mapped, so that what is not
    used of a large checkpoint takes no memory. Raises FileNotFoundError, or ValueError naming the file and
    what was expected.
    """
    path = Path(path)
    check_tensor_file(path)
    if path.suffix != ".safetensors":
        return _read_pickle(path), {}
    with _opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_header(path: str | os.PathLike) -> "dict[str, Tensor]":
    """The tensors of a .safetensors file on the meta device: their names, shapes and types.

    Raises as `read_tensors`.
    """
    import torch

    path = Path(path)
    check_tensor_file(path)
    with _opened(path, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        types = {
            name: "int64" if name.endswith(COUNTER) else FLOATING.get(part.get_dtype())
            for name, part in parts.items()
        }
        for name, dtype in types.items():
            if dtype is None:
                held = parts[name].get_dtype()
                raise ValueError(f"{path}: {shown(name)} is {held}; allowed: {', '.join(FLOATING)}")
        return {
            name: torch.empty(part.get_shape(), dtype=getattr(torch, types[name]), device="meta")
            for name, part in parts.items()
        }


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    """A .safetensors file for reading; ValueError if it is not one, from the block too."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged, truncated or not a safetensors file ({clipped(str(error), 80)})"
        ) from error


def shown(value: object) -> str:
    """The beginning of a value's repr: what an error message says of something that a stranger's file holds."""
    return clipped(repr(value), MOST_SHOWN)


def one_line(said: object) -> str:
    """What an error or message says, its lines and runs of spaces made single spaces."""
    return " ".join(str(said).split())


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a .safetensors file, {} without any; nothing else of it is read. Raises as `read_tensors`."""
    path = Path(path)
    check_tensor_file(path)
    if path.suffix != ".safetensors":
        return {}
    with _opened(path, "np") as file:
        return file.metadata() or {}


def check_tensor_file(path: Path) -> None:
    """Refuse the wrong files that people really have, told by their name and first bytes."""
    expected = (
        f"expected a .safetensors file or a {', '.join(PICKLED)} checkpoint with an autoencoder's tensors"
    )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; {expected}")
    if path.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"{path}: suffix {path.suffix!r}; {expected}")
    with open(path, "rb") as file:
        head = file.read(200)
    if not head:
        raise ValueError(f"{path}: is empty; {expected}")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer and not the file itself (git lfs pull); {expected}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path}: is a web page saved under this name; {expected}")


def _read_pickle(path: Path) -> dict[str, "Tensor"]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which say nothing to a user
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        detail = f" and not {clipped(name[1].rstrip('.'), MOST_SHOWN)}" if name else ""
        raise ValueError(
            f"{path}: refused, and nothing in it was run: expected a checkpoint that holds tensors alone{detail}; "
            "a .safetensors file is always safe"
        ) from error
    except Exception as error:  # RuntimeError, EOFError, OSError, KeyError ... by what is wrong with it
        said = clipped(str(error), 100)
        raise ValueError(f"{path}: damaged, truncated or not a PyTorch checkpoint ({said})") from error
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    content = content if isinstance(content, dict) else {}
    tensors = {
        str(name): value.detach() for name, value in content.items() if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise ValueError(f"{path}: holds no tensors by name")
    return tensors
