"""Small gray images from installed packages: handwritten digits, faces, and patches without faces."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...extras import require

FACES = 100  # patches 0 to 99 of lfw_subset are faces, 100 to 199 are not


@cache
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's digits (Alpaydin & Kaynak 1998): images (1797, 8, 8) and labels (1797,), 0 to 9.

    Images have 17 gray levels from 0 to 255. Raises ImportError, naming the extra, without scikit-learn.
    """
    require("train", "sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


@cache
def face_patches() -> NDArray[np.uint8]:
    """scikit-image's subset of Labeled Faces in the Wild: (200, 25, 25), 0 to 255.

    The first `FACES` patches are faces, the others are not. Raises ImportError, naming the extra, without
    scikit-image.
    """
    require("train", "skimage")
    package = find_spec("skimage")  # finds its folder without importing it
    patches = np.load(Path(package.origin).parent / "data" / "lfw_subset.npy")
    return np.rint(patches * 255).astype(np.uint8)
