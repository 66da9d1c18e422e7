"""The pipeline against the policy it was exported from: same noise, same latents, step by step."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.errors import ConfigError
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.control.labels import class_index, number_names_line, parse_labels
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.policies import make_policy

CONTROLS = {"size": ControlConfig(classes=("low", "middle", "high")), "hue": ControlConfig(classes=("0.5", "1"))}
LORA = LoraConfig(rank=2, alpha=4.0)
PROMPTS = ["a red circle", "a blue cross"]
SIZES, HUES = [2, 0], [None, 1]
LABELS = torch.tensor([[2, 2], [0, 1]])


def _export(base: Path, folder: Path, sampler: SamplerConfig, lora: LoraConfig | None = LORA) -> ControlledPolicy:
    """A policy with random parameters, and its adapter in `folder`."""
    policy = make_policy(base, {n: c.num_classes for n, c in CONTROLS.items()}, lora=lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for table in policy.controls.tables.values():
        table.weight.data[-1] = 0
    info = make_adapter_info(
        base_model=str(base),
        base_revision=None,
        controls=CONTROLS,
        sampler=sampler,
        lora=lora,
        training={},
    )
    save_adapter(folder, policy, info)
    return policy


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (11, 12)]


@torch.no_grad()
def _rollout(policy: ControlledPolicy, base: Path, sampler: SamplerConfig, *, reference: bool = False) -> Tensor:
    """Clean latents by the training's own step kernel, with the noise that a diffusers pipeline would draw."""
    backbone = load_backbone(str(base))
    kernel = backbone.make_kernel(sampler)
    guidance = Guidance(sampler.guidance_scale, sampler.control_scale)
    inputs = Inputs(backbone.load_encoder().encode(PROMPTS), LABELS, guidance)
    generators = _generators()

    def noise() -> Tensor:
        return torch.cat([torch.randn(1, 4, 4, 4, generator=generator) for generator in generators])

    latents = noise()
    for k in range(kernel.num_steps):
        by_reference = reference or not kernel.controlled(k)
        output = policy(latents, kernel.time(k), inputs, reference=by_reference)
        step = kernel.step(k, latents, output)
        latents = step.mean + step.std * noise()
    return latents


def _latents(pipeline: ControlledPipeline, **kwargs: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, generator=_generators(), output_type="latent", **kwargs).images


@pytest.fixture(scope="module")
def exported(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ControlledPolicy]:
    folder = tmp_path_factory.mktemp("adapter")
    return folder, _export(tiny_pipeline, folder, SamplerConfig(num_steps=3))


@pytest.mark.parametrize(
    "scales",
    [
        (1.0, None, 0),
        pytest.param((3.0, None, 1), marks=pytest.mark.full),
        pytest.param((3.0, 2.0, 1), marks=pytest.mark.full),
        pytest.param((1.0, 2.0, 0), marks=pytest.mark.full),
    ],
)
def test_samples_are_the_policys(tiny_pipeline: Path, tmp_path: Path, scales: tuple[float, float | None, int]) -> None:
    """Without guidance, with it, with a separate scale of the label direction; last steps by the reference."""
    guidance_scale, control_scale, steps = scales
    sampler = SamplerConfig(
        num_steps=3, guidance_scale=guidance_scale, control_scale=control_scale, reference_steps=steps
    )
    policy = _export(tiny_pipeline, tmp_path, sampler)
    pipeline = ControlledPipeline.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        latents = _latents(pipeline, controls={"size": SIZES, "hue": HUES})
    torch.testing.assert_close(latents, _rollout(policy, tiny_pipeline, sampler), atol=1e-4, rtol=1e-4)
    assert float((latents - _latents(pipeline)).abs().max()) > 0.01  # the labels count


def test_the_labels_scale_may_be_another_than_the_trained_one(
    tiny_pipeline: Path, exported: tuple[Path, ControlledPolicy]
) -> None:
    """As CFG fine-tuning is sampled; it is warned about."""
    folder, policy = exported
    pipeline = ControlledPipeline.from_pretrained(folder)
    with pytest.warns(UserWarning, match="control_scale is 2.0, but the adapter was trained with None"):
        latents = _latents(pipeline, controls={"size": SIZES, "hue": HUES}, control_scale=2.0)
    expected = _rollout(policy, tiny_pipeline, SamplerConfig(num_steps=3, control_scale=2.0))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.full), 1])
def test_full_finetuning_is_sampled_too(tiny_pipeline: Path, tmp_path: Path, steps: int) -> None:
    sampler = SamplerConfig(num_steps=2, reference_steps=steps)
    policy = _export(tiny_pipeline, tmp_path, sampler, lora=None)
    pipeline = ControlledPipeline.from_pretrained(tmp_path)
    latents = _latents(pipeline, controls={"size": SIZES, "hue": HUES})
    torch.testing.assert_close(latents, _rollout(policy, tiny_pipeline, sampler), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="no LoRA to scale"):
        _latents(pipeline, adapter_scale=0.5)


