"""Usage of a code book: counts of its indices over images, their perplexity, the share of codes in use."""

import torch
from torch import Tensor


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """Count how often each code occurs in `indices`, integers of any shape: (codes,), int64.

    Counts of several batches or ranks add up. Raises ValueError for an index outside 0 to codes - 1.
    """
    if len(outside := indices[(indices < 0) | (indices >= codes)]):
        raise ValueError(f"indices: {int(outside[0])}; allowed: from 0 to {codes - 1}")
    return torch.bincount(indices.flatten().cpu(), minlength=codes)


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the codes' frequencies, from 1 (one code in use) to the number of codes (all equally often).

    counts: (codes,).
    """
    frequencies = counts.double() / counts.sum()
    return float(torch.special.entr(frequencies).sum().exp())


def usage(counts: Tensor) -> float:
    """The share of codes that occur at least once, in [0, 1]. counts: (codes,)."""
    return float((counts > 0).double().mean())
