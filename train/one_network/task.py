"""`OneNetwork`: what tasks that train one network, with a moving average, have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from kl_autoencoder.data.image_io import image_grid, save_image

from ..loop.context import RunContext
from ..loop.player import MovingAverage, Player, Tensors
from ..loop.task import Grouped

COLUMNS = 8  # of a grid of pictures


class OneNetwork:
    """The parts of a `Task` that do not depend on what its network is. Its `network` is what is trained.

    Evaluation mode or training mode is the network's own affair: nothing here changes it.
    """

    def __init__(self, run: RunContext, network: nn.Module):
        self.run, self.config, self.network = run, run.config, network.to(run.device)
        self.ema = MovingAverage(self.network, self.config.ema.decay) if self.config.ema.enabled else None
        if self.config.train.compile:
            self.network.compile()
        self.player = Player(self.network, run, run.learning_rate)
        self.players = [self.player]

    @property
    def exported(self) -> Any:
        return self.network if self.ema is None else self.ema.network

    def ready(self) -> None:
        """Nothing is left to read."""

    def playing(self, step: int) -> Sequence[Player]:
        return self.players

    def end_step(self, step: int) -> None:
        """Move the average; `step` counts the steps taken."""
        if self.ema is not None:
            self.ema.update(self.network, step)

    def move(self, loss: Tensor) -> dict[str, Tensor]:
        """Backward and, in the last micro-batch of a step, update; returns the terms to log."""
        self.player.backward(loss, watched=loss)
        return {"loss": loss.detach(), **self.player.update()}

    def mean_over_ranks(self, values: Tensor) -> float:
        """The mean of the values (n,) of all ranks, each of which has its own share, perhaps of none."""
        shares = gather_object([values.double().tolist()])
        return sum(sum(share) for share in shares) / sum(map(len, shares))

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        return {}

    def tensors(self) -> Tensors:
        """Everything that the next step depends on."""
        ema = {} if self.ema is None else {"ema": self.ema.network.state_dict()}
        return self.player.tensors() | ema

    def load(self, tensors: Tensors) -> None:
        """The inverse of `tensors`. A moving average that is not among them starts from the weights."""
        self.player.load(tensors)
        if self.ema is not None:
            self.ema.network.load_state_dict(
                tensors["ema"] if "ema" in tensors else tensors[self.player.file]
            )

    def counted_in_steps(self) -> dict[str, int]:
        return {}


def save_grid(path: Path, images: Tensor) -> None:
    """Write images (B, C, H, W) in [-1, 1] in rows of `COLUMNS`, without an incomplete last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(COLUMNS, len(images))
    whole = images[: len(images) // columns * columns].unflatten(0, (-1, columns))
    save_image(image_grid(whole.unbind(1)), path)
