"""Save a discriminator beside an exported model, and load it for a run that continues from both."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kl_autoencoder.files import one_line

FOLDER = "training_state"  # inside of the exported folder
FILES = ("discriminator", "discriminator_optimizer", "lecam")


def save_training_state(export: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write the discriminator, its optimizer and LeCam's averages as `export`/training_state/*.safetensors."""
    (export / FOLDER).mkdir()
    for name in FILES:
        group = {key: value.detach().contiguous() for key, value in tensors[name].items()}
        save_file(group, export / FOLDER / f"{name}.safetensors")


def load_training_state(pretrained: str) -> dict[str, dict[str, Tensor]]:
    """Load what `save_training_state` wrote to the export `pretrained`: {file name without suffix: {name: tensor}}.

    Raises ValueError if there is none, or if it cannot be read.
    """
    folder = Path(pretrained) / FOLDER
    try:
        return {name: load_file(folder / f"{name}.safetensors") for name in FILES}
    except (OSError, SafetensorError) as error:
        reason = one_line(error)[:120]
        raise ValueError(
            f"loss.adversarial.pretrained: no discriminator in {folder} ({reason}); allowed: a "
            "model.pretrained that a run with export.training_state=true exported, or false"
        ) from None
