"""Read the photographs that visitors bring, as everywhere in the package, and write the examples."""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..data.image_io import image_to_tensor, load_image, open_image, save_image
from ..extras import needs

LEAST_SIDE = 16  # pixels; SSIM's window needs 11
EXAMPLES = ("astronaut", "coffee", "chelsea", "rocket", "page")  # names in skimage.data, without download


class Photograph(NamedTuple):
    """A photograph as read. images: (1, 3, H, W), 8-bit values in [-1, 1]. original_size: (height, width) of the
    file.
    """

    name: str
    images: Tensor
    original_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of `images`, after scaling."""
        return tuple(self.images.shape[2:])


def read_photograph(path: str | Path, longest: int | None = None) -> Photograph:
    """Read a file, upright and in sRGB, and scale it down until no side is above `longest` pixels (None: never).

    Raises ValueError, with one sentence that names the file without its folder, if the file is not an image or has
    a side below `LEAST_SIDE`.
    """
    path = Path(path)
    picture = _opened(path)
    height, width = picture.height, picture.width
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"{path.name}: {width}x{height} pixels; allowed: {LEAST_SIDE}x{LEAST_SIDE} and more")
    return Photograph(path.name, image_to_tensor(_fitted(picture, longest))[None], (height, width))


def read_square(path: str | Path, size: int) -> Tensor:
    """Read the centre square of a file: (1, 3, size, size) in [-1, 1]. Raises ValueError if it is not an image."""
    return load_image(_opened(Path(path)), size, multiple_of=1)


def read_cropped(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read a file, scaled and cropped to `size` (H, W): (1, 3, H, W) in [-1, 1]. Errors as in `read_square`."""
    return load_image(_opened(Path(path)), size, multiple_of=1)


def write_examples(folder: Path) -> list[Path]:
    """Write the photographs of scikit-image named in `EXAMPLES` into `folder`, and return their paths."""
    with needs("demo"):
        from skimage import data

    paths = [folder / f"{name}.png" for name in EXAMPLES]
    for path in paths:
        save_image(Image.fromarray(getattr(data, path.stem)()), path)
    return paths


def _opened(path: Path) -> Image.Image:
    file = io.BytesIO(path.read_bytes())
    file.name = path.name  # error messages show this name; visitors need not see the folder
    return open_image(file)


def _fitted(picture: Image.Image, longest: int | None) -> Image.Image:
    """Scale down, bicubic and antialiased, until no side is above `longest`; never up."""
    largest = max(picture.size)
    if longest is None or largest <= longest:
        return picture
    width, height = (max(1, round(side * longest / largest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
