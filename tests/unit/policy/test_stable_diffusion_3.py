"""Stable Diffusion 3 on a small pipeline of random weights: what it says of itself, and the stock pipeline beside it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

import ctrl_ray
from ctrl_ray import ControlledPipeline
from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import load_into_policy, make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.pipeline_sampler import PipelineSampler
from ctrl_ray.policy.protocol import Inputs
from tests.configs import tiny_run
from tests.families import check_rows_of_adapted_layers, check_start, check_stock_flow_draws
from tests.policies import make_policy, moved
from tests.tiny import edit_json, make_tiny_3_pipeline

CONTROLS = {"size": ControlConfig(classes=("a", "b", "c")), "hue": ControlConfig(classes=("x", "y"))}
COUNTS = {name: control.num_classes for name, control in CONTROLS.items()}
PROMPTS = ("a red circle", "a blue cross")
LORA = LoraConfig(rank=2, alpha=2.0, target_modules=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj"))


@pytest.fixture(scope="module")
def folder(tiny_3_pipeline: Path) -> Path:
    return tiny_3_pipeline


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_3_pipeline(tmp_path_factory.mktemp("no_t5") / "pipeline", t5=False)


def stock(folder: Path, **parts: Any) -> StableDiffusion3Pipeline:
    """Plain diffusers."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("t5", [True, False])
def test_it_knows_its_sizes_and_conditions(folder: Path, without_t5: Path, t5: bool) -> None:
    """Those that the stock pipeline makes of the same prompts, with a T5 and without."""
    place = folder if t5 else without_t5
    nothing: dict[str, Any] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    backbone = load_backbone(str(place))
    assert (backbone.denoiser, backbone.latent_shape, backbone.image_size()) == ("transformer", (4, 4, 4), (32, 32))
    encoders = ["text_encoder", "text_encoder_2", *(["text_encoder_3"] if t5 else [])]
    assert list(backbone.identities()) == ["transformer", *encoders, "vae"]
    condition = backbone.load_encoder().encode(PROMPTS)
    assert {name: tuple(tensor.shape) for name, tensor in condition.tensors.items()} == backbone.condition_shapes(2)
    text, null, pooled, null_pooled = stock(place, **nothing).encode_prompt(
        list(PROMPTS), list(PROMPTS), list(PROMPTS), do_classifier_free_guidance=True
    )
    assert condition.null_tensors is not None
    for ours, theirs in (
        (condition.tensors["text"], text),
        (condition.tensors["pooled"], pooled),
        (condition.null_tensors["text"], null),
        (condition.null_tensors["pooled"], null_pooled),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)  # one prompt at a time, and two
    assert backbone.loading_options == "".join(f", {name}=None" for name in nothing)
    assert backbone.load_pipeline().text_encoder_3 is None or t5
    lengths, most = backbone.num_tokens(PROMPTS)
    assert most == (256 if t5 else 16) and lengths == ([4, 4] if t5 else [5, 5])


def test_it_draws_sizes_and_reads_texts_of_the_samplers_length(folder: Path, without_t5: Path) -> None:
    """Images that are not square, and as many tokens as the stock pipeline makes of the same number."""
    sampler = SamplerConfig(num_steps=2, height=32, width=48, max_sequence_length=8)
    for place, nothing in ((folder, {}), (without_t5, {"text_encoder_3": None, "tokenizer_3": None})):
        backbone = load_backbone(str(place), sampler=sampler)
        assert (backbone.latent_shape, backbone.image_size()) == ((4, 4, 6), (32, 48))
        condition = backbone.load_encoder().encode(PROMPTS)
        assert {name: tuple(tensor.shape) for name, tensor in condition.tensors.items()} == backbone.condition_shapes(2)
        text = stock(place, **nothing).encode_prompt(list(PROMPTS), None, None, max_sequence_length=8)[0]
        torch.testing.assert_close(condition.tensors["text"], text, rtol=1e-4, atol=2e-5)
    backbone = load_backbone(str(folder), sampler=sampler)
    assert backbone.num_tokens(PROMPTS)[1] == 8
    in_float32, on_gpu = (backbone.encoder_bytes(on_gpu=on_gpu) for on_gpu in (False, True))
    encoders = [part for part in backbone.load_encoder().parts.values() if isinstance(part, nn.Module)]
    assert in_float32 == 4 * sum(p.numel() for encoder in encoders for p in encoder.parameters())
    assert in_float32 - on_gpu == 2 * sum(p.numel() for p in encoders[-1].parameters())  # the T5
    images, _ = next(PipelineSampler(dataclasses.replace(tiny_run(folder), sampler=sampler), PROMPTS)(3, 0))
    assert images.shape == (3, 32, 48, 3)
    with pytest.raises(ConfigError, match=r"sampler\.width is 40, but base model .* multiples of 16 pixels; give one"):
        load_backbone(str(folder), sampler=SamplerConfig(height=32, width=40))


