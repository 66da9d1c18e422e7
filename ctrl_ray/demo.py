"""`python -m ctrl_ray.demo`: a page on this machine that draws with an adapter, before and after."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ctrl_ray import command
from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.errors import ConfigError, CtrlRayError

if TYPE_CHECKING:
    from PIL import Image

MOST_IMAGES, MOST_CANDIDATES = 16, 32
"""Of one click."""
NOTHING = "(no class)"
"""A control that is not asked for."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Open a page on this machine that draws with an adapter. It shows images of the pre-trained model and of the adapter from
    the same noise, side by side, with what the oracle measures of each."""

    adapter: str
    """Adapter folder, such as RUN/adapter."""
    base_model: str | None = None
    """Where the base model lies now, if not where the adapter was trained."""
    device: str | None = None
    """'cpu', 'cuda', 'cuda:1'. None: a GPU where there is one."""
    port: Annotated[int, at_least(0)] = 7860
    """Port of the page, on the loopback address. 0: any free port."""
    open_browser: bool = False
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        check_fields(self)


_SMALLEST = 160
"""Pixels: smaller images are shown larger, without blurring."""
_CSS = """
.pairs { display: flex; flex-wrap: wrap; gap: 18px; }
.pair { display: flex; gap: 6px; }
.pair figure { margin: 0; width: min(36vw, var(--side)); }
.pair img { width: 100%; border-radius: 4px; image-rendering: var(--scaling); }
.pair figcaption { font-size: 0.85rem; }
.pair b { font-weight: 600; }
"""


class Drawn(NamedTuple):
    """What one click gave."""

    before: list[tuple[Image.Image, str]]
    """Images of the pre-trained model, with what is measured of each."""
    after: list[tuple[Image.Image, str]]
    """The same noise with the adapter and the classes."""


class Artist:
    """Draws before and after with one adapter."""

    def __init__(self, options: DemoOptions) -> None:
        import torch

        from ctrl_ray.pipeline import ControlledPipeline

        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = ControlledPipeline.from_pretrained(
            options.adapter, base_model=options.base_model, device=device
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.folder = Path(options.adapter).resolve()
        assert self.pipeline.info is not None
        self.controls = self.pipeline.info.controls

    def draw(
        self,
        prompt: str,
        classes: Mapping[str, int | None],
        *,
        strength: float = 1.0,
        candidates: int = 1,
        seed: int = 0,
        num_images: int = 1,
        on_step: Callable[[int, int], None] = lambda done, of: None,
    ) -> Drawn:
        """Draw `num_images` pairs. on_step: told how many of how many denoising steps are done. ConfigError for what cannot be
        drawn, before anything is."""
        if not prompt.strip():
            raise ConfigError("the prompt is empty; type what the image should show")
        for name, value, most in (("images", num_images, MOST_IMAGES), ("candidates", candidates, MOST_CANDIDATES)):
            if not 1 <= value <= most:
                raise ConfigError(f"number of {name} is {value}; expected 1 to {most}")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected a whole number, 0 or more")
        asked = {name: label for name, label in classes.items() if label is not None}
        if candidates > 1 and not asked:
            raise ConfigError("candidates are chosen by a class, and none is asked for; choose one, or 1 candidate")
        steps = self.pipeline.sampler.num_steps
        total, done = steps * (1 + candidates), 0

        def step(*_: Any) -> None:
            nonlocal done
            done += 1
            on_step(min(done, total), total)

        drawn = []
        for scale, controls, among in ((0.0, {}, 1), (strength, asked, candidates)):
            images = self.pipeline(
                [prompt] * num_images,
                controls=controls,
                generator=_generators(seed, num_images),
                adapter_scale=scale,
                num_candidates=among,
                on_step=step,
            ).images
            drawn.append([(image, self._caption(image, prompt, asked)) for image in images])
        return Drawn(*drawn)

    def _caption(self, image: Image.Image, prompt: str, asked: Mapping[str, int]) -> str:
        """What the oracle of each control measures, and whether that is in the class asked for."""
        from ctrl_ray.oracles import load_oracle, measure_one
        from ctrl_ray.wording import measured_text

        parts = []
        for name, control in self.controls.items():
            if control.oracle is None:
                continue
            value = measure_one(load_oracle(control.oracle), image, prompt)
            number = measured_text(value)
            mark = "" if name not in asked else " ✓" if control.classify(value) == asked[name] else " ✗"
            parts.append(f"{name} {number}{f' {control.unit}' if control.unit else ''}{mark}")
        return " · ".join(parts) or "no oracle measures this control"

    def first_prompt(self) -> str:
        """One of the run's, to begin with."""
        from ctrl_ray.runs.finished import first_prompt

        assert self.pipeline.info is not None
        return first_prompt(self.folder, self.pipeline.info.base_model)

    def certificate(self) -> str:
        """One line about the adapter: its distance from the target, by the report of the run that made it."""
        from ctrl_ray.wording import gap_text

        file = self.folder.parent / "report" / "summary.json"
        try:
            after = json.loads(file.read_text(encoding="utf-8"))["after"]
            return (
                f"The policy is {gap_text(after)}; {after['accuracy']:.1%} of its samples are in the class asked for."
            )
        except (OSError, ValueError, KeyError, TypeError):
            return "No report lies beside the adapter: python -m ctrl_ray.evaluate --adapter FOLDER measures how good it is."


