"""The flow's scheduler against the kernel, in a stock Stable Diffusion 3 pipeline, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import ctrl_ray
from ctrl_ray import AncestralFlowScheduler
from ctrl_ray.diffusion.flow import FlowKernel, dynamic_shift, flow_sigmas
from ctrl_ray.diffusion.steps import ModelOutput
from ctrl_ray.errors import ConfigError

NO_TEXT: dict[str, Any] = dict.fromkeys(
    ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
)


def make_pipeline(scheduler: Any) -> StableDiffusion3Pipeline:
    """Random weights, 8 × 8 latents, no text encoders: prompts come as embeddings."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    ).eval()
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, **_blocks(2)).eval()
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=scheduler, **NO_TEXT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _blocks(count: int) -> dict[str, Any]:
    return {"down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count}


def latents_of(pipe: StableDiffusion3Pipeline, **changes: Any) -> torch.Tensor:
    """What the stock pipeline draws, from fixed noise, prompt and guidance."""
    generator = torch.Generator().manual_seed(1)
    text, pooled, null, null_pooled = (
        torch.randn(2, *shape, generator=generator) for shape in ((5, 16), (12,), (5, 16), (12,))
    )
    found: torch.Tensor = pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=null,
        negative_pooled_prompt_embeds=null_pooled,
        latents=torch.randn(2, 4, 8, 8, generator=generator),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        **changes,
    ).images
    return found


def test_its_steps_are_the_kernels() -> None:
    """Mean, noise and times, for every SDE; the last step adds nothing."""
    for sde, eta in (("ancestral", 1.0), ("cps", 0.8), ("flow_grpo", 0.7), ("constant", 0.4)):
        scheduler = AncestralFlowScheduler(shift=3.0, sde=sde, eta=eta)  # type: ignore[arg-type]
        scheduler.set_timesteps(5)
        kernel = FlowKernel(flow_sigmas(5, shift=3.0), sde=sde, eta=eta)  # type: ignore[arg-type]
        x, v, z = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        for k, time in enumerate(scheduler.timesteps):
            assert time == kernel.time(k)
            expected = kernel.step(k, x, ModelOutput(v))
            (found,) = scheduler.step(v, time, x, variance_noise=z, return_dict=False)
            torch.testing.assert_close(found, expected.mean + expected.std * z, rtol=0, atol=0)
            x = found
        assert scheduler.step_index == 5


def test_a_stock_pipeline_draws_with_it_and_keeps_it(tmp_path: Path) -> None:
    """From the config of the scheduler that Stable Diffusion 3 comes with. The seed decides the noise, and is saved with the
    pipeline; a generator of one's own comes before it; at η = 0 the images are those of the usual ODE sampler."""
    usual = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = make_pipeline(AncestralFlowScheduler.from_config(usual.config, seed=7))
    assert pipe.scheduler.config.shift == 3.0
    drawn = latents_of(pipe)
    assert torch.equal(latents_of(pipe), drawn), "the noise starts anew with each call"
    pipe.save_pretrained(tmp_path)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, **NO_TEXT)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, ctrl_ray.AncestralFlowScheduler)
    assert torch.equal(latents_of(again), drawn)
    pipe.scheduler.generator = torch.Generator().manual_seed(7)
    assert torch.equal(latents_of(pipe), drawn)
    assert not torch.equal(latents_of(pipe), drawn), "it went on"
    pipe.scheduler = AncestralFlowScheduler.from_config(usual.config, eta=0.0)
    pipe_usual = make_pipeline(usual)
    even = [1.0, 0.75, 0.5, 0.25]  # with a number of steps alone it ends where the shift was applied twice
    torch.testing.assert_close(
        latents_of(pipe),
        latents_of(
            pipe_usual,
            sigmas=even,
        ),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_shift_by_the_number_of_tokens() -> None:
    """As FLUX has it: mu is given with the steps."""
    scheduler = AncestralFlowScheduler(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="no mu was given"):
        scheduler.set_timesteps(4)
    scheduler.set_timesteps(4, mu=0.63)
    usual = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    usual.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.63)
    torch.testing.assert_close(scheduler.sigmas, usual.sigmas)
    torch.testing.assert_close(scheduler.timesteps, usual.timesteps)
    assert dynamic_shift(1024) == pytest.approx(float(torch.tensor(0.63).exp()))


def test_images_are_noised_to_a_step() -> None:
    """(1 − σ) x + σ ε, and a pipeline may begin there."""
    scheduler = AncestralFlowScheduler()
    scheduler.set_timesteps(4)
    image, noise = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 3.0)
    found = scheduler.scale_noise(image, scheduler.timesteps[[1, 3]], noise)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.25 + 0.75 * 3, 0.75 + 0.25 * 3]))
    scheduler.set_begin_index(2)
    scheduler.step(image, scheduler.timesteps[2], image, variance_noise=noise)
    assert (scheduler.begin_index, scheduler.step_index) == (2, 3)


def test_what_it_is_not_given() -> None:
    scheduler = AncestralFlowScheduler()
    with pytest.raises(ConfigError, match="neither num_inference_steps nor sigmas"):
        scheduler.set_timesteps()
    scheduler.set_timesteps(4)
    with pytest.raises(ConfigError, match="timestep 12 is not one of this scheduler's"):
        scheduler.step(torch.zeros(1), 12, torch.zeros(1))
