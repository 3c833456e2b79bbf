"""Count and log the steps that were skipped because their gradient is not finite."""

from collections.abc import Callable

import torch
from torch import Tensor

from .journal import Journal


class BadSteps:
    """Counts skipped steps: `total` in the run, and `in_a_row` up to the last step that was reported.

    `note` leaves on the device whether a step was skipped; only `report` waits for it. Checkpoints keep both
    counts.
    """

    def __init__(self, samples_per_step: int, journal: Journal, say: Callable[[str], None]):
        self.samples_per_step, self.journal, self.say = samples_per_step, journal, say
        self.total = self.in_a_row = 0
        self.noted: list[tuple[int, int, Tensor]] = []  # step, samples after it, whether it was skipped

    def note(self, step: int, samples: int, norms: list[Tensor]) -> None:
        """Note a step, skipped or not.

        samples: how many the run has consumed after this step, over all ranks. norms: the gradient norms (scalars)
        of the networks that it trained; the step counts as skipped unless all are finite.
        """
        self.noted.append((step, samples, ~torch.stack(norms).isfinite().all()))

    def report(self) -> int:
        """Log the skipped steps since the last report; returns the largest number of them in a row."""
        flags = torch.stack([bad for *_, bad in self.noted]).tolist() if self.noted else []
        most = 0
        for (step, end, _), bad in zip(self.noted, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            most = max(most, self.in_a_row)
            if bad:
                self.total += 1
                # samples are numbered in the order in which all ranks together consume them
                samples = list(range(end - self.samples_per_step, end))
                self.say(
                    f"step {step} skipped: its gradient is not finite (samples {samples[0]} to {samples[-1]})"
                )
                self.journal.write(step, end, {"skipped_samples": samples, "train/skipped_steps": self.total})
        self.noted.clear()
        return most

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"bad_total": self.total, "bad_in_a_row": self.in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Take over the counts that `state` returned."""
        self.total, self.in_a_row = state["bad_total"], state["bad_in_a_row"]
