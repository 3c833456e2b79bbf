"""Load the model that `--model` names, read the photographs that a command is given, write its pictures."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ..console import say
from ..data.image_io import image_size, load_image, pad_to_multiple, save_image
from ..files import clipped, one_line
from ..models.autoencoder_kl import ExactAutoencoder
from ..models.classes import class_of, class_of_file, hub_config
from ..models.folder import CONFIG, WEIGHTS, read_headers, read_json
from ..models.large_images import prepare_for
from ..models.publishing import hub
from ..models.run_folder import described, newer_checkpoint, weights_in
from ..progress import Progress, tracked, write
from .paths import MODELS, OTHERS, check_model, model_folder, model_path


def load_model(name: str, device: str | None, dtype: str | None) -> ExactAutoencoder:
    """Load a folder, run, single file, hub id or "compact" for inference on `device`.

    Of a run whose export is missing or older, the newest checkpoint's weights are loaded, and a line on stderr says
    so. `device` None is the best there is, `dtype` None the type that the tensors are stored in.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with Progress(f"loading {name}"):
        with _quiet_diffusers():
            vae = _load(name)
        return move_model(vae, device, dtype).eval().requires_grad_(False)


def other_kind(name: str) -> str | None:
    """Which of the other autoencoders (`paths.OTHERS`) a folder or hub id holds; None: one of ours, or none."""
    path = model_path(name)
    if path.is_file() or newer_checkpoint(path):
        return None
    try:
        config = (
            read_json(model_folder(path, (*MODELS, *OTHERS)) / CONFIG) if path.is_dir() else hub_config(name)
        )
    except OSError:
        return None
    kind = config.get("_class_name")
    return kind if kind in OTHERS else None


def load_other_model(name: str, kind: str, device: str, dtype: str | None) -> Any:
    """Load a folder or hub id of another autoencoder of diffusers, for inference on `device`."""
    from ..evaluation.other_autoencoders import load_other

    path = model_path(name)
    folder = model_folder(path, OTHERS) if path.is_dir() else name
    with Progress(f"loading {name}"), _quiet_diffusers():
        return move_model(load_other(folder, kind), device, dtype).eval().requires_grad_(False)


def move_model(vae: ExactAutoencoder, device: str, dtype: str | None) -> ExactAutoencoder:
    """The same model, on `device` and in the type `dtype` (None: as it is)."""
    with _quiet_diffusers():
        return vae.to(device=torch.device(device), dtype=getattr(torch, dtype) if dtype else None)


def _load(name: str) -> ExactAutoencoder:
    check_model(name)
    path = model_path(name)
    if path.is_dir():
        if checkpoint := newer_checkpoint(path):
            return _load_checkpoint(path, checkpoint)
        folder = model_folder(path)
        return class_of(folder).from_pretrained(folder, torch_dtype=_stored_dtype(folder))
    if path.is_file():
        return class_of_file(path).from_single_file(path)
    return _load_from_hub(name)


def _load_from_hub(name: str) -> ExactAutoencoder:
    """A VAE's own repository, or a pipeline's vae/; from the cache where the hub cannot be reached."""
    reached = hub.is_reachable(name)
    options = {} if reached else {"local_files_only": True}
    for subfolder in ("", "vae"):
        try:
            where = {"subfolder": subfolder} if subfolder else {}
            return class_of(name, subfolder, **options).from_pretrained(name, **where, **options)
        except OSError as error:
            problem = error
    if not reached:
        raise FileNotFoundError(hub.unreachable(name)) from problem
    answer = hub.refusal_in(problem)
    if isinstance(answer, hub.GatedRepoError):
        raise ValueError(hub.refusal(name, answer)) from problem
    said = clipped(one_line(str(problem)), 120)
    raise FileNotFoundError(f"{name}: no autoencoder with .safetensors weights in it ({said})") from problem


def _load_checkpoint(folder: Path, checkpoint: Path) -> ExactAutoencoder:
    """The weights that a run would export now; says on stderr which they are."""
    config = {key: v for key, v in read_json(checkpoint / CONFIG).items() if not key.startswith("_")}
    vae = class_of(checkpoint).from_single_file(weights_in(checkpoint), **config)
    print(described(folder, checkpoint), file=sys.stderr)
    return vae


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type of the tensors in a model folder; diffusers reads them into float32 unless told."""
    tensors = read_headers(folder)
    if not tensors:
        raise FileNotFoundError(f"{folder}: no .safetensors file in it that is called {WEIGHTS}")
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.dtype != torch.int64)
    return dtype if dtype.itemsize > 1 else torch.float32


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Nothing of diffusers' log: it talks about precision on every `.to`, and says errors that it then raises."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def read_photographs(
    photographs: Sequence[tuple[Path, str]],
    size: int | None,
    unread: list[Path],
    what: str,
    vae: ExactAutoencoder | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, images (1, C, H, W)), RGB or in the channels of `vae`, of photographs.

    Of several, one that cannot be read is told and skipped; one that does not fit into memory with `vae`, which is
    tiled where that helps, counts as one of these. Their paths are appended to `unread`. `what` is the heading of
    the progress bar.
    """
    for i, (path, _) in enumerate(tracked(photographs, what, "images")):
        try:
            if vae is not None:
                prepare_memory(vae, path, (size, size) if size else image_size(path))
            channels = 3 if vae is None else vae.config.in_channels
            images = load_image(path, size, multiple_of=1, channels=channels)
        except (ValueError, OSError) as error:
            if len(photographs) == 1:
                raise
            say("skipped", error)
            unread.append(path)
        else:
            yield i, images


def refuse_unread(unread: Sequence[Path], photographs: Sequence) -> None:
    """ValueError, after all the others are done, if some photographs could not be read."""
    if unread:
        raise ValueError(f"{len(unread)} of {len(photographs)} photographs could not be read")


def prepare_memory(vae: ExactAutoencoder, path: Path | str, size: tuple[int, int]) -> None:
    """Tile the model for an image of `size` (H, W) if it is large. ValueError, naming `path`, if it cannot fit."""
    try:
        prepare_for(vae, *size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def padded(images: Tensor, vae: ExactAutoencoder) -> Tensor:
    """Images (B, 3, H, W) as `vae` takes them: sides of multiples of what it needs, its device, its type."""
    return pad_to_multiple(images, vae.size_multiple).to(vae.device, vae.dtype)


def write_picture(
    images: Tensor | Image.Image, path: Path, name: str, size: tuple[int, int] | None = None
) -> None:
    """Save an image, cropped to `size` (H, W), making its folder, and print `name -> path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path, size)
    write(f"{name} -> {path}")
