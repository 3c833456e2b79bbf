"""`OneNetwork`: what tasks that train a single network, with a moving average, have in common."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn

from kl_autoencoder.data.image_io import image_grid, save_image

from ..loop.context import RunContext
from ..loop.player import MovingAverage, Player, Tensors
from ..loop.task import Grouped

COLUMNS = 8  # of a grid of pictures, at most


class OneNetwork:
    """Base class with the parts of a `Task` that are the same for any network.

    network: the network that is trained. Nothing here changes whether it is in training or evaluation mode.
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
        """Do nothing: by default there is no held-out data left to read."""

    def playing(self, step: int) -> Sequence[Player]:
        return self.players

    def end_step(self, step: int) -> None:
        """Update the moving average; `step` is the number of steps taken."""
        if self.ema is not None:
            self.ema.update(self.network, step)

    def move(self, loss: Tensor) -> dict[str, Tensor]:
        """Backward of a scalar `loss` and, in the last micro-batch of a step, update; returns the terms to log."""
        self.player.backward(loss, watched=loss)
        return {"loss": loss.detach(), **self.player.update()}

    def mean_over_ranks(self, values: Tensor) -> float:
        """The mean of the values of all ranks; `values`: this rank's share (n,), which may be empty."""
        shares = gather_object([values.double().tolist()])
        return sum(sum(share) for share in shares) / sum(map(len, shares))

    def measure(self, grouped: Grouped) -> dict[str, Any]:
        return {}

    def tensors(self) -> Tensors:
        """Weights, optimizer state and moving average: everything that the next step depends on."""
        ema = {} if self.ema is None else {"ema": self.ema.network.state_dict()}
        return self.player.tensors() | ema

    def load(self, tensors: Tensors) -> None:
        """Load what `tensors` returned; a moving average that is not among them starts from the weights."""
        self.player.load(tensors)
        if self.ema is not None:
            self.ema.network.load_state_dict(
                tensors["ema"] if "ema" in tensors else tensors[self.player.file]
            )

    def counted_in_steps(self) -> dict[str, int]:
        return {}


def save_grid(path: Path, images: Tensor) -> None:
    """Write images (B, C, H, W) in [-1, 1] to `path` in rows of `COLUMNS`; an incomplete last row is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(COLUMNS, len(images))
    whole = images[: len(images) // columns * columns].unflatten(0, (-1, columns))
    save_image(image_grid(whole.unbind(1)), path)
