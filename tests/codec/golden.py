"""The golden file: symbols coded by a learned model of made-up whole numbers, as version 1 of the format has them.

`python -m tests.codec.golden` decodes the file with the settings of this process and checks that encoding gives the
same bytes; `--write` writes the file anew, which only a new version of the format may need.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from kl_autoencoder.codec import container
from kl_autoencoder.codec.container import Header
from kl_autoencoder.codec.context_model import ContextModel, integers
from kl_autoencoder.codec.context_network import SUM_BITS, WEIGHT_BITS, ContextNetwork
from kl_autoencoder.codec.prediction import decode_symbols, encode_symbols

PATH = Path(__file__).with_name("golden.klc")
REACH = {"context": 300, "hidden": 700, "out": 2000}  # of the weights, in units
SHAPE, QUALITIES = (3, 17, 22), (12, 40, 95)


def numbers(count: int, seed: int, reach: int) -> np.ndarray:
    """Whole numbers from -reach to reach: a linear congruential generator, whatever numpy's version."""
    values, state = [], seed
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        values.append((state >> 33) % (2 * reach + 1) - reach)
    return np.array(values)


def model() -> ContextModel:
    """Weights that bfloat16 cannot hold, and sums of up to seven digits."""
    network = ContextNetwork(SHAPE[0], width=16, five_passes=1)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(network.named_parameters()):
            bits, reach = (
                (SUM_BITS, 60_000) if name.endswith("bias") else (WEIGHT_BITS, REACH[name.split(".")[2]])
            )
            whole = numbers(parameter.numel(), seed, reach).reshape(parameter.shape)
            parameter.copy_(torch.from_numpy(whole).float() / (1 << bits))
    return ContextModel(network)


def symbols() -> np.ndarray:
    drawn = numbers(2 * int(np.prod(SHAPE)), 99, 40).reshape(2, *SHAPE)
    return (drawn[0] * drawn[1] // 50).astype(np.int32)


def packed() -> bytes:
    learned = model()
    chunks = [encode_symbols(symbols(), learned, quality) for quality in QUALITIES]
    return container.pack(Header(QUALITIES[0], "golden", bytes(6), learned.hash, 136, 176), chunks)


def decoded(data: bytes) -> list[np.ndarray]:
    learned = model()
    header, chunks = container.unpack(data)
    assert header.entropy_hash == learned.hash
    return [decode_symbols(chunk, SHAPE, learned, q)[0] for chunk, q in zip(chunks, QUALITIES, strict=True)]


def main() -> None:
    if "mkldnn-off" in sys.argv:
        torch.backends.mkldnn.enabled = False
    if "bfloat16" in sys.argv:
        torch.set_float32_matmul_precision("medium")
    assert max(tensor.abs().max().item() for tensor in integers(model().network).values()) > 256
    found = decoded(PATH.read_bytes())
    assert all(np.array_equal(one, symbols()) for one in found)
    assert packed() == PATH.read_bytes()
    print("the same", torch.get_num_threads())


if __name__ == "__main__":
    if "--write" in sys.argv:
        PATH.write_bytes(packed())
    main()
