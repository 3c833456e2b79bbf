"""The page in Gradio: its tabs and controls, and the methods of the studio that they call."""

import html
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr

from ..codec.steps import DEFAULT_QUALITY, HIGHEST, LOWEST
from ..files import one_line
from . import rendering
from .studio import Studio

TITLE = "What does the autoencoder make of it?"
INTRO = (
    "Drop a photograph, paste one, or choose an example. It is encoded to latents, a small fraction of its "
    "numbers, and decoded again. Drag the divider to see what is lost. Everything stays on this machine."
)
SIZES = {"512": 512, "1024": 1024, "2048": 2048, "every pixel": None}  # the longest side, in pixels
# of the system, none is downloaded
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
START = "klAutoencoder.compare(element); watch('value', () => klAutoencoder.compare(element));"


def photograph_input(value: Path, label: str, name: str, height: int) -> gr.Image:
    """An input for an image that is dropped, pasted or chosen; methods get the path of its unchanged file.

    Gradio's own decoding is replaced, because it ignores colour profiles, does not handle 16 bits and has no clear
    message for files that are not images. value: the image shown at first. name: id of the HTML element. height: in
    pixels.
    """
    image = gr.Image(
        str(value), label=label, elem_id=name, height=height, sources=["upload", "clipboard"], type="filepath",
        image_mode=None, buttons=[],
    )  # fmt: skip
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def theme() -> gr.themes.Base:
    default = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"], primary_hue="blue")
    return default.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")


def head() -> str:
    return f"<script>{rendering.script()}</script>"


