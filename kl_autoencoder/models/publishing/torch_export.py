"""A model as two programs of torch.export, which torch runs without this package, or compiles ahead of time.

In the layout of the ONNX graphs: `vae_encoder/model.pt2` computes moments (mean and log variance, one after the
other in the channels) from images, `vae_decoder/model.pt2` images from latents; a config.json beside each. Read
them with `torch.export.load(path).module()`. Batch, height and width are free.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..autoencoder_kl import ExactAutoencoder
from ..folder import CONFIG
from . import graphs
from .graphs import Graph

FILE = "model.pt2"
OF_THIS_MACHINE = ("stack_trace", "from_node", "source_fn_stack")  # lines of this program, with their paths


def export_programs(vae: ExactAutoencoder, folder: Path) -> None:
    """Write both programs into `folder`, which is made."""
    for graph in graphs.graphs(vae):
        (folder / graph.folder).mkdir(parents=True)
        torch.export.save(_traced(graph, vae.dtype), folder / graph.folder / FILE)
        (folder / graph.folder / CONFIG).write_text(vae.to_json_string())


def differences(vae: ExactAutoencoder, folder: Path) -> dict[str, float]:
    """By folder the largest |difference| between a program and the model; see `graphs.differences`."""

    def computed(graph: Graph, x: Tensor) -> Tensor:
        if graph.folder not in programs:
            programs[graph.folder] = torch.export.load(folder / graph.folder / FILE).module()
        return programs[graph.folder](x)

    programs: dict[str, torch.nn.Module] = {}
    return graphs.differences(vae, computed, "the program")


@torch.no_grad()
def _traced(graph: Graph, dtype: torch.dtype) -> ExportedProgram:
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    example = graphs.example(graph, graphs.TRACED).to(dtype)
    program = torch.export.export(graph.network.eval(), (example,), dynamic_shapes=(free,))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in OF_THIS_MACHINE:
                node.meta.pop(key, None)
    return program
