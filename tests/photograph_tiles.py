"""Small photographs to train on: tiles of those inside scikit-image."""

from pathlib import Path


def write_photographs(folder: Path) -> Path:
    """48 PNG of 64x64 in `folder`, which is made: tiles of three colour photographs, quick to read."""
    from PIL import Image
    from skimage import data

    folder.mkdir(exist_ok=True)
    for name in ("astronaut", "chelsea", "coffee"):
        photo = getattr(data, name)()
        for i in range(16):
            y, x = 64 * (i // 4) + 20, 64 * (i % 4) + 100
            Image.fromarray(photo[y : y + 64, x : x + 64]).save(folder / f"{name}-{i:02}.png")
    return folder
