"""The models that come with the package: folders in diffusers' layout, with their cards, by name."""

import os
from pathlib import Path

COMPACT = Path(__file__).parent / "compact"
PACKAGED = {folder.name: folder for folder in (COMPACT,)}


def packaged(source: str | os.PathLike) -> str | os.PathLike:
    """Return the folder of the packaged model that is named `source`, else `source` itself.

    A file or folder of that name in the working directory goes first.
    """
    return source if os.path.exists(source) else PACKAGED.get(os.fspath(source), source)
