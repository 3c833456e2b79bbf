"""Serve the page on this machine: security headers, allowed hosts, limit of uploads, shutdown."""

import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..extras import needs
from ..models.autoencoder_kl import ExactAutoencoder
from . import photographs
from .address import is_local, url
from .picture_files import PictureFiles
from .reconstruction import load_lpips
from .studio import Studio

# Set before gradio is imported: no analytics, no version check.
os.environ |= {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SSR_MODE": "False",
}
with needs("demo"):
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse
    from starlette.datastructures import MutableHeaders
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from . import page, rendering

MOST_UPLOADED = 64 << 20  # bytes of one file
HOUR = 3600  # seconds after which an upload is deleted
# The browser may load from this server alone. Gradio needs the parts with 'unsafe-inline' and 'unsafe-eval'.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class WithHeaders:
    """ASGI middleware that adds `HEADERS` to every HTTP response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def application(
    models: Mapping[str, ExactAutoencoder], folder: Path, local: bool, most_uploaded: int = MOST_UPLOADED
) -> FastAPI:
    """Build the web application.

    models: name -> model, at least one. folder: an existing empty folder for uploads, examples and pictures. local:
    accept requests for localhost only. most_uploaded: bytes of an upload, at most.
    """
    for name in ("uploads", "examples", "pictures"):
        (folder / name).mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    files = PictureFiles(folder / "pictures")
    studio = Studio(models, load_lpips(next(iter(models.values())).device), files)
    blocks = page.build(studio, photographs.write_examples(folder / "examples"))
    blocks.delete_cache = (HOUR, HOUR)
    app = FastAPI(openapi_url=None)

    @app.get("/pictures/{name}")
    def picture(name: str) -> FileResponse:
        path = files.path(name)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, headers={"cache-control": "no-store"})

    app.add_middleware(WithHeaders)
    if local:  # against DNS rebinding: a web page whose host name leads to this machine is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    return gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False, max_file_size=most_uploaded, ssr_mode=False,
        theme=page.theme(), css=rendering.style(), head=page.head(), allowed_paths=[str(folder / "examples")],
    )  # fmt: skip


class Server(uvicorn.Server):
    """Serves until a signal arrives, and then ends the process at once, even during a computation.

    ready: the line printed when the server has started.
    """

    def __init__(self, app: FastAPI, folder: Path, ready: str):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False))
        self.folder, self.ready = folder, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        _leave(self.folder, sig)


def serve(models: Mapping[str, ExactAutoencoder], listening: socket.socket) -> None:
    """Serve the page on a bound socket until Ctrl-C or SIGTERM; then delete all uploads and pictures.

    Raises ValueError for a model that is not a KL autoencoder of RGB images.
    """
    for name, vae in models.items():
        if not isinstance(vae, ExactAutoencoder) or (vae.config.in_channels, vae.config.out_channels) != (
            3,
            3,
        ):
            raise ValueError(f"{name}: allowed on the page: KL autoencoders of 3 channels (RGB)")
    folder = Path(tempfile.gettempdir(), f"kl-autoencoder-demo-{secrets.token_hex(8)}")
    for number in (signal.SIGINT, signal.SIGTERM):  # until the server has handlers of its own
        signal.signal(number, lambda sig, _: _leave(folder, sig))
    try:
        folder.mkdir(mode=0o700)  # only now, as a signal from here on removes it
        app = application(models, folder, is_local(listening))
        _warm_up(models)
        Server(app, folder, f"{url(listening)} (Ctrl-C ends it)").run([listening])
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder; tried again while a thread is still writing pictures into it."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _leave(folder: Path, sig: int) -> None:
    """Handle a signal: delete the folder of uploads and pictures and end the process at once."""
    _remove(folder)
    os._exit(128 + sig)  # a normal exit would wait for the computing thread


@torch.inference_mode()
def _warm_up(models: Mapping[str, ExactAutoencoder]) -> None:
    """Run every model once, so that the one-time costs of a first call are not counted in a visitor's times."""
    for vae in models.values():
        side = 8 * vae.size_multiple
        vae(torch.zeros(1, 3, side, side, device=vae.device, dtype=vae.dtype))
