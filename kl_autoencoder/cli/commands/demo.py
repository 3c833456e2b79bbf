"""demo: serve a page for the browser that shows how models reconstruct and edit photographs."""

import argparse

from ...console import say
from ...demo.address import bind, is_local
from ...extras import require
from ...progress import Progress
from ..parser import MODEL, Command, Parser, add_computation
from ..paths import check_model

MOST_MODELS = 3  # fit beside one another on the page


def demo_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help=f"{MODEL} (default: compact); up to {MOST_MODELS} times, to compare",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where to be reached (this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="0 for a free one (7860)")
    add_computation(parser)


def check_demo(arguments: argparse.Namespace) -> None:
    """`model` becomes a list; adds `listening`, the bound socket to serve on."""
    require("demo")
    arguments.model = arguments.model or ["compact"]
    if len(arguments.model) > MOST_MODELS:
        raise ValueError(f"--model: {len(arguments.model)} of them; allowed: up to {MOST_MODELS}")
    if len(set(arguments.model)) < len(arguments.model):
        raise ValueError(f"--model: {', '.join(arguments.model)}; allowed: each model once")
    for model in arguments.model:
        check_model(model)
    arguments.listening = bind(arguments.host, arguments.port)


def demo(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from ...evaluation.methods import short_names
    from ..loading import load_model

    if not is_local(arguments.listening):
        say("warning", f"--host {arguments.host}: whoever can reach this machine can use the page")
    models = {
        name: load_model(given, arguments.device, arguments.dtype)
        for name, given in zip(short_names(arguments.model), arguments.model, strict=True)
    }
    with Progress("starting the page"):
        from ...demo.server import serve
    serve(models, arguments.listening)


COMMANDS = {
    "demo": Command(
        "look at photographs through a model, on a page in the browser",
        demo_arguments,
        check_demo,
        demo,
        description="Serves a page on this machine alone: reconstructions under a divider beside JPEG and WebP, "
        "latents, noise, interpolation, attributes, samples. Nothing leaves the machine. Ctrl-C ends it.",
    ),
}
