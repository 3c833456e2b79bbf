"""How a code book is used: counts of its indices over images, their perplexity, the share of codes in use."""

import torch
from torch import Tensor


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """How often each code occurs in `indices`, integers of any shape -> (codes,), int64.

    Counts of several batches or ranks add up. ValueError for an index that is none of the code book's.
    """
    if len(outside := indices[(indices < 0) | (indices >= codes)]):
        raise ValueError(f"indices: {int(outside[0])}; allowed: from 0 to {codes - 1}")
    return torch.bincount(indices.flatten().cpu(), minlength=codes)


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the codes' frequencies: as many equally likely codes would carry as much. From 1 to K."""
    frequencies = counts.double() / counts.sum()
    return float(torch.special.entr(frequencies).sum().exp())


def usage(counts: Tensor) -> float:
    """The share of codes that occur at all."""
    return float((counts > 0).double().mean())
