"""Small gray images that come with installed packages: handwritten digits, faces, and patches that are no faces."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...extras import require

FACES = 100  # of lfw_subset the first are faces, the others are not


@cache
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """scikit-learn's 1,797 digits (Alpaydin & Kaynak 1998): (N, 8, 8), 17 levels from 0 to 255, and 0 to 9."""
    require("train", "sklearn")
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


@cache
def face_patches() -> NDArray[np.uint8]:
    """scikit-image's subset of Labeled Faces in the Wild: (200, 25, 25), `FACES` faces, then as many others."""
    require("train", "skimage")
    package = find_spec("skimage")  # where it is, without importing it
    patches = np.load(Path(package.origin).parent / "data" / "lfw_subset.npy")
    return np.rint(patches * 255).astype(np.uint8)
