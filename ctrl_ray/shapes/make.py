"""Make the embedded default pipeline `shapes` from nothing but its own drawings.

    python -m ctrl_ray.shapes.make --output-dir ctrl_ray/shapes --seed 0

Stages, each of which reads the files of those before it: `vae`; `recogniser`, which needs none; `unet`, the text
encoder with it; `figures`, which samples what the others made. Takes about 45 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctrl_ray.embedded import FOLDER
from ctrl_ray.evaluation.recogniser import Recogniser
from ctrl_ray.offline.shapes import PROMPTS, parse_prompt
from ctrl_ray.oracles import ORACLES
from ctrl_ray.shapes.figures import plot, record, to_pil
from ctrl_ray.shapes.training import augment, draw_tensors, to_model_range, train

SAMPLING: dict[str, Any] = {"num_inference_steps": 10, "eta": 1.0, "guidance_scale": 1.0}
"""The setting that everything later uses: ten stochastic DDIM steps, no classifier-free guidance."""

MAX_PROMPT_TOKENS = 8
"""Start, three words, end, and three more, which a word in pieces takes up."""

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
    parser.add_argument("--num-samples", type=int, default=4096)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="train the UNet in bfloat16"
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


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Sampled latents of uint8 images, before scaling."""
    chunks = [vae.encode(to_model_range(chunk)).latent_dist.sample(generator) for chunk in images.split(256)]
    return torch.cat(chunks)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocabulary and merges that turn a word of the prompts into one token, any other into its bytes.

    "green" stays in four pieces, because the "re" of "red" is merged first. It fits: no prompt has over 8 tokens.
    """
    alphabet = list(bytes_to_unicode().values())
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word for prompt in PROMPTS for word in prompt.split(" ")):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_PROMPT_TOKENS)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 64."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


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
    generator = torch.Generator().manual_seed(args.seed)
    images, prompts = draw_tensors(args.num_latents, args.seed)
    latents = encode(vae, images, generator) * vae.config.scaling_factor
    del images
    token_ids = tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
    prompt_index = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    modules = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    batch_size = 64

    def loss_of() -> Tensor:
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < 0.1
        prompt = torch.where(dropped, len(PROMPTS), prompt_index[chosen])
        noise = torch.randn(latents[chosen].shape, generator=generator)
        # Stratified: one timestep in each of batch_size equal intervals. It takes noise out of the loss.
        strata = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        timesteps = (strata * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(latents[chosen], noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            states = modules["text_encoder"](token_ids).last_hidden_state[prompt]
            prediction = modules["unet"](noisy, timesteps, states).sample
        return F.mse_loss(prediction.float(), scheduler.get_velocity(latents[chosen], noise, timesteps))

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

    ema, curve = train(
        modules, loss_of, num_updates=args.unet_updates, learning_rate=1.5e-3, ema_decay=0.999, name="unet",
        save=save, save_every=1000,
    )  # fmt: skip
    save(ema)
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in ema.items()}
    return {"curve": curve, "parameters": parameters, "latents_std": latents.std().item()}


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


@torch.no_grad()
def sample(folder: Path, num_images: int, seed: int) -> tuple[Tensor, list[str]]:
    """Images (N, 3, 64, 64) in [0, 1] of random prompts, with the setting that everything uses, and the prompts."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)  # as float32
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    prompts = [PROMPTS[index] for index in torch.randint(len(PROMPTS), (num_images,), generator=generator).tolist()]
    chunks = [
        pipeline(prompts[i : i + 64], generator=generator, output_type="pt", height=64, width=64, **SAMPLING).images
        for i in range(0, num_images, 64)
    ]
    return torch.cat(chunks).float(), prompts


def make_figures(args: argparse.Namespace) -> dict[str, Any]:
    """Sample the pipeline; write how often it obeys its prompts and how its controls are spread, and the picture."""
    images, prompts = sample(args.output_dir / "pipeline", args.num_samples, args.seed)
    right = Recogniser.from_pretrained(args.output_dir / "recogniser").is_right(images, prompts)
    pictures = to_pil(images)
    figures: dict[str, Any] = {
        "num_samples": args.num_samples,
        "prompt_accuracy": right.float().mean().item(),
        **SAMPLING,
    }
    measured = {name: np.array([oracle(picture) for picture in pictures]) for name, oracle in ORACLES.items()}
    for name, values in measured.items():
        figures[name] = {f"p{rank:02d}": round(float(np.percentile(values, rank)), 2) for rank in (5, 25, 50, 75, 95)}
    by_prompt = {
        prompt: measured["jpeg_size"][[theirs == prompt for theirs in prompts]] for prompt in sorted(set(prompts))
    }
    figures["jpeg_size_quartiles_of_each_prompt"] = {
        prompt: [round(float(value)) for value in np.percentile(sizes, (25, 50, 75))]
        for prompt, sizes in by_prompt.items()
    }
    plot(args.output_dir, args.pictures_dir / "training.png", pictures, measured)
    return figures


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "vae": make_vae,
    "recogniser": make_recogniser,
    "unet": make_unet,
    "figures": make_figures,
}
"""The stages in their order."""


if __name__ == "__main__":
    main()
