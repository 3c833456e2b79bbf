"""Export a model as two programs of torch.export, which torch runs without this package or compiles ahead of time.

The layout is that of the ONNX graphs, with a config.json beside each program:

- `vae_encoder/model.pt2`: images -> moments, mean and log-variance, in this order in the channels;
- `vae_decoder/model.pt2`: latents -> images.

Load them with `torch.export.load(path).module()`. Batch, height and width are free.
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
# Metadata of nodes with source lines and their paths.
OF_THIS_MACHINE = ("stack_trace", "from_node", "source_fn_stack")


def export_programs(vae: ExactAutoencoder, folder: Path) -> None:
    """Write both programs into new folders in `folder`."""
    for graph in graphs.graphs(vae):
        (folder / graph.folder).mkdir(parents=True)
        torch.export.save(_traced(graph, vae.dtype), folder / graph.folder / FILE)
        (folder / graph.folder / CONFIG).write_text(vae.to_json_string())


def differences(vae: ExactAutoencoder, folder: Path) -> dict[str, float]:
    """Return the largest |difference| of each program from the model, by folder; see `graphs.differences`."""

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