def test_its_chain_is_the_flows(folder: Path) -> None:
    """Shifted once by the pipeline's 3; an adapter's own schedule in its place; the last step is the reference's."""
    backbone = load_backbone(str(folder))
    kernel = backbone.make_kernel(SamplerConfig(num_steps=4, reference_steps=1))
    assert [float(kernel.time(k)) for k in range(4)] == pytest.approx([1000, 900, 750, 500])
    assert [kernel.controlled(k) for k in range(4)] == [True, True, True, False]
    other = backbone.make_kernel(SamplerConfig(num_steps=4), {**backbone.scheduler_config(), "shift": 1.0})
    assert [float(other.time(k)) for k in range(4)] == pytest.approx([1000, 750, 500, 250])
    assert backbone.make_kernel(SamplerConfig(num_steps=4, flow_sde="cps", eta=0.5)).std(0) != kernel.std(0)


def test_another_family_has_no_flow(tiny_pipeline: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.flow_sde is 'cps'.*was not trained by flow matching"):
        load_backbone(str(tiny_pipeline)).make_kernel(SamplerConfig(flow_sde="cps"))


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
    if eta:
        pipe.scheduler = ctrl_ray.AncestralFlowScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.generator = torch.Generator().manual_seed(1)
    else:
        arguments_of_ode = {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    found = ours(PROMPTS, latents=noise, eta=eta, generator=torch.Generator().manual_seed(1), **arguments).images
    extra = {} if eta else arguments_of_ode
    theirs = pipe(list(PROMPTS), latents=noise.clone(), **arguments, **extra).images
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def given(folder: Path) -> tuple[Tensor, Tensor, Any]:
    """Latents, a time and a condition of two samples."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    return latents, torch.tensor(750.0), load_backbone(str(folder)).load_encoder().encode(PROMPTS)


@pytest.mark.parametrize("kind", ["embedding", "gains"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(5.0)])
def test_the_policy_is_the_reference_at_the_start(folder: Path, kind: Any, guidance: Guidance) -> None:
    """Bit for bit, and not when it has moved."""
    policy = make_policy(folder, COUNTS, lora=LORA, kind=kind)
    latents, time, condition = given(folder)
    inputs = Inputs(condition, torch.tensor([[0, 1], [2, 0]]), guidance)
    check_start(policy, latents, time, inputs)


def test_rows_of_adapted_layers_are_samples_or_tokens(folder: Path) -> None:
    check_rows_of_adapted_layers(folder)


@pytest.mark.full
@torch.no_grad()
def test_an_adapter_comes_back_and_its_classes_are_loras_of_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    """Label gains: with a class's file the stock transformer predicts what the policy does with that label; with our scheduler,
    and the LoRA off in the last step, the stock pipeline draws the policy's images."""
    policy = moved(make_policy(folder, COUNTS, lora=LORA, kind="gains"), by=0.1, seed=3)
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
    again = make_policy(folder, COUNTS, lora=LORA, kind="gains")
    load_into_policy(tmp_path, again)
    latents, time, condition = given(folder)
    inputs = Inputs(condition, torch.tensor([[2, 2], [2, 2]]))
    ours = policy(latents, time, inputs, reference=False).prediction
    assert torch.equal(again(latents, time, inputs, reference=False).prediction, ours)
    pipe = stock(folder)
    pipe.load_lora_weights(tmp_path / "classes", weight_name="size=2.safetensors")
    theirs = pipe.transformer(
        hidden_states=latents,
        timestep=time.expand(2),
        encoder_hidden_states=condition.tensors["text"],
        pooled_projections=condition.tensors["pooled"],
    ).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    check_stock_flow_draws(pipe, tmp_path, policy, sampler, inputs, latents)
    readme = (tmp_path / "README.md").read_text()
    assert "ctrl_ray.AncestralFlowScheduler.from_config" in readme and "eta=1, sde='ancestral'" in readme
    assert "StableDiffusion3Pipeline.from_pretrained" in readme and "DDIM" not in readme


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: edit_json(base / "transformer" / "config.json", in_channels=9), "9 channels in and 4 out"),
        (lambda base: edit_json(base / "text_encoder" / "config.json", projection_dim=24), "made of several models"),
        (lambda base: edit_json(base / "text_encoder_3" / "config.json", d_model=48), "made of several models"),
        (lambda base: shutil.rmtree(base / "tokenizer_3"), "lacks its tokenizer"),
        (
            lambda base: edit_json(base / "scheduler" / "scheduler_config.json", use_beta_sigmas=True),
            "by use_beta_sigmas",
        ),
        (lambda base: edit_json(base / "scheduler" / "scheduler_config.json", shift=-1.0), "make no flow"),
        (
            lambda base: (base / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": 1000}'),
            "no shift of a flow",
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