def told(function: Callable) -> Callable:
    """Wrap a function so that its errors appear on the page as one sentence instead of a traceback."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            sentence = one_line(str(error))
        except Exception as error:
            traceback.print_exc()
            sentence = f"{type(error).__name__}: {one_line(str(error))}"
        raise gr.Error(html.escape(sentence), title="That did not work", print_exception=False)

    return run


def remembered(function: Callable) -> Callable:
    """Cache the last answer of a function, because Gradio reports an upload twice."""
    return lru_cache(maxsize=1)(function)


def build(studio: Studio, examples: Sequence[Path]) -> gr.Blocks:
    """Build the page of a studio. Computations run one at a time: all share one place in Gradio's queue.

    examples: paths of photographs, at least two.
    """
    with gr.Blocks(title="kl-autoencoder", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>{TITLE}</h1><p>{INTRO}</p>", elem_classes=["ours", "intro"], apply_default_css=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photograph, longest, model = _inputs(studio, examples)
            with gr.Column(scale=3, min_width=340), gr.Tabs():
                _reconstruction_tab(page, studio, photograph, longest)
                _latents_tab(page, studio, photograph, model)
                _noise_tab(page, studio, photograph, model)
                if find_spec("constriction"):  # installed by the extra [codec]
                    _codec_tab(studio, photograph, model)
                _between_tab(studio, photograph, model, examples)
                _attribute_tab(studio, photograph, model)
                _samples_tab(studio, photograph, model)
    page.queue(default_concurrency_limit=1)
    return page


def _inputs(studio: Studio, examples: Sequence[Path]) -> tuple[gr.Image, gr.Radio, gr.Radio]:
    photograph = photograph_input(examples[0], "Photograph", "photograph", 240)
    gr.Examples(
        [[str(path)] for path in examples], [photograph], label="Or one of these", cache_examples=False
    )
    longest = gr.Radio(list(SIZES), value="1024", label="Longest side", info="in pixels; more takes longer")
    names = list(studio.models)
    model = gr.Radio(
        names, value=names[0], label="Model", visible=len(names) > 1, info="for all but the first tab"
    )
    return photograph, longest, model


def _text(words: str) -> gr.HTML:
    return gr.HTML(f"<p>{words}</p>", elem_classes=["ours"], apply_default_css=False)


def _output(name: str, **options: Any) -> gr.HTML:
    return gr.HTML(
        elem_id=name,
        elem_classes=["ours"],
        apply_default_css=False,
        js_on_load=START,
        padding=False,
        **options,
    )


def _on(events: Sequence[Callable], function: Callable, inputs: Sequence, outputs: Sequence) -> None:
    """Call a function on any of the events; while it runs, only the last of several new events is kept."""
    gr.on(
        list(events), told(function), list(inputs), list(outputs), concurrency_id="models",
        trigger_mode="always_last", show_progress="minimal", api_visibility="private",
    )  # fmt: skip


def _reconstruction_tab(page: gr.Blocks, studio: Studio, photograph: gr.Image, longest: gr.Radio) -> None:
    with gr.Tab("Reconstruction"):
        outputs = [_output("comparison"), _output("figures")]

    def reconstruct(path: str | None, longest: str) -> tuple[str, str]:
        return studio.reconstruct(path, SIZES[longest])

    _on(
        [page.load, photograph.change, longest.change],
        remembered(reconstruct),
        [photograph, longest],
        outputs,
    )


def _latents_tab(page: gr.Blocks, studio: Studio, photograph: gr.Image, model: gr.Radio) -> None:
    with gr.Tab("Latents") as tab:
        _text("What the photograph is encoded to: all that the decoder gets to know of it.")
        output = _output("latents")
    _on(
        [tab.select, photograph.change, model.change],
        remembered(studio.latents),
        [photograph, model],
        [output],
    )


def _noise_tab(page: gr.Blocks, studio: Studio, photograph: gr.Image, model: gr.Radio) -> None:
    with gr.Tab("Noise") as tab:
        _text("A diffusion model's latents are never quite right. How much noise does the decoder bear?")
        with gr.Row():
            level = gr.Slider(0, 2, 0.3, step=0.05, label="Noise", info="in deviations of each channel")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
        output = _output("noise")
    events = [tab.select, photograph.change, model.change, level.release, seed.change]
    _on(events, remembered(studio.noise), [photograph, model, level, seed], [output])


def _codec_tab(studio: Studio, photograph: gr.Image, model: gr.Radio) -> None:
    with gr.Tab("File") as tab:
        _text("The latents rounded and packed into a file: what <code>kl-autoencoder compress</code> writes.")
        quality = gr.Slider(
            LOWEST, HIGHEST, DEFAULT_QUALITY, step=1, label="Quality", info="16 less is half the precision"
        )
        outputs = [_output("compressed"), _output("file-figures")]
    events = [tab.select, photograph.change, model.change, quality.release]
    _on(events, remembered(studio.compress), [photograph, model, quality], outputs)


def _between_tab(studio: Studio, photograph: gr.Image, model: gr.Radio, examples: Sequence[Path]) -> None:
    with gr.Tab("Between two") as tab:
        _text("Two photographs are encoded, their latents mixed, and the mixture is decoded.")
        with gr.Row():
            second = photograph_input(examples[1], "Second photograph", "second", 160)
            with gr.Column():
                place = gr.Slider(0, 1, 0.5, step=0.05, label="Place", info="0 is the first, 1 the second")
                spherical = gr.Checkbox(label="Along an arc", info="keeps the length of the latents")
        output = _output("between")
    events = [tab.select, photograph.change, second.change, model.change, place.release, spherical.change]
    _on(events, remembered(studio.between), [photograph, second, model, place, spherical], [output])


def _attribute_tab(studio: Studio, photograph: gr.Image, model: gr.Radio) -> None:
    with gr.Tab("Attribute"):
        _text(
            "Photographs of two kinds say what an attribute is: the difference of their mean latents is added to "
            "yours. The more of each kind, and the more alike otherwise, the clearer."
        )
        with gr.Row():
            plus, minus = (
                gr.File(label=label, file_count="multiple", file_types=["image"], height=140)
                for label in ("Photographs with it", "Photographs without it")
            )
        strength = gr.Slider(-2, 2, 1, step=0.1, label="Strength")
        apply = gr.Button("Change the photograph", variant="primary")
        output = _output("attribute")

    def change(path: str | None, plus: list[str] | None, minus: list[str] | None, *rest: Any) -> str:
        return studio.attribute(path, plus or [], minus or [], *rest)

    _on([apply.click, strength.release], change, [photograph, plus, minus, model, strength], [output])


def _samples_tab(studio: Studio, photograph: gr.Image, model: gr.Radio) -> None:
    with gr.Tab("Samples") as tab:
        _text("What the decoder makes of random latents, without any photograph.")
        with gr.Row():
            kind = gr.Radio(
                ["prior", "fitted"],
                value="prior",
                label="Gaussian",
                info="fitted: to the photograph's channels",
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
        output = _output("samples")

    def sample(path: str | None, model: str, kind: str, seed: int) -> str:
        return studio.samples(path, model, kind == "fitted", seed)

    _on(
        [tab.select, model.change, kind.change, seed.change],
        sample,
        [photograph, model, kind, seed],
        [output],
    )
