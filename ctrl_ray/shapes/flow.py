"""The stage of `ctrl_ray.shapes.make` that trains `shapes-flow`: a small Stable Diffusion 3."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from ctrl_ray import embedded
from ctrl_ray.policy.flow_scheduler import AncestralFlowScheduler
from ctrl_ray.shapes.figures import figures_of_samples, prompt_accuracy, sample
from ctrl_ray.shapes.latents import PromptedLatents
from ctrl_ray.shapes.text import build_text_encoder, build_tokenizer
from ctrl_ray.shapes.training import train_denoiser

WIDTHS = (32, 64)
"""Of the two text encoders."""
ZEROS = embedded.FLOW_TEXT_TOKENS
"""Tokens in the place of a T5's, which the pipeline does not have."""

CALL: dict[str, Any] = {"guidance_scale": 1.0, "max_sequence_length": ZEROS}
"""Of the stock pipeline, besides the number of steps."""
NUM_STEPS = 10
"""Of the preset."""
OTHER_NUMS_STEPS = (5, 10, 20, 50)
"""At which the ancestral chain and the ODE are compared."""


def build_transformer() -> SD3Transformer2DModel:
    """About 2.9 M parameters on latents of (4, 8, 8), in 16 tokens of four places each."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=36,
        num_attention_heads=4,
        caption_projection_dim=144,
        joint_attention_dim=sum(WIDTHS),
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def make_flow(args: argparse.Namespace) -> dict[str, Any]:
    """Train transformer and text encoders together on the velocity, one prompt in ten dropped, and write the pipeline."""
    folder = args.output_dir / embedded.FLOW_PIPELINE.name
    vae = AutoencoderKL.from_pretrained(args.output_dir / embedded.PIPELINE.name / "vae").eval().requires_grad_(False)
    vae.register_to_config(shift_factor=0.0)  # the pipeline subtracts one
    tokenizer = build_tokenizer(folder / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    data = PromptedLatents(vae, args.num_latents, args.seed)
    token_ids = data.token_ids(tokenizer)
    first, second = (build_text_encoder(tokenizer, CLIPTextModelWithProjection, width) for width in WIDTHS)
    modules = nn.ModuleDict({"transformer": build_transformer(), "text_encoder": first, "text_encoder_2": second})

    def loss_of() -> Tensor:
        batch = data.batch(64)
        sigmas = scheduler.sigmas[(batch.quantiles * len(scheduler.sigmas)).long()]
        at = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - at) * batch.latents + at * batch.noise
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            encoded = [
                modules[name](token_ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")
            ]
            text = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
            text = F.pad(text, (0, 0, 0, ZEROS))
            pooled = torch.cat([each.text_embeds for each in encoded], dim=-1)
            velocity = modules["transformer"](
                hidden_states=noisy,
                timestep=sigmas * scheduler.config.num_train_timesteps,
                encoder_hidden_states=text[batch.prompts],
                pooled_projections=pooled[batch.prompts],
            ).sample
        return F.mse_loss(velocity.float(), batch.noise - batch.latents)

    def save(ema: nn.ModuleDict) -> None:
        StableDiffusion3Pipeline(
            vae=copy.deepcopy(vae).half(),
            # float32: transformers 5 keeps the dtype it finds, and diffusers would then mix it with a float32 transformer.
            text_encoder=copy.deepcopy(ema["text_encoder"]),
            text_encoder_2=copy.deepcopy(ema["text_encoder_2"]),
            text_encoder_3=None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=None,
            transformer=copy.deepcopy(ema["transformer"]).half(),
            scheduler=scheduler,
        ).save_pretrained(folder, safe_serialization=True)

    figures = train_denoiser(modules, loss_of, save, num_updates=args.flow_updates, learning_rate=2e-3, name="flow")
    return {**figures, "latents_std": data.latents.std().item()}


def make_flow_figures(args: argparse.Namespace) -> dict[str, Any]:
    """Sample the pipeline with noise at every step, as the preset does; and both ways at several numbers of steps."""
    folder = args.output_dir / embedded.FLOW_PIPELINE.name
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    ode = pipeline.scheduler
    pipeline.scheduler = ancestral = AncestralFlowScheduler.from_config(ode.config, seed=args.seed)
    figures = figures_of_samples(
        pipeline, {**CALL, "num_inference_steps": NUM_STEPS}, args, "flow", "flow_training.png"
    )
    figures |= {"num_inference_steps": NUM_STEPS, **CALL}
    for name, pipeline.scheduler in (("ancestral", ancestral), ("ode", ode)):
        figures[f"prompt_accuracy_{name}"] = {
            str(steps): prompt_accuracy(
                *sample(pipeline, args.num_samples // 4, args.seed, {**CALL, "num_inference_steps": steps}), args
            )
            for steps in OTHER_NUMS_STEPS
        }
    return figures
