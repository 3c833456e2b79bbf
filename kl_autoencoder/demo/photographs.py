"""The photographs that the page is given, read as everywhere in the package and scaled down; and examples."""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..data.image_io import image_to_tensor, load_image, open_image, save_image
from ..extras import needs

LEAST_SIDE = 16  # pixels: SSIM's window is 11, and less is no photograph
EXAMPLES = ("astronaut", "coffee", "chelsea", "rocket", "page")  # of scikit-image, inside its package


class Photograph(NamedTuple):
    """A photograph as it is compared: (1, 3, H, W) in [-1, 1] of 8 bits, and (height, width) as it came."""

    name: str
    images: Tensor
    original_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.images.shape[2:])


def read_photograph(path: str | Path, longest: int | None = None) -> Photograph:
    """Read a file, upright and in sRGB; scale it down so that no side is above `longest` pixels (None: keep all).

    Raises ValueError, in a sentence that names the file without its folder, for what is no photograph or too small.
    """
    path = Path(path)
    picture = _opened(path)
    height, width = picture.height, picture.width
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"{path.name}: {width}x{height} pixels; allowed: {LEAST_SIDE}x{LEAST_SIDE} and more")
    return Photograph(path.name, image_to_tensor(_fitted(picture, longest))[None], (height, width))


def read_square(path: str | Path, size: int) -> Tensor:
    """Read the centre square of a file: (1, 3, size, size) in [-1, 1]. Raises as `read_photograph`."""
    return load_image(_opened(Path(path)), size, multiple_of=1)


def read_cropped(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read a file scaled and cropped to `size` (H, W): (1, 3, H, W) in [-1, 1]. Raises as `read_photograph`."""
    return load_image(_opened(Path(path)), size, multiple_of=1)


def write_examples(folder: Path) -> list[Path]:
    """Write the photographs of scikit-image that need no download into `folder`; their paths."""
    with needs("demo"):
        from skimage import data

    paths = [folder / f"{name}.png" for name in EXAMPLES]
    for path in paths:
        save_image(Image.fromarray(getattr(data, path.stem)()), path)
    return paths


def _opened(path: Path) -> Image.Image:
    file = io.BytesIO(path.read_bytes())
    file.name = path.name  # what an error says; the folder is none of a visitor's business
    return open_image(file)


def _fitted(picture: Image.Image, longest: int | None) -> Image.Image:
    """Scale down, bicubic and antialiased, until no side is above `longest`; never up."""
    largest = max(picture.size)
    if longest is None or largest <= longest:
        return picture
    width, height = (max(1, round(side * longest / largest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
