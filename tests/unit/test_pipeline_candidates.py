"""The pipeline with candidates: adapter or pre-trained model, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrl_ray.candidates.scoring import CandidateScoring
from ctrl_ray.config import SamplerConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.rollout import Trajectory, rollout
from ctrl_ray.pipeline import ControlledPipeline, SampledImages
from ctrl_ray.policy.adapter import add_training_facts, read_adapter_info
from tests.classifiers import save_classifier
from tests.unit.test_pipeline import CONTROLS, HUES, PROMPTS, SIZES, _export

ASKED = {"size": SIZES, "hue": HUES}
EXPONENTS = {"size": 3.0, "hue": 2.0}
NEAR = 0.003
"""Scale of the adapter: its random parameters are so large that otherwise one candidate has all the weight."""


@pytest.fixture(scope="module")
def pipeline(adapter: Path) -> ControlledPipeline:
    return ControlledPipeline.from_pretrained(adapter, exponents=EXPONENTS)


@pytest.fixture(scope="module")
def adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the classifiers that it would carry; as an older version leaves it, it does not say kl_coef."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    _export(tiny_pipeline, folder, SamplerConfig(num_steps=3))
    for name, control in CONTROLS.items():
        save_classifier(folder / "classifier" / name, name, control)
    return folder


def _sample(pipeline: ControlledPipeline, **options: Any) -> SampledImages:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    given = {"prompt": PROMPTS, "controls": ASKED, "generator": generators}
    given |= {} if pipeline.info is None else {"adapter_scale": NEAR}
    return pipeline(**(given | options), output_type="latent")


@pytest.mark.full
def test_one_of_the_candidates_is_kept(pipeline: ControlledPipeline) -> None:
    """The same for each image alone and in other chunks; without candidates all is as it was."""
    steps: list[int] = []
    both = _sample(pipeline, num_candidates=4, on_step=lambda k, _: steps.append(k))
    assert steps == [0, 1, 2] * 4
    chunked = _sample(pipeline, num_candidates=4, candidate_batch_size=3)
    torch.testing.assert_close(chunked.images, both.images, atol=1e-4, rtol=1e-4)
    second = _sample(
        pipeline,
        prompt=PROMPTS[1],
        controls={"size": 0, "hue": 1},
        generator=torch.Generator().manual_seed(12),
        num_candidates=4,
    )
    torch.testing.assert_close(second.images, both.images[1:], atol=1e-4, rtol=1e-4)
    assert both.ess is not None and second.ess is not None
    torch.testing.assert_close(second.ess, both.ess[1:], atol=1e-3, rtol=1e-3)
    assert both.ess.shape == (2,) and bool(((both.ess > 1.2) & (both.ess <= 4)).all())
    single = _sample(pipeline)
    assert single.ess is None and torch.equal(_sample(pipeline, num_candidates=1).images, single.images)


@pytest.mark.full
def test_without_training_the_same_choice_is_made_among_pre_trained_images(
    adapter: Path, pipeline: ControlledPipeline, tiny_pipeline: Path
) -> None:
    """The base model with the classifiers is the adapter scaled to nothing; weights that are all equal keep them all."""
    classifiers = {name: adapter / "classifier" / name for name in CONTROLS}
    base = ControlledPipeline.from_base_model(str(tiny_pipeline), classifiers=classifiers, exponents=EXPONENTS)
    assert base.controls == {"size": ("low", "middle", "high"), "hue": ("0.5", "1")}
    off = _sample(pipeline, num_candidates=4, adapter_scale=0.0)
    alone = _sample(base, num_candidates=4, num_inference_steps=3)
    torch.testing.assert_close(alone.images, off.images, atol=1e-4, rtol=1e-4)
    assert alone.ess is not None and off.ess is not None
    torch.testing.assert_close(alone.ess, off.ess, atol=1e-3, rtol=1e-3)
    deterministic = _sample(base, num_candidates=4, num_inference_steps=3, eta=0.0)  # no ratio is needed
    assert deterministic.ess is not None
    equal = CandidateScoring(CONTROLS, classifiers, dict.fromkeys(CONTROLS, 0.0), None)
    sizes = _sample(_scored_by(base, equal), num_candidates=4, num_inference_steps=3).ess
    assert sizes is not None and sizes.tolist() == pytest.approx([4, 4])


def _scored_by(pipeline: ControlledPipeline, scoring: CandidateScoring) -> ControlledPipeline:
    return ControlledPipeline(pipeline.policy, pipeline.info, scheduler=None, scoring=scoring)


@pytest.mark.full
def test_a_trained_adapter_knows_its_exponents_and_its_share(adapter: Path, tmp_path: Path) -> None:
    """Found beside the adapter too, in the run that made it."""
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.move(tmp_path / "adapter" / "classifier", tmp_path / "classifier")
    add_training_facts(tmp_path / "adapter", {"kl_coef": 0.25, "candidate_share": 0.25})
    assert read_adapter_info(tmp_path / "adapter").training == {"kl_coef": 0.25, "candidate_share": 0.25}
    given = ControlledPipeline.from_pretrained(tmp_path / "adapter", exponents={"size": 4.0, "hue": 4.0})
    trained = ControlledPipeline.from_pretrained(tmp_path / "adapter")
    found, expected = (_sample(pipeline, num_candidates=4) for pipeline in (trained, given))
    assert torch.equal(found.images, expected.images)
    quarter = _sample(
        ControlledPipeline.from_pretrained(adapter, exponents={"size": 4.0, "hue": 4.0}), num_candidates=4
    )
    assert quarter.ess is not None and found.ess is not None and not torch.equal(quarter.ess, found.ess)


@pytest.mark.full
def test_what_is_refused(adapter: Path, pipeline: ControlledPipeline, tiny_pipeline: Path) -> None:
    def refused(message: str, pipe: ControlledPipeline = pipeline, **options: Any) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            _sample(pipe, **({"num_candidates": 8} | options))

    refused("num_candidates is 0; expected at least 1", num_candidates=0)
    refused("batch_size is 0; expected at least 1", candidate_batch_size=0)
    refused("no control is asked for", controls=None)
    refused("`draw` is not the plain sampler", draw=_other)
    refused("1 generators for 2 images", generator=[torch.Generator()])
    refused("latents have shape (1, 4, 4, 4)", latents=torch.zeros(1, 4, 4, 4))
    with pytest.warns(UserWarning, match="eta is 0.0"):
        refused("denoising step 0 has no noise (eta 0)", eta=0.0)
    info = pipeline.info
    size = {"size": adapter / "classifier" / "size"}
    refused("kl_coef of the adapter is not known", _scored_by(pipeline, CandidateScoring(CONTROLS, size, None, info)))
    partial = _scored_by(pipeline, CandidateScoring(CONTROLS, size, EXPONENTS, info))
    refused("there is no classifier of control 'hue'", partial)
    assert _sample(partial, num_candidates=2, controls={"size": 1}).ess is not None  # nobody asks for hue
    base = ControlledPipeline.from_base_model(str(tiny_pipeline), classifiers=size)
    refused("the pre-trained model alone follows no control", base, controls={"size": 1}, num_candidates=1)
    with pytest.raises(ConfigError, match="classifiers names"):
        ControlledPipeline.from_pretrained(adapter, classifiers={"sise": adapter})


def _other(*args: Any, **kwargs: Any) -> Trajectory:
    return rollout(*args, **kwargs)
