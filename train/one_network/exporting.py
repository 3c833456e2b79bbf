"""Write the folder of a finished model, complete or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kl_autoencoder.models.run_folder import TRAINED


def write_folder(folder: Path, write: Callable[[Path], None], step: int, samples: int) -> None:
    """Write a finished model as `folder`, which replaces an earlier one.

    write: called with a temporary path, at which it must make a folder and write the model; that folder is then
    renamed to `folder`. step, samples: how far the run was, written beside the model as JSON (`TRAINED`). Raises
    OSError, which names `folder`, if anything fails.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
        (beside / TRAINED).write_text(json.dumps({"step": step, "samples": samples}) + "\n")
    except Exception as error:  # safetensors raises its own type for a full disk
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"{folder}: the model could not be written ({error})") from error
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
