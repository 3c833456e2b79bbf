"""Send scalars and pictures of a run to the trackers of accelerate: TensorBoard, Weights & Biases, MLflow ..."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from ..config import dotted

PROJECT = "kl-autoencoder"  # the project, or experiment, that runs appear in
TENSORBOARD, FOLDER = "tensorboard", "logs"  # name of the tracker; its folder in the run's
# trackers of accelerate itself, whose packages `check_trackers` looks for; plugins may register others
BUILT_IN = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
)  # fmt: skip


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError for a name that accelerate does not know, or whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            allowed = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise ValueError(f"log.trackers: {name!r}; allowed: {allowed}, and what a plugin registers")
        if name in BUILT_IN and name not in map(str, get_available_trackers()):
            raise ValueError(f"log.trackers: {name!r} is not installed; pip install {name.replace('_', '-')}")


class Trackers:
    """The trackers of a run, written on its main rank only.

    A tracker that fails does not end the run: a warning is printed, once for each tracker.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        names: tuple[str, ...],
        say: Callable[[str], None],
        config: Mapping[str, Any] | None = None,
    ):
        """Start the trackers `names`, in the run's `folder`.

        config: the run's, nested; trackers other than TensorBoard show it beside the curves.
        """
        self.folder, self.accelerator, self.say, self.warned = folder, accelerator, say, set()
        names = tuple(dict.fromkeys(names))
        if TENSORBOARD in names and accelerator.is_main_process:
            (folder / FOLDER).mkdir(exist_ok=True)
            _hush_tensorboard_thread()
        accelerator.log_with = [_create_tracker(name, folder) for name in names]
        accelerator.init_trackers(PROJECT)
        pairs = dotted(config or {}).items()
        keys = {key: str(value) if isinstance(value, (list, tuple)) else value for key, value in pairs}
        for tracker in self._others():
            self._to_other(tracker, lambda t=tracker: t.store_init_configuration(keys))

    def log(self, numbers: dict[str, float], step: int) -> None:
        if board := self._tensorboard():
            self._to_tensorboard(lambda: board.log(numbers, step=step))
        for tracker in self._others():
            self._to_other(tracker, lambda t=tracker: t.log(numbers, step=step))

    def show(self, name: str, picture: Path, step: int) -> None:
        """Send a picture to each tracker that takes pictures."""
        if not self.accelerator.is_main_process or not self.accelerator.trackers:
            return
        image = np.asarray(Image.open(picture))
        if board := self._tensorboard():
            self._to_tensorboard(lambda: board.writer.add_image(name, image, step, dataformats="HWC"))
        for tracker in self._others():
            self._to_other(tracker, lambda t=tracker: _show(t, name, picture, image, step))

    def close(self) -> None:
        """End the trackers; writes what TensorBoard still holds in memory, up to two minutes of scalars."""
        if board := self._tensorboard():
            self._to_tensorboard(lambda: board.writer.flush())
        self.accelerator.end_training()

    def _tensorboard(self) -> Any:
        return next((t for t in self._on_main_rank() if t.name == TENSORBOARD), None)

    def _others(self) -> list[GeneralTracker]:
        return [t for t in self._on_main_rank() if t.name != TENSORBOARD]

    def _on_main_rank(self) -> list[Any]:
        return self.accelerator.trackers if self.accelerator.is_main_process else []

    def _to_tensorboard(self, write: Callable[[], None]) -> None:
        """Call `write`; after an OSError, which ends TensorBoard's thread, the next call opens a new file."""
        try:
            write()
        except OSError as error:
            self._warn(str(self.folder / FOLDER), error.strerror or str(error))
            writer = self._tensorboard().writer
            with contextlib.suppress(OSError):
                writer.close()
            writer.file_writer = writer.all_writers = None

    def _to_other(self, tracker: GeneralTracker, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # each tracker's library raises its own, mostly about the network
            self._warn(tracker.name, f"{type(error).__name__}: {error}".splitlines()[0][:200])

    def _warn(self, what: str, reason: str) -> None:
        """Print a warning, once for each `what`: a tracker that cannot be reached fails at every step."""
        if what not in self.warned:
            self.say(f"WARNING: {what}: cannot be written ({reason}); training goes on")
        self.warned.add(what)


def _create_tracker(name: str, folder: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    project = FOLDER if name == TENSORBOARD else PROJECT  # TensorBoard takes the name of its folder instead
    return kind(project, folder) if kind.requires_logging_directory else kind(project)


def _show(tracker: Any, name: str, picture: Path, image: np.ndarray, step: int) -> None:
    """Send a picture in each tracker's own way, since accelerate has no common one.

    picture: the image file; image: its pixels, (H, W, C) uint8. A tracker that a plugin registered gets it by
    `log_images`, if it has that method.
    """
    if tracker.name == "mlflow":
        tracker.log_artifact(str(picture), name)
    elif tracker.name == "comet_ml":
        tracker.writer.log_image(image, name=name, step=step)
    elif tracker.name == "dvclive":
        tracker.live.log_image(f"{name}-{step:06d}.png", image)
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(str(picture))}, step=step)
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({name: image}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [image]}, step=step)


@cache
def _hush_tensorboard_thread() -> None:
    """Print no traceback when an OSError (a full disk) ends a TensorBoard thread: `Trackers` reports the error."""
    print_traceback = threading.excepthook

    def hook(failure) -> None:
        of_tensorboard = type(failure.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and issubclass(failure.exc_type, OSError)):
            print_traceback(failure)

    threading.excepthook = hook
