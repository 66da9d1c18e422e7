"""What the demo's page draws, without a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctrl_ray.config import ControlConfig
from ctrl_ray.demo import Artist, DemoOptions, Drawn, pairs_html
from ctrl_ray.errors import ConfigError
from ctrl_ray.oracles import jpeg_size
from tests.policies import save_gains_adapter

SIZE = ControlConfig(oracle="jpeg_size", thresholds=(1500.0,), unit="bytes")
CONTROLS = {"size": SIZE, "kind": ControlConfig(classes=("x", "y"))}


@pytest.fixture(scope="module")
def adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two controls, one of which an oracle measures, in a run's folder."""
    return save_gains_adapter(tmp_path_factory.mktemp("run") / "adapter", tiny_pipeline, CONTROLS, by=0.1)


@pytest.fixture(scope="module")
def artist(adapter: Path) -> Artist:
    return Artist(DemoOptions(adapter=str(adapter), device="cpu"))


def test_before_and_after_have_the_same_noise_and_each_its_measured_value(artist: Artist) -> None:
    """Without a class both are the same; an image depends on its own seed alone; steps are told as they are done."""
    told: list[tuple[int, int]] = []
    drawn = artist.draw(
        "a red circle", {"size": 1, "kind": None}, num_images=2, on_step=lambda *step: told.append(step)
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for images, label in ((drawn.before, 1), (drawn.after, 1)):
        for image, caption in images:
            value = jpeg_size(image)
            assert caption == f"size {value:.0f} bytes {'✓' if SIZE.classify(value) == label else '✗'}"
    same = artist.draw("a red circle", {"size": None, "kind": None}, num_images=1)
    pixels = [np.asarray(images[0][0]) for images in (drawn.before, drawn.after, same.before, same.after)]
    assert np.array_equal(pixels[0], pixels[2]) and np.array_equal(pixels[2], pixels[3])
    assert not np.array_equal(pixels[0], pixels[1])
    assert same.after[0][1] == f"size {jpeg_size(same.after[0][0]):.0f} bytes"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"num_images": 0}, "number of images is 0; expected 1 to 16"),
        ({"candidates": 33}, "number of candidates is 33; expected 1 to 32"),
        ({"seed": -1}, "seed is -1"),
        ({"candidates": 2, "classes": {"size": None}}, "none is asked for"),
    ],
)
def test_what_cannot_be_drawn_is_one_message(artist: Artist, given: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"prompt": "a red circle", "classes": {"size": 1}, **given}
    with pytest.raises(ConfigError, match=message):
        artist.draw(values.pop("prompt"), values.pop("classes"), **values)  # type: ignore[arg-type]


def test_the_certificate_is_the_runs(artist: Artist, adapter: Path) -> None:
    """Of the report beside the adapter; without one the line says how to get it."""
    assert "python -m ctrl_ray.evaluate --adapter" in artist.certificate()
    after = {"gap": 2.87, "gap_standard_error": 0.27, "ess": 0.1, "too_wide": False, "accuracy": 0.898}
    (adapter.parent / "report").mkdir()
    (adapter.parent / "report" / "summary.json").write_text(json.dumps({"after": after}))
    assert artist.certificate() == (
        "The policy is 2.9 ± 0.3 nats from the best that any sampler can do (effective sample size 10.0%); 89.8% of its "
        "samples are in the class asked for."
    )


def test_a_page_s_pictures_are_inside_it_and_their_texts_are_escaped() -> None:
    image = Image.new("RGB", (64, 64))
    page = pairs_html(Drawn([(image, "<b>1</b>")], [(image, "2 ✓")]))
    assert page.count("data:image/png;base64,") == 2 and "<b>1</b>" not in page and "&lt;b&gt;1&lt;/b&gt;" in page
    assert 'alt="after: 2 ✓"' in page and "--side: 160px; --scaling: pixelated" in page
