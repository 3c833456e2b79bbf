"""Parts of the package that are installed only where they are asked for: `pip install "kl-autoencoder[eval]"`."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ImportError):
    """A package of an extra of ours is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; pip install 'kl-autoencoder[{extra}]' brings it")


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn the ModuleNotFoundError of an import in the block into a MissingExtra that names `extra`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name, extra) from error
