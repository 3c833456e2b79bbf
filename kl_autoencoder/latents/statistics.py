"""Mean and standard deviation of latents, and usage of codes, over a data set: exact, and mergeable over ranks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class LatentStatistics:
    """Mean and standard deviation of latents over any number of batches, per channel and over all channels.

    Keeps the count n, the mean and M2 = sum (z - mean)^2 per channel, in float64 on the CPU. Disjoint parts merge
    exactly (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm"):
    M2 = sum M2_i + sum n_i (mean_i - mean)^2. `mean`, `std` and the factors raise ValueError before any update.
    """

    def __init__(self, channels: int):
        self.count = 0.0  # values seen in each channel
        self.channel_mean = torch.zeros(channels, dtype=torch.float64)
        self.m2 = torch.zeros(channels, dtype=torch.float64)

    def update(self, latents: Tensor, variance: Tensor | None = None) -> None:
        """Add raw latents (B, C, h, w).

        `variance`, of the same shape, makes the latents means of posteriors with this variance; the statistics are
        then those of samples from them: Var[z] = Var[mean] + E[variance]. Raises ValueError for another number of
        channels and for values that are not finite.
        """
        channels = len(self.channel_mean)
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(f"latents must be (B, {channels}, h, w), not {tuple(latents.shape)}")
        values = latents.detach().cpu().double().transpose(0, 1).flatten(1)
        if not values.isfinite().all():
            raise ValueError(
                f"{int((~values.isfinite()).sum())} of {values.numel()} latents are NaN or infinite"
            )
        batch = LatentStatistics(channels)
        batch.count = float(values.shape[1])
        batch.channel_mean = values.mean(1)
        batch.m2 = (values - batch.channel_mean[:, None]).square().sum(1)
        if variance is not None:
            batch.m2 += variance.detach().cpu().double().sum(dim=(0, 2, 3))
        self.merge(batch)

    def merge(self, other: "LatentStatistics") -> None:
        """Add the statistics `other`, of further latents with the same number of channels."""
        count = self.count + other.count
        if count:
            mean = (self.count * self.channel_mean + other.count * other.channel_mean) / count
            self.m2 = self._m2_about(mean) + other._m2_about(mean)
            self.count, self.channel_mean = count, mean

    def reduced(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> "LatentStatistics":
        """Return the statistics of all ranks together, on every rank; ranks without latents must call it too.

        `sum_over_ranks` returns the sum of a float64 tensor over the ranks, such as
        `lambda t: accelerator.reduce(t, "sum")`. It is called twice: for the mean of all, then for M2 about it.
        """
        total = LatentStatistics(len(self.channel_mean))
        sums = sum_over_ranks(
            torch.cat([torch.tensor([self.count]).double(), self.count * self.channel_mean])
        )
        total.count = float(sums[0])
        total.channel_mean = sums[1:].cpu() / max(total.count, 1.0)
        total.m2 = sum_over_ranks(self._m2_about(total.channel_mean)).cpu()
        return total

    def state(self) -> dict:
        """Count, means and M2, exact and ready for JSON; `from_state` is the inverse."""
        return {"count": self.count, "mean": self.channel_mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LatentStatistics":
        statistics = cls(len(state["mean"]))
        statistics.count = state["count"]
        statistics.channel_mean = torch.tensor(state["mean"], dtype=torch.float64)
        statistics.m2 = torch.tensor(state["m2"], dtype=torch.float64)
        return statistics

    def summary(self) -> dict[str, Any]:
        """The statistics as in a manifest: scaling_factor, shift_factor, and mean and std of each channel."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @property
    def mean(self) -> Tensor:
        """(C,), float64: the mean of each channel."""
        self._check()
        return self.channel_mean

    @property
    def std(self) -> Tensor:
        """(C,), float64: the standard deviation of each channel about its own mean (divisor n)."""
        self._check()
        return (self.m2 / self.count).sqrt()

    @property
    def shift_factor(self) -> float:
        """The mean over all channels together."""
        return float(self.mean.mean())

    @property
    def scaling_factor(self) -> float:
        """1 / standard deviation over all channels together (Rombach et al. 2022, section D.1).

        Raises ValueError if all latents are equal.
        """
        self._check()
        variance = float(self._m2_about(self.channel_mean.mean()).sum()) / (self.count * len(self.m2))
        if variance == 0:
            raise ValueError("all latents are equal: no scaling factor gives them unit variance")
        return 1 / math.sqrt(variance)

    def _m2_about(self, point: Tensor) -> Tensor:
        return self.m2 + self.count * (self.channel_mean - point) ** 2

    def _check(self) -> None:
        if not self.count:
            raise ValueError("no latents have been added to these statistics")


class CodeUsage:
    """Counts how often each of `codes` codes is used, over any number of batches."""

    def __init__(self, codes: int):
        self.counts = torch.zeros(codes, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Add code indices, an integer tensor of any shape."""
        self.counts += torch.bincount(codes.flatten().long().cpu(), minlength=len(self.counts))

    def merge(self, other: "CodeUsage") -> None:
        self.counts = self.counts + other.counts

    def state(self) -> dict:
        return {"counts": self.counts.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "CodeUsage":
        usage = cls(len(state["counts"]))
        usage.counts = torch.tensor(state["counts"])
        return usage

    def summary(self) -> dict[str, Any]:
        """The usage as in a manifest: number of codes, how many are used, and perplexity (exp of the entropy)."""
        share = self.counts.double() / self.counts.sum()
        perplexity = float(torch.special.entr(share).sum().exp())
        return {"codes": len(share), "used": int((share > 0).sum()), "perplexity": perplexity}


Statistics = LatentStatistics | CodeUsage
