"""A model as two ONNX graphs, for programs that run without torch.

Names of folders, inputs and outputs are those that optimum's ORTStableDiffusionPipeline reads, in the layout of
diffusers' ONNX pipelines: `vae_encoder/model.onnx`, sample -> latent_parameters (mean and log variance, one after
the other in the channels), and `vae_decoder/model.onnx`, latent_sample -> sample, a config.json beside each. What
is exported are the plain torch modules, not the execution in pieces. Batch, height and width are free.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...extras import needs
from .. import float16, float16_check
from ..autoencoder_kl import ExactAutoencoder
from ..folder import CONFIG

FILE = "model.onnx"
# Bytes of weights above which they are a file of their own: a protobuf ends at 2 GiB.
LARGEST_FILE = 2_000_000_000
MEASURED = 32  # latents a side of the images that float16's range is measured on
CHECKED = ((1, 8, 8), (3, 5, 7), (1, 16, 9))  # batch, height and width of latents that both runtimes compute
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}  # of the range of the values that torch computes


class Graph(NamedTuple):
    """One of the two networks: its folder, its names for input and output, and the channels that it reads."""

    folder: str
    input: str
    output: str
    network: nn.Module
    channels: int
    factor: int  # its input's pixels a latent pixel, per side


def graphs(vae: ExactAutoencoder) -> tuple[Graph, Graph]:
    """Encoder and decoder with the 1x1 convolutions on the side of the latents, sharing the model's tensors."""
    encoder = nn.Sequential(*filter(None, (vae.encoder, vae.quant_conv)))
    decoder = nn.Sequential(*filter(None, (vae.post_quant_conv, vae.decoder)))
    c = vae.config
    return (
        Graph("vae_encoder", "sample", "latent_parameters", encoder, c.in_channels, vae.downsampling),
        Graph("vae_decoder", "latent_sample", "sample", decoder, c.latent_channels, 1),
    )


def export_onnx(vae: ExactAutoencoder, folder: Path) -> None:
    """Write both graphs into `folder`, which is made. MissingExtra without onnx and onnxscript."""
    with needs("onnx"):
        import onnx
        import onnxscript  # noqa: F401
    for graph in graphs(vae):
        (folder / graph.folder).mkdir(parents=True)
        _trace(graph, vae.dtype, folder / graph.folder / FILE)
        onnx.checker.check_model(folder / graph.folder / FILE)
        (folder / graph.folder / CONFIG).write_text(vae.to_json_string())


def _trace(graph: Graph, dtype: torch.dtype, path: Path) -> None:
    free = {0: "batch", 2: "height", 3: "width"}
    example = _noise(graph, (2, 8, 12)).to(dtype)  # sides that differ, or torch takes them for one
    large = sum(p.nbytes for p in graph.network.parameters()) > LARGEST_FILE
    with _quiet():
        program = torch.onnx.export(
            graph.network.eval(), (example,), dynamo=True, dynamic_shapes=(free,), verbose=False,
            input_names=[graph.input], output_names=[graph.output],
        )  # fmt: skip
        _forget_sources(program)
        program.save(path, external_data=large)


def _forget_sources(program: torch.onnx.ONNXProgram) -> None:
    """Remove what the exporter notes of each node: lines of this program, with their paths on this machine."""
    graph = program.model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    program.model.metadata_props.clear()


def _noise(graph: Graph, shape: tuple[int, int, int]) -> Tensor:
    """(B, channels, factor h, factor w), the same at every call."""
    (b, h, w), f = shape, graph.factor
    return torch.randn(b, graph.channels, h * f, w * f, generator=torch.Generator().manual_seed(h))


def differences(vae: ExactAutoencoder, folder: Path) -> dict[str, float]:
    """By folder the largest |difference| between onnxruntime's results and torch's in float32.

    As a part of their range, at the batches and sizes of CHECKED. ValueError if one of them is beyond TOLERANCE.
    """
    import onnxruntime

    dtype, found = vae.dtype, {}
    for graph in graphs(float16.copied(vae, torch.float32)):
        path = folder / graph.folder / FILE
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        difference = float16_check.Difference()
        for shape in CHECKED:
            x = _noise(graph, shape).to(dtype)
            (got,) = session.run([graph.output], {graph.input: x.numpy()})
            with torch.no_grad():
                difference.add(graph.network(x.float()), torch.from_numpy(got))
        found[graph.folder] = difference.relative
        if not found[graph.folder] <= TOLERANCE[dtype]:
            told = f"{found[graph.folder]:.2g} of the range; allowed: {TOLERANCE[dtype]:g}"
            raise ValueError(f"{graph.folder}: onnxruntime differs from torch by {told}; nothing is written")
    return found


def can_be_checked() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


@torch.no_grad()
def safe_in_float16(vae: ExactAutoencoder) -> ExactAutoencoder:
    """The same function in float16: as it is where every activation is in range, else by `float16.rescaled`.

    `vae` is in float32. Measured on hard images and scikit-image's photographs, of MEASURED
    latents a side. ValueError if rescaling does not help.
    """
    size = MEASURED * vae.downsampling
    images = [*float16_check.hard_images(size), *float16_check.sample_photographs(size)]
    noise = [float16_check.noise_latents(vae, size)]
    reached = float16.measure(vae, images, noise)
    if reached.unsafe():
        vae = float16.rescaled(vae, reached)
        if stuck := float16.measure(vae, images, noise).unsafe():
            raise ValueError(f"float16: rescaling cannot bring into range: {', '.join(stuck[:4])}")
    return float16.copied(vae, torch.float16, force_upcast=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of the exporter's log; its warnings are of its own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def described(found: dict[str, float]) -> str:
    """The result of `differences` in words."""
    sizes = ", ".join("x".join(map(str, shape)) for shape in CHECKED)
    parts = [f"{folder} within {math.ceil(value * 1e8) / 1e8:.2g}" for folder, value in found.items()]
    return f"checked in onnxruntime against torch at latents of {sizes}: {', '.join(parts)} of the range"
