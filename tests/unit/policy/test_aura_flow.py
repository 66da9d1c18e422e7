"""AuraFlow on a small pipeline of random weights: what it says of itself, and the stock pipeline beside it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline
from torch import Tensor

import ctrl_ray
from ctrl_ray import ControlledPipeline
from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.pipeline_sampler import PipelineSampler
from ctrl_ray.policy.protocol import Inputs
from tests.configs import tiny_run
from tests.families import check_rows_of_adapted_layers, check_start, check_stock_flow_draws
from tests.policies import make_policy, moved
from tests.tiny import edit_json

CONTROLS = {"size": ControlConfig(classes=("a", "b", "c"))}
PROMPTS = ("a red circle", "a blue cross")
LORA = LoraConfig(rank=2, alpha=2.0, target_modules=("to_q", "to_out.0", "add_q_proj", "to_add_out"))


@pytest.fixture(scope="module")
def folder(tiny_aura_flow_pipeline: Path) -> Path:
    return tiny_aura_flow_pipeline


def stock(folder: Path) -> AuraFlowPipeline:
    """Plain diffusers."""
    pipe = AuraFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def given(folder: Path) -> tuple[Tensor, Tensor, Any]:
    """Latents, a time and a condition of two samples."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    return latents, torch.tensor(750.0), load_backbone(str(folder)).load_encoder().encode(PROMPTS)


@pytest.mark.parametrize("length", [None, 6])
def test_it_knows_its_sizes_and_conditions(folder: Path, length: int | None) -> None:
    """Those that the stock pipeline makes of the same prompts, zero after their ends."""
    backbone = load_backbone(str(folder), sampler=SamplerConfig(max_sequence_length=length))
    assert (backbone.denoiser, backbone.latent_shape, backbone.image_size()) == ("transformer", (4, 4, 4), (32, 32))
    assert list(backbone.identities()) == ["transformer", "text_encoder", "vae"]
    condition = backbone.load_encoder().encode(PROMPTS)
    assert {name: tuple(tensor.shape) for name, tensor in condition.tensors.items()} == backbone.condition_shapes(2)
    text, _, null, _ = stock(folder).encode_prompt(list(PROMPTS), max_sequence_length=length or 256)
    assert condition.null_tensors is not None
    torch.testing.assert_close(condition.tensors["text"], text, rtol=1e-4, atol=2e-5)  # one at a time, and two
    torch.testing.assert_close(condition.null_tensors["text"], null, rtol=1e-4, atol=2e-5)
    assert backbone.num_tokens(PROMPTS) == ([4, 4], length or 256)
    assert condition.tensors["text"][:, 4:].abs().max() == 0 < condition.tensors["text"][:, 3].abs().min()
    with pytest.raises(ConfigError, match="AuraFlow takes no pooled embeddings"):
        backbone.embedded(text, text[:, 0])


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_pre_trained_model_draws_what_the_stock_pipeline_draws(
    folder: Path, size: tuple[int, int], eta: float
) -> None:
    """With guidance, from the same noise: of the ODE (η = 0) with diffusers' own scheduler, else with ours in it, whose noise
    is then that of our generator."""
    height, width = size
    ours = ControlledPipeline.from_base_model(str(folder))
    ours.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}
    arguments |= {"height": height, "width": width}
    pipe = stock(folder)
    extra = {} if eta else {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    if eta:
        pipe.scheduler = ctrl_ray.AncestralFlowScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.generator = torch.Generator().manual_seed(1)
    found = ours(PROMPTS, latents=noise, eta=eta, generator=torch.Generator().manual_seed(1), **arguments).images
    theirs = pipe(list(PROMPTS), latents=noise.clone(), **arguments, **extra).images
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_samples_for_a_classifier_are_of_the_models_size(folder: Path) -> None:
    """Or of the sampler's: the stock pipeline's own is 1024 pixels, whatever its transformer says."""
    for sampler, shape in (
        (SamplerConfig(num_steps=2), (3, 32, 32, 3)),
        (SamplerConfig(num_steps=2, height=32, width=48), (3, 32, 48, 3)),
    ):
        images, _ = next(PipelineSampler(dataclasses.replace(tiny_run(folder), sampler=sampler), PROMPTS)(3, 0))
        assert images.shape == shape
    with pytest.raises(ConfigError, match=r"sampler\.width is 40, but base model .* multiples of 16 pixels; give one"):
        load_backbone(str(folder), sampler=SamplerConfig(height=32, width=40))


@pytest.mark.parametrize("kind", ["embedding", "gains"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(5.0)])
def test_the_policy_is_the_reference_at_the_start(folder: Path, kind: Any, guidance: Guidance) -> None:
    """Bit for bit, and not when it has moved."""
    policy = make_policy(folder, {"size": 3}, lora=LORA, kind=kind)
    latents, time, condition = given(folder)
    inputs = Inputs(condition, torch.tensor([[0], [2]]), guidance)
    check_start(policy, latents, time, inputs)


def test_rows_of_adapted_layers_are_samples_or_tokens(folder: Path) -> None:
    check_rows_of_adapted_layers(folder)


@pytest.mark.full
@torch.no_grad()
def test_a_class_is_a_lora_of_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    """Its transformer predicts what the policy does with that label; with our scheduler, and the LoRA off in the last step, the
    stock pipeline draws the policy's images, by what the adapter's README says."""
    policy = moved(make_policy(folder, {"size": 3}, lora=LORA, kind="gains"), by=0.1, seed=3)
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.0, reference_steps=1)
    info = make_adapter_info(
        base_model=str(folder),
        base_revision=None,
        controls=CONTROLS,
        sampler=sampler,
        lora=LORA,
        kind="gains",
        training={},
    )
    save_adapter(tmp_path, policy, info)
    latents, time, condition = given(folder)
    inputs = Inputs(condition, torch.tensor([[2], [2]]))
    pipe = stock(folder)
    pipe.load_lora_weights(tmp_path / "classes", weight_name="size=2.safetensors")
    theirs = pipe.transformer(
        hidden_states=latents, timestep=time.expand(2) / 1000, encoder_hidden_states=condition.tensors["text"]
    ).sample
    ours = policy(latents, time, inputs, reference=False).prediction
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    check_stock_flow_draws(pipe, tmp_path, policy, sampler, inputs, latents, height=32, width=32)
    assert "height=32, width=32, " in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: edit_json(base / "transformer" / "config.json", out_channels=8), "4 channels in and 8 out"),
        (
            lambda base: edit_json(base / "text_encoder" / "config.json", d_model=48),
            "width 40 where its encoder gives 48",
        ),
        (lambda base: shutil.rmtree(base / "tokenizer"), "lacks its tokenizer"),
    ],
)
def test_what_is_not_whole(folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    base = shutil.copytree(folder, tmp_path / "pipeline")
    damage(base)
    with pytest.raises(ModelError, match=message):
        load_backbone(str(base))
