"""A LoRA that a user puts beside the adapter, through diffusers' own pipeline: it stays as it was, and it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from tests.policies import make_policy

CONTROLS = {"size": ControlConfig(classes=("low", "high"))}
PROMPTS = ["a red circle", "a blue cross"]
FILE = "pytorch_lora_weights.safetensors"


def _adapter(folder: Path, base: Path, kind: Any, seed: int) -> Path:
    lora = LoraConfig(rank=2, alpha=4.0)
    policy = make_policy(base, {"size": 2}, lora=lora, kind=kind)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.trainable_parameters().items():
        change = 0.1 * torch.randn(parameter.shape, generator=generator)
        if "tables." in name:
            change[-1] = 0
        parameter.data += change
    sampler = SamplerConfig(num_steps=3, reference_steps=1)
    info = make_adapter_info(
        base_model=str(base), base_revision=None, controls=CONTROLS, sampler=sampler, lora=lora, kind=kind, training={}
    )
    return save_adapter(folder, policy, info)


@pytest.fixture(scope="module")
def style(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _adapter(tmp_path_factory.mktemp("style"), tiny_pipeline, "embedding", seed=5)


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (11, 12)]


def _latents(pipe: ControlledPipeline, **kwargs: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, controls={"size": 1}, generator=_generators(), output_type="latent", **kwargs).images


def _plain(base: Path, style: Path) -> Tensor:
    """diffusers with the style alone, at 0.7."""
    pipe = load_backbone(str(base)).load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(style, weight_name=FILE, adapter_name="style")
    pipe.set_adapters(["style"], [0.7])
    settings = {"num_inference_steps": 3, "eta": 1.0, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(PROMPTS, generator=_generators(), **settings).images


def _styles_scales(pipe: ControlledPipeline) -> set[float]:
    layers = [module for module in pipe.policy.denoiser.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    return {layer.scaling["style"] for layer in layers}


@pytest.mark.parametrize("kind", ["embedding", "gains"])
def test_a_second_lora_stays_on_with_its_weight(kind: str, style: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """After calls at any scale of ours; with ours at 0 the images are those of the style alone, in every step."""
    pipe = ControlledPipeline.from_pretrained(_adapter(tmp_path, tiny_pipeline, kind, seed=1))
    without = _latents(pipe)
    own = list(pipe.pipeline.get_active_adapters())
    pipe.pipeline.load_lora_weights(style, weight_name=FILE, adapter_name="style")
    pipe.pipeline.set_adapters([*own, "style"], [1.0] * len(own) + [0.7])
    before = _styles_scales(pipe)
    assert sorted(before) == pytest.approx([0.7 * 4.0 / 2])
    half, whole, none = (_latents(pipe, adapter_scale=scale) for scale in (0.5, 1.0, 0.0))
    assert sorted(pipe.pipeline.get_active_adapters()) == sorted([*own, "style"]) and _styles_scales(pipe) == before
    torch.testing.assert_close(none, _plain(tiny_pipeline, style), atol=1e-4, rtol=1e-4)
    for one, other in ((half, none), (whole, half), (whole, without)):
        assert float((one - other).abs().max()) > 1e-3
    pipe.pipeline.delete_adapters("style")
    torch.testing.assert_close(_latents(pipe), without, atol=1e-5, rtol=1e-5)


def test_it_is_one_pipeline(style: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The parts are those that we sample with, the text encoder too, whose kept features are then asked for anew."""
    pipe = ControlledPipeline.from_pretrained(_adapter(tmp_path, tiny_pipeline, "gains", seed=1))
    first = _latents(pipe)
    theirs = pipe.pipeline
    assert theirs is pipe.pipeline and theirs.unet is pipe.policy.denoiser
    assert torch.equal(_latents(pipe), first)
    with torch.no_grad():
        for parameter in theirs.text_encoder.parameters():
            parameter.mul_(1.5)
    assert float((_latents(pipe) - first).abs().max()) > 1e-3
