"""Make the embedded default pipeline `shapes` from nothing but its own drawings.

    python -m ctrl_ray.shapes.make --output-dir ctrl_ray/shapes --seed 0

Stages, each of which reads the files of those before it: `vae`; `recogniser`, which needs none; `unet`, the text
encoder with it; `flow`, the same for the other pipeline, `shapes-flow`; `figures` and `flow_figures`, which sample what
the others made. Takes about 45 minutes on two CPU cores, and `flow` as much again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ctrl_ray.embedded import FOLDER
from ctrl_ray.evaluation.recogniser import Recogniser
from ctrl_ray.offline.shapes import parse_prompt
from ctrl_ray.shapes.figures import figures_of_samples, record
from ctrl_ray.shapes.flow import make_flow, make_flow_figures
from ctrl_ray.shapes.latents import PromptedLatents, encode
from ctrl_ray.shapes.text import build_text_encoder, build_tokenizer
from ctrl_ray.shapes.training import augment, draw_tensors, to_model_range, train, train_denoiser

SAMPLING: dict[str, Any] = {"num_inference_steps": 10, "eta": 1.0, "guidance_scale": 1.0}
"""The setting that everything later uses: ten stochastic DDIM steps, no classifier-free guidance."""

HELD_OUT = 1
"""Added to the seed of the training images, this gives that of the held-out ones."""


def main() -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    parser.add_argument(
        "--pictures-dir",
        type=Path,
        default=FOLDER.parents[1] / ".github" / "pictures",
        help="training.png is written there",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--num-latents", type=int, default=20_000)
    parser.add_argument("--vae-updates", type=int, default=2400)
    parser.add_argument("--recogniser-updates", type=int, default=1000)
    parser.add_argument("--unet-updates", type=int, default=4500)
    parser.add_argument("--flow-updates", type=int, default=12_000)
    parser.add_argument("--num-samples", type=int, default=4096)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="train the denoisers in bfloat16"
    )
    args = parser.parse_args()
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            torch.manual_seed(args.seed)
            start = time.monotonic()
            figures = stage(args)
            figures["seconds"] = round(time.monotonic() - start)
            record(args.output_dir, name, figures)


def build_vae() -> AutoencoderKL:
    """About 0.9 M parameters; 64x64 pixels to latents of (4, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def make_vae(args: argparse.Namespace) -> dict[str, Any]:
    """Train the autoencoder on L1 plus a trace of KL, and set `scaling_factor` to give latents unit variance."""
    images, _ = draw_tensors(args.num_images, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    folder = args.output_dir / "pipeline" / "vae"

    def loss_of() -> Tensor:
        batch = to_model_range(images[torch.randint(len(images), (32,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - batch
        return error.abs().mean() + error.square().mean() + 2e-6 * posterior.kl().float().mean()

    def save(module: AutoencoderKL) -> None:
        copy.deepcopy(module).half().save_pretrained(folder)

    vae = build_vae()
    ema, curve = train(
        vae, loss_of, num_updates=args.vae_updates, learning_rate=2e-3, ema_decay=0.998, name="vae",
        save=save, save_every=400,
    )  # fmt: skip
    latents = encode(ema, images[:2000], torch.Generator().manual_seed(args.seed))
    ema.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    save(ema)
    held_out, _ = draw_tensors(1000, args.seed + HELD_OUT)
    with torch.no_grad():
        decoded = ema.decode(ema.encode(to_model_range(held_out)).latent_dist.mode()).sample
    error = (decoded - to_model_range(held_out)).abs().mean().item()
    return {"curve": curve, "held_out_l1": error, "scaling_factor": ema.config.scaling_factor}


def build_unet() -> UNet2DConditionModel:
    """About 2 M parameters on latents of (4, 8, 8)."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, v-prediction, trailing timesteps (the first step is at pure noise)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # unused by trailing timesteps; the pipeline warns at any other
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def make_unet(args: argparse.Namespace) -> dict[str, Any]:
    """Train UNet and text encoder together on v-prediction, one prompt in ten dropped, and write the pipeline."""
    folder = args.output_dir / "pipeline"
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
    tokenizer = build_tokenizer(folder / "tokenizer")
    scheduler = build_scheduler()
    data = PromptedLatents(vae, args.num_latents, args.seed)
    token_ids = data.token_ids(tokenizer)
    modules = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer, CLIPTextModel)})

    def loss_of() -> Tensor:
        batch = data.batch(64)
        timesteps = (batch.quantiles * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(batch.latents, batch.noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            states = modules["text_encoder"](token_ids).last_hidden_state[batch.prompts]
            prediction = modules["unet"](noisy, timesteps, states).sample
        return F.mse_loss(prediction.float(), scheduler.get_velocity(batch.latents, batch.noise, timesteps))

    def save(ema: nn.ModuleDict) -> None:
        StableDiffusionPipeline(
            vae=copy.deepcopy(vae).half(),
            # float32: transformers 5 keeps the dtype it finds, and diffusers would then mix it with a float32 UNet.
            text_encoder=copy.deepcopy(ema["text_encoder"]),
            tokenizer=tokenizer,
            unet=copy.deepcopy(ema["unet"]).half(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)

    figures = train_denoiser(modules, loss_of, save, num_updates=args.unet_updates, learning_rate=1.5e-3, name="unet")
    return {**figures, "latents_std": data.latents.std().item()}


def make_recogniser(args: argparse.Namespace) -> dict[str, Any]:
    """Train the recogniser on drawn images with mild blur and noise."""
    images, prompts = draw_tensors(args.num_images, args.seed)
    recogniser = Recogniser()
    pairs = [parse_prompt(prompt) for prompt in prompts]
    colours = torch.tensor([recogniser.colours.index(colour) for colour, _ in pairs])
    shapes = torch.tensor([recogniser.shapes.index(shape) for _, shape in pairs])
    generator = torch.Generator().manual_seed(args.seed)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(images), (64,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            colour_logits, shape_logits = recogniser(augment(images[chosen].float() / 255.0, generator))
        return F.cross_entropy(colour_logits.float(), colours[chosen]) + F.cross_entropy(
            shape_logits.float(), shapes[chosen]
        )

    ema, curve = train(
        recogniser, loss_of, num_updates=args.recogniser_updates, learning_rate=2e-3, ema_decay=0.995,
        name="recogniser",
    )  # fmt: skip
    ema.save_pretrained(args.output_dir / "recogniser")
    shipped = Recogniser.from_pretrained(args.output_dir / "recogniser")
    held_out, held_out_prompts = draw_tensors(2000, args.seed + HELD_OUT)
    right = shipped.is_right(held_out.float() / 255.0, held_out_prompts).float().mean().item()
    return {"curve": curve, "held_out_accuracy": right}


def make_figures(args: argparse.Namespace) -> dict[str, Any]:
    """Sample the pipeline; write how often it obeys its prompts and how its controls are spread, and the picture."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        args.output_dir / "pipeline", local_files_only=True
    )  # as float32
    return {**figures_of_samples(pipeline, SAMPLING, args, "unet", "training.png"), **SAMPLING}


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "vae": make_vae,
    "recogniser": make_recogniser,
    "unet": make_unet,
    "flow": make_flow,
    "figures": make_figures,
    "flow_figures": make_flow_figures,
}
"""The stages in their order."""


if __name__ == "__main__":
    main()
