"""Stable Diffusion XL on a small pipeline of random weights: what it says of itself, and the stock pipeline beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from ctrl_ray import ControlledPipeline
from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import load_into_policy, make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.protocol import Inputs
from tests.families import check_start
from tests.policies import make_policy, moved
from tests.tiny import edit_json, make_tiny_xl_pipeline

CONTROLS = {"size": ControlConfig(classes=("a", "b", "c")), "hue": ControlConfig(classes=("x", "y"))}
COUNTS = {name: control.num_classes for name, control in CONTROLS.items()}
PROMPTS = ("a red circle", "a blue cross")


@pytest.fixture(scope="module")
def folder(tiny_xl_pipeline: Path) -> Path:
    return tiny_xl_pipeline


def stock(folder: Path) -> StableDiffusionXLPipeline:
    """Plain diffusers."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_knows_its_sizes_and_conditions(folder: Path) -> None:
    """Those that the stock pipeline makes of the same prompts, with zeros in the unconditional branch."""
    backbone = load_backbone(str(folder))
    assert (backbone.denoiser, backbone.latent_shape, backbone.image_size()) == ("unet", (4, 4, 4), (32, 32))
    assert list(backbone.identities()) == ["unet", "text_encoder", "text_encoder_2", "vae"]
    condition = backbone.load_encoder().encode(PROMPTS)
    assert {name: tuple(tensor.shape) for name, tensor in condition.tensors.items()} == backbone.condition_shapes(2)
    text, null, pooled, null_pooled = stock(folder).encode_prompt(list(PROMPTS), do_classifier_free_guidance=True)
    assert condition.null_tensors is not None
    for ours, theirs in (
        (condition.tensors["text"], text),
        (condition.tensors["pooled"], pooled),
        (condition.null_tensors["text"], null),
        (condition.null_tensors["pooled"], null_pooled),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert null.abs().max() == 0 and backbone.num_tokens(PROMPTS)[0] == [5, 5]


def test_the_empty_prompt_is_encoded_where_the_pipeline_says_so(tmp_path: Path) -> None:
    folder = make_tiny_xl_pipeline(tmp_path / "pipeline", zero_null=False)
    condition = load_backbone(str(folder)).load_encoder().encode(PROMPTS)
    _, null, _, null_pooled = stock(folder).encode_prompt(list(PROMPTS), do_classifier_free_guidance=True)
    assert condition.null_tensors is not None and null.abs().max() > 0
    torch.testing.assert_close(condition.null_tensors["text"], null, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(condition.null_tensors["pooled"], null_pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_the_pre_trained_model_draws_what_the_stock_pipeline_draws(folder: Path, size: tuple[int, int]) -> None:
    """Deterministic steps with guidance, from the same noise; the sizes that the UNet is told are those of the image."""
    height, width = size
    ours = ControlledPipeline.from_base_model(str(folder))
    ours.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "eta": 0.0, "output_type": "pt"}
    arguments |= {"height": height, "width": width}
    found = ours(PROMPTS, latents=noise, **arguments).images
    pipe = stock(folder)
    pipe.scheduler = DDIMScheduler.from_config(ours.policy.backbone.scheduler_config())
    theirs = pipe(list(PROMPTS), latents=noise.clone(), **arguments).images
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
    text, null, pooled, null_pooled = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=True)
    embeds = {"prompt_embeds": text, "pooled_prompt_embeds": pooled}
    embeds |= {"negative_prompt_embeds": null, "negative_pooled_prompt_embeds": null_pooled}
    again = ours(latents=noise, **embeds, **arguments).images
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-5)


def test_pooled_embeddings_are_asked_for(folder: Path, tiny_pipeline: Path) -> None:
    """And are too many for Stable Diffusion 1.x."""
    text, pooled = torch.zeros(1, 16, 32), torch.zeros(1, 16)
    xl, sd = (ControlledPipeline.from_base_model(str(place)) for place in (folder, tiny_pipeline))
    with pytest.raises(ConfigError, match="give pooled_prompt_embeds"):
        xl(prompt_embeds=text)
    with pytest.raises(ConfigError, match="take no pooled embeddings"):
        sd(prompt_embeds=torch.zeros(1, 16, 16), pooled_prompt_embeds=pooled)
    with pytest.raises(ConfigError, match="given without negative_prompt_embeds"):
        xl(prompt_embeds=text, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled)


def given(folder: Path) -> tuple[Tensor, Tensor, Any]:
    """Latents, a time and a condition of two samples."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    return latents, torch.tensor(401), load_backbone(str(folder)).load_encoder().encode(PROMPTS)


@pytest.mark.parametrize("kind", ["embedding", "gains"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(5.0)])
def test_the_policy_is_the_reference_at_the_start(folder: Path, kind: Any, guidance: Guidance) -> None:
    """Bit for bit, and not when it has moved."""
    policy = make_policy(folder, COUNTS, lora=LoraConfig(rank=2, alpha=2.0), kind=kind)
    latents, time, condition = given(folder)
    inputs = Inputs(condition, torch.tensor([[0, 1], [2, 0]]), guidance)
    check_start(policy, latents, time, inputs)


@pytest.mark.full
@torch.no_grad()
def test_an_adapter_comes_back_and_its_classes_are_loras_of_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    """Label gains: the stock UNet with a class's file predicts what the policy does with that label."""
    lora = LoraConfig(rank=2, alpha=2.0)
    policy = moved(make_policy(folder, COUNTS, lora=lora, kind="gains"), by=0.1, seed=3)
    info = make_adapter_info(
        base_model=str(folder),
        base_revision=None,
        controls=CONTROLS,
        sampler=SamplerConfig(num_steps=3, guidance_scale=5.0),
        lora=lora,
        kind="gains",
        training={},
    )
    save_adapter(tmp_path, policy, info)
    latents, time, condition = given(folder)
    again = make_policy(folder, COUNTS, lora=lora, kind="gains")
    load_into_policy(tmp_path, again)
    pipe = stock(folder)
    pipe.load_lora_weights(tmp_path / "classes", weight_name="size=2.safetensors")
    inputs = Inputs(condition, torch.tensor([[2, 2], [2, 2]]))
    ours = policy(latents, time, inputs, reference=False).prediction
    assert torch.equal(again(latents, time, inputs, reference=False).prediction, ours)
    added = {"text_embeds": condition.tensors["pooled"], "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    theirs = pipe.unet(latents, time, encoder_hidden_states=condition.tensors["text"], added_cond_kwargs=added).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert "StableDiffusionXLPipeline.from_pretrained" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: edit_json(base / "unet" / "config.json", addition_embed_type=None), "addition_embed_type None"),
        (lambda base: edit_json(base / "unet" / "config.json", in_channels=9), "9 channels in and 4 out"),
        (lambda base: edit_json(base / "text_encoder" / "config.json", hidden_size=24), "made of several models"),
        (lambda base: edit_json(base / "text_encoder_2" / "config.json", projection_dim=12), "made of several models"),
        (lambda base: shutil.rmtree(base / "tokenizer_2"), "lacks its tokenizer"),
        (
            lambda base: (base / "text_encoder_2" / "config.json").unlink(),
            r"text_encoder_2/config\.json does not exist",
        ),
    ],
)
def test_what_is_not_whole_or_of_another_family(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    base = shutil.copytree(folder, tmp_path / "pipeline")
    damage(base)
    with pytest.raises(ModelError, match=message):
        load_backbone(str(base))
