"""Write a model's folder, or the content of its repository on the hub, completely or not at all."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ...files import temporary_beside
from ..autoencoder_kl import ExactAutoencoder
from ..folder import ENTROPY_MODEL
from .hub_card import PICTURE, model_card, newest_picture


def write_model_folder(vae: ExactAutoencoder, output: Path, others: Mapping[str, Path]) -> None:
    """Save a model into a temporary folder beside `output`, then rename it; other files of an existing folder stay.

    others: name in the folder -> further file to copy into it.
    """
    temporary = temporary_beside(output)
    try:
        vae.save_pretrained(temporary)
        for name, file in others.items():
            shutil.copyfile(file, temporary / name)
        if output.is_dir():
            for file in temporary.iterdir():
                os.replace(file, output / file.name)
        else:
            os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_repository(
    vae: ExactAutoencoder,
    output: Path,
    repo: str,
    license: str | None,
    run: Path | None,
    folder: Path | None,
) -> None:
    """Write the content of a repository: config, .safetensors files, README.md and, for a run, its last picture.

    folder: the one that `vae` was loaded from or saved to, for an entropy model in it; None if there is none.
    """
    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / "README.md"
        card.write_text(model_card(vae, repo, license, run), encoding="utf-8")
        others = {"README.md": card}
        if picture := run and newest_picture(run):
            others[PICTURE] = picture
        if folder and (folder / ENTROPY_MODEL).is_file():
            others[ENTROPY_MODEL] = folder / ENTROPY_MODEL
        write_model_folder(vae, output, others)
