"""Export a model as two ONNX graphs, for programs that run without torch.

The layout is that of diffusers' ONNX pipelines, which optimum's ORTStableDiffusionPipeline reads:

- `vae_encoder/model.onnx`: sample -> latent_parameters, mean and log-variance, in this order in the channels;
- `vae_decoder/model.onnx`: latent_sample -> sample;
- a config.json beside each.

The plain torch modules are exported, not the execution in pieces. Batch, height and width are free.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ...extras import needs
from ..autoencoder_kl import ExactAutoencoder
from ..folder import CONFIG
from . import graphs
from .graphs import Graph

FILE = "model.onnx"
# Weights of more bytes than this are written to a separate file: a protobuf cannot exceed 2 GiB.
LARGEST_FILE = 2_000_000_000


def export_onnx(vae: ExactAutoencoder, folder: Path) -> None:
    """Write both graphs into new folders in `folder`. Raises MissingExtra without onnx or onnxscript."""
    with needs("onnx"):
        import onnx
        import onnxscript  # noqa: F401
    for graph in graphs.graphs(vae):
        (folder / graph.folder).mkdir(parents=True)
        _trace(graph, vae.dtype, folder / graph.folder / FILE)
        onnx.checker.check_model(folder / graph.folder / FILE)
        (folder / graph.folder / CONFIG).write_text(vae.to_json_string())


def _trace(graph: Graph, dtype: torch.dtype, path: Path) -> None:
    free = {0: "batch", 2: "height", 3: "width"}
    example = graphs.example(graph, graphs.TRACED).to(dtype)
    large = sum(p.nbytes for p in graph.network.parameters()) > LARGEST_FILE
    with quiet():
        program = torch.onnx.export(
            graph.network.eval(), (example,), dynamo=True, dynamic_shapes=(free,), verbose=False,
            input_names=[graph.input], output_names=[graph.output],
        )  # fmt: skip
        _forget_sources(program)
        program.save(path, external_data=large)


def _forget_sources(program: torch.onnx.ONNXProgram) -> None:
    """Remove the exporter's notes on each node: source lines with their paths on this machine."""
    graph = program.model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    program.model.metadata_props.clear()


def differences(vae: ExactAutoencoder, folder: Path) -> dict[str, float]:
    """Return the largest |difference| of onnxruntime from torch, for each folder; see `graphs.differences`."""
    import onnxruntime

    def computed(graph: Graph, x: Tensor) -> Tensor:
        path = folder / graph.folder / FILE
        if path not in sessions:
            sessions[path] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(sessions[path].run([graph.output], {graph.input: x.numpy()})[0])

    sessions: dict[Path, onnxruntime.InferenceSession] = {}
    return graphs.differences(vae, computed, "onnxruntime")


def can_be_checked() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings within the `with` statement: the exporter's are about its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