@pytest.mark.full
def test_scale_zero_is_the_pre_trained_model(tiny_pipeline: Path, exported: tuple[Path, ControlledPolicy]) -> None:
    folder, policy = exported
    pipeline = ControlledPipeline.from_pretrained(folder)
    latents = _latents(pipeline, controls={"size": SIZES, "hue": HUES}, adapter_scale=0.0)
    expected = _rollout(policy, tiny_pipeline, SamplerConfig(num_steps=3), reference=True)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    base = load_backbone(str(tiny_pipeline)).load_pipeline()
    base.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "eta": 1.0, "guidance_scale": 1.0, "output_type": "latent"}
    torch.testing.assert_close(
        base(PROMPTS, generator=_generators(), **settings).images, expected, atol=1e-4, rtol=1e-4
    )
    back = _latents(pipeline, controls={"size": SIZES, "hue": HUES})
    expected = _rollout(policy, tiny_pipeline, SamplerConfig(num_steps=3))
    torch.testing.assert_close(back, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", [("1", "2", "3", "4", "5"), ("10", "20"), ("0", "1", "3"), ("b", "0")])
def test_what_is_said_of_classes_named_by_numbers_is_so(names: tuple[str, ...]) -> None:
    control = ControlConfig(classes=names)
    line = number_names_line("stars", control)
    assert line is not None
    text, index = re.search(r"the class named '(\d+)' \(index (\d+)\)", line).groups()  # type: ignore[union-attr]
    assert class_index("stars", control, text) == int(index)
    assert parse_labels([f"stars={text}"], {"stars": control}) == {"stars": int(index)}
    assert f"--control stars={text} " in line and f"{{'stars': {text}}}" in line
    if "there is not" in line:
        with pytest.raises(ConfigError, match="does not exist"):
            class_index("stars", control, int(text))
    else:
        named = re.search(rf"is index {text}, the class named '(.*?)'", line)
        assert named is not None and names[class_index("stars", control, int(text))] == named[1]


def test_nothing_is_said_where_numbers_are_no_names_or_their_own_indices() -> None:
    for names in (("low", "high"), ("0", "1", "2"), ("0.5", "1.5")):
        assert number_names_line("stars", ControlConfig(classes=names)) is None


def test_a_class_is_found_with_its_accents_apart_and_endless_digits_are_none() -> None:
    control = ControlConfig(classes=("gr\u00fcn", "rot"))
    assert class_index("colour", control, "gru\u0308n") == 0
    with pytest.raises(ConfigError, match="does not exist"):
        class_index("colour", control, "1" * 5000)


def test_classes_by_name_by_index_and_per_prompt(exported: tuple[Path, ControlledPolicy]) -> None:
    pipeline = ControlledPipeline.from_pretrained(exported[0])
    assert pipeline.controls == {"size": ("low", "middle", "high"), "hue": ("0.5", "1")}
    assert pipeline.labels({"size": "middle"}, 2).tolist() == [[1, 2], [1, 2]]
    assert pipeline.labels({"hue": [0, None], "size": ("high", 0)}, 2).tolist() == [[2, 0], [0, 2]]
    assert pipeline.labels(None, 1).tolist() == [[3, 2]]
    assert [class_index("hue", CONTROLS["hue"], value) for value in ("0", "1", "0.5", None, 1)] == [0, 1, 0, 2, 1]
    composed = ControlConfig(classes=("gr\u00fcn", "2"))
    assert [class_index("colour", composed, value) for value in ("gru\u0308n", "gr\u00fcn", "0", "2")] == [0, 0, 0, 1]
    images = pipeline("a red circle", controls={"size": 1}, num_images_per_prompt=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    with pytest.raises(ConfigError, match=r"unknown control 'sise'; this adapter has \['size', 'hue'\]"):
        pipeline("a red circle", controls={"sise": 1})
    for wrong in (3, -1, "tall", True, 1.5):
        with pytest.raises(ConfigError, match=r"class .* of control 'size' does not exist; .* 0 = 'low', 1 = 'middle'"):
            pipeline("a red circle", controls={"size": wrong})
    with pytest.raises(ConfigError, match="'size' has 3 classes for 2 prompts"):
        pipeline(PROMPTS, controls={"size": [0, 1, 2]})


def test_other_sampler_settings_warn_once(exported: tuple[Path, ControlledPolicy]) -> None:
    pipeline = ControlledPipeline.from_pretrained(exported[0])
    with pytest.warns(UserWarning, match="num_steps is 2, but the adapter was trained with 3"):
        first = _latents(pipeline, num_inference_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(_latents(pipeline, num_inference_steps=2), first)
        _latents(pipeline, num_inference_steps=3)
    with pytest.warns(UserWarning, match=r"eta is 0\.0, but the adapter was trained with 1\.0"):
        _latents(pipeline, eta=0.0)


@pytest.fixture(scope="module")
def unused(exported: tuple[Path, ControlledPolicy]) -> ControlledPipeline:
    return ControlledPipeline.from_pretrained(exported[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; expected at least 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; expected a finite number, at least 1"),
        ({"eta": 1.5}, "eta is 1.5; expected a number in [0, 1]"),
        ({"eta": float("nan")}, "eta is nan; expected a finite number, at least 0"),
        ({"adapter_scale": float("nan")}, "adapter_scale is nan; expected a finite number"),
        ({"adapter_scale": float("-inf")}, "adapter_scale is -inf; expected a finite number"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; expected at least 1"),
        ({"num_inference_steps": 1001}, "num_steps is 1001, but the model's noise schedule has 1000 steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5 (float); expected an integer or None"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; expected at least 1"),
        ({"num_candidates": 0}, "num_candidates is 0; expected at least 1"),
        ({"candidate_batch_size": -1}, "candidate_batch_size is -1; expected at least 1"),
        ({"height": 0}, "height is 0; expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(
    unused: ControlledPipeline, options: dict[str, Any], message: str
) -> None:
    pipeline = unused
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=re.escape(message)):
        warnings.simplefilter("error", UserWarning)
        pipeline("a red circle", **options)
    assert pipeline._encoder is None and pipeline._decoder is None


@pytest.mark.full
def test_options_of_diffusers_pipelines(exported: tuple[Path, ControlledPolicy], tiny_pipeline: Path) -> None:
    """Latents, embeddings, negative prompts and sizes: as diffusers' own pipeline takes them, with the adapter off."""
    pipeline = ControlledPipeline.from_pretrained(exported[0])
    theirs = load_backbone(str(tiny_pipeline)).load_pipeline()
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "eta": 1.0, "output_type": "latent"}
    text = pipeline.policy.backbone.load_encoder().encode(PROMPTS).tensors["text"]
    start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"guidance_scale": 2.0, "negative_prompt": ["a green square", "a"]},) * 2,
        ({"guidance_scale": 2.0, "latents": start},) * 2,
        ({"height": 48, "width": 64, "guidance_scale": 1.0},) * 2,
        ({"num_images_per_prompt": 2, "guidance_scale": 1.0},) * 2,
        ({"prompt": None, "prompt_embeds": text, "guidance_scale": 1.0},) * 2,
    ]
    for ours, same in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            prompts = {"prompt": PROMPTS} | ours
            found = pipeline(**prompts, adapter_scale=0.0, generator=_one(), output_type="latent").images
        expected = theirs(**({"prompt": PROMPTS} | same), **settings, generator=_one()).images
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def _one() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_what_comes_out(exported: tuple[Path, ControlledPolicy]) -> None:
    """The same images in every form, and the trajectory that they came from; each step is told."""
    pipeline = ControlledPipeline.from_pretrained(exported[0])
    pipeline.set_progress_bar_config(disable=True)
    steps: list[int] = []
    made = {
        kind: pipeline(PROMPTS, generator=_one(), output_type=kind, on_step=lambda k, x: steps.append(k))
        for kind in ("pil", "np", "pt", "latent")
    }
    assert steps == [0, 1, 2] * 4
    arrays = np.stack([np.asarray(image) for image in made["pil"].images])
    assert np.abs(made["np"].images * 255 - arrays).max() <= 0.5 + 1e-3
    torch.testing.assert_close(made["pt"].images.permute(0, 2, 3, 1), torch.from_numpy(made["np"].images))
    assert torch.equal(made["latent"].images, made["pt"].trajectory.clean_latents)
    assert made["pt"].trajectory.latents.shape == (4, 2, 4, 4, 4)


def test_options_that_do_not_fit(exported: tuple[Path, ControlledPolicy], tiny_pipeline: Path) -> None:
    pipeline = ControlledPipeline.from_pretrained(exported[0])

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            pipeline(**({"prompt": PROMPTS} | options))

    refused("expected either a prompt or prompt_embeds; got neither", prompt=None)
    refused("width is 30; expected a positive multiple of 8", width=30)
    refused("1 generators for 2 images", generator=[_one()])
    refused(r"latents have shape \(1, 4, 4, 4\); expected \(2, 4, 4, 4\)", latents=torch.zeros(1, 4, 4, 4))
    refused("3 negative prompts for 2 prompts", negative_prompt=["a"] * 3, guidance_scale=1.0)
    refused("output_type 'jpg' is unknown", output_type="jpg")
    base = ControlledPipeline.from_base_model(str(tiny_pipeline))
    with pytest.raises(ConfigError, match="unknown control 'size'"):
        base("a red circle", controls={"size": 1})


def test_the_pre_trained_models_share_of_the_steps_stays(tiny_pipeline: Path, tmp_path: Path) -> None:
    """With so few steps that all would be the pre-trained model's, the call is refused."""
    _export(tiny_pipeline, tmp_path, SamplerConfig(num_steps=3, reference_steps=1))
    pipeline = ControlledPipeline.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the last 1 are the pre-trained model's"):
        pipeline(PROMPTS, num_inference_steps=1)
