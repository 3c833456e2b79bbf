"""The models that come with the package: folders in diffusers' layout, with their cards, by name."""

import os
from pathlib import Path

COMPACT, COMPACT_CODEC = (Path(__file__).parent / name for name in ("compact", "compact-codec"))
PACKAGED = {folder.name: folder for folder in (COMPACT, COMPACT_CODEC)}


def packaged(source: str | os.PathLike) -> str | os.PathLike:
    """Return the folder of the packaged model that is named `source`, else `source` itself.

    A folder of that name in the working directory goes first.
    """
    return source if os.path.isdir(source) else PACKAGED.get(os.fspath(source), source)