def _generators(seed: int, num_images: int) -> list[Any]:
    import torch

    from ctrl_ray.sample import image_seed

    return [torch.Generator().manual_seed(image_seed(seed, index)) for index in range(num_images)]


def pairs_html(drawn: Drawn) -> str:
    """Each image before and after, side by side, with what is measured of it."""
    side = max(image.width for image, _ in drawn.before)
    style = f"--side: {max(side, _SMALLEST)}px; --scaling: {'pixelated' if side < _SMALLEST else 'auto'}"
    pairs = "".join(
        f'<div class="pair">{_figure("before", *before)}{_figure("after", *after)}</div>'
        for before, after in zip(drawn.before, drawn.after, strict=True)
    )
    return f'<div class="pairs" style="{style}">{pairs}</div>'


def _figure(title: str, image: Image.Image, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    data, words = base64.b64encode(file.getvalue()).decode("ascii"), html.escape(caption)
    return (
        f'<figure class="{title}"><img alt="{title}: {words}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{title}</b> {words}</figcaption></figure>"
    )


def build_page(artist: Artist) -> Any:
    """The page, a Gradio `Blocks`, not yet served."""
    import gradio as gr

    names = list(artist.controls)

    def clicked(
        prompt: str, strength: float, candidates: float, seed: float, num_images: float, *classes: str, progress: Any
    ) -> Any:
        asked = {
            name: None if chosen in (None, NOTHING) else artist.controls[name].class_names.index(chosen)
            for name, chosen in zip(names, classes, strict=True)
        }
        try:
            drawn = artist.draw(
                prompt,
                asked,
                strength=float(strength),
                candidates=_whole("candidates", candidates),
                seed=_whole("seed", seed),
                num_images=_whole("images", num_images),
                on_step=lambda done, of: progress((done, of), desc="denoising", unit="steps"),
            )
        except CtrlRayError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        return pairs_html(drawn)

    with gr.Blocks(title="ctrl_ray", analytics_enabled=False) as page:
        gr.Markdown(f"# ctrl_ray: {', '.join(names)}\n{artist.certificate()}")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                prompt = gr.Textbox(label="Prompt", value=artist.first_prompt(), lines=2, elem_id="prompt")
                classes = [
                    gr.Dropdown(
                        [NOTHING, *control.class_names],
                        value=control.class_names[-1],
                        label=f"{name}{f' / {control.unit}' if control.unit else ''}",
                        elem_id=f"control-{index}",
                    )
                    for index, (name, control) in enumerate(artist.controls.items())
                ]
                strength = gr.Slider(0.0, 2.0, value=1.0, step=0.05, label="Strength (1: as trained)")
                candidates = gr.Slider(1, MOST_CANDIDATES, value=1, step=1, label="Candidates an image")
                number = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
                seed = gr.Number(value=0, precision=0, label="Seed", elem_id="seed")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=2):
                pictures = gr.HTML("<p>Press Draw.</p>", elem_id="pictures", min_height=320, container=True)
                gr.Markdown("✓ and ✗: whether the measured value is in the class that was asked for.")

        def with_progress(*values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008 - Gradio's way to ask for one
            return clicked(*values, progress=progress)

        button.click(with_progress, [prompt, strength, candidates, seed, number, *classes], pictures, api_name=False)
    return page


def serve(artist: Artist, options: DemoOptions) -> tuple[Any, str]:
    """Serve the page on the loopback address; (the page, its address). ConfigError where the port is taken."""
    import gradio as gr

    page = build_page(artist).queue(default_concurrency_limit=1, max_size=8)
    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=options.port or None,
            share=False,
            quiet=True,
            inbrowser=options.open_browser,
            prevent_thread_lock=True,
            theme=plain,
            css=_CSS,
            footer_links=[],
        )
    except OSError as error:
        raise ConfigError(f"port {options.port} is taken ({error}); give another --port, or 0 for any") from error
    return page, str(address)


def _whole(name: str, value: float | None) -> int:
    if value is None or value != int(value):
        raise ConfigError(f"{name} is {value}; expected a whole number")
    return int(value)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    import tyro

    options = tyro.cli(DemoOptions, args=argv, prog="python -m ctrl_ray.demo")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("the page needs Gradio, which is not installed; pip install 'ctrl-ray[demo]'") from error
    page, address = serve(Artist(options), options)
    try:
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        page.block_thread()
    except KeyboardInterrupt:
        pass  # as was said
    finally:
        page.close()


if __name__ == "__main__":
    sys.exit(main())
