"""Named starting points: each returns a whole configuration. No torch and no ray here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ctrl_ray import embedded
from ctrl_ray.config import (
    AdapterConfig,
    ClassifierConfig,
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.errors import ConfigError

DEFAULT_PRESET = "shapes"
"""Where the main job and sweeps start when no preset is given."""

JPEG_SIZE_THRESHOLDS = (2677.0, 3218.0, 3622.0)
"""Bytes. Quartiles of the JPEG size under the shipped pipeline (10 steps, eta 1, no guidance)."""

COLOURFULNESS_THRESHOLDS = (67.0,)
"""Hasler-Süsstrunk units. Median colourfulness under the shipped pipeline."""

ANIMALS = Path(embedded.__file__).with_name("prompts") / "animals.txt"
"""45 common animals, one a line: what the paper's experiments are trained on."""

ANIMALS_HELD_BACK = ANIMALS.with_name("animals_held_back.txt")
"""15 other animals, which training never sees."""

CLIP_MODEL = "openai/clip-vit-large-patch14"
"""The paper's judge of prompts, and what its aesthetic classifier looks at images through."""

AESTHETIC_HEAD = "aesthetic.safetensors"
"""Where `paper-multi-task` looks for the head that scores beauty (`ctrl_ray.classifiers.clip_head`): the working directory."""

_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
"""A small denoiser has few attention layers. LoRA on its convolutions alone comes as near as on every layer, in four fifths
of the time."""

_JOINT_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention over image and text of Stable Diffusion 3, both sides' projections."""

_EVERY_LAYER = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *(*_CONVOLUTIONS, "time_emb_proj", "linear_1", "linear_2"),
)


def shapes() -> TrainConfig:
    """The built-in example, and the default: a small pipeline, controlled by its JPEG-size class. Minutes on two CPU cores."""
    return TrainConfig(
        output_dir="runs/shapes",
        base_model=embedded.NAME,
        data=embedded.NAME,
        controls={
            "jpeg_size": ControlConfig(
                guidance_strength=4.0,
                oracle="jpeg_size",
                thresholds=JPEG_SIZE_THRESHOLDS,
                unit="bytes",
                classifier=str(embedded.CLASSIFIER),
            )
        },
        classifier=ClassifierConfig(num_pipeline_samples=2000),
        sampler=SamplerConfig(num_steps=10, eta=1.0, guidance_scale=1.0, reference_steps=1),
        num_updates=200,
        global_batch_size=8,  # many small updates come nearer than few large ones
        micro_batch_size_per_worker=8,
        label_draws="systematic",
        adapter=AdapterConfig(kind="gains"),
        lora=LoraConfig(rank=8, alpha=8.0, target_modules=_CONVOLUTIONS),
        estimator=EstimatorConfig(name="full", keep_graphs="auto", max_drift=2.0, final_max_drift=20.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, gradient_clipping=20.0, warmup_updates=4, final_learning_rate_fraction=0.0
        ),
        # a batch of one micro-batch has worker and pool compute in turn, so each may take both cores
        rewards=RewardPoolConfig(decode_chunk_size=64, threads_per_actor=2),
        evaluation=EvaluationConfig(every_updates=100),
        checkpoint_every_updates=50,
        scaling=ScalingConfig(num_workers=1, threads_per_worker=2),
    )


def shapes_two_controls() -> TrainConfig:
    """`shapes` with two controls at once: JPEG size and colourfulness, each with its own classifier."""
    base = shapes()
    return dataclasses.replace(
        base,
        output_dir="runs/shapes-two-controls",
        controls={
            **base.controls,
            "colourfulness": ControlConfig(
                guidance_strength=4.0,
                oracle="colourfulness",
                thresholds=COLOURFULNESS_THRESHOLDS,
                unit="units",
            ),
        },
        num_updates=480,
        evaluation=dataclasses.replace(base.evaluation, every_updates=120),
        checkpoint_every_updates=60,
    )


def shapes_flow() -> TrainConfig:
    """`shapes` on the other built-in pipeline, a small Stable Diffusion 3 that was trained by flow matching."""
    base = shapes()
    return dataclasses.replace(
        base,
        output_dir="runs/shapes-flow",
        base_model=embedded.FLOW_NAME,
        sampler=dataclasses.replace(base.sampler, max_sequence_length=embedded.FLOW_TEXT_TOKENS),
        num_updates=480,
        evaluation=dataclasses.replace(base.evaluation, every_updates=240),
        checkpoint_every_updates=80,
        lora=dataclasses.replace(base.lora, target_modules=(*_JOINT_LAYERS, "ff.net.0.proj", "ff.net.2")),
    )


def shapes_exact() -> TrainConfig:
    """`shapes` at guidance_strength = kl_coef = 1 and trained for longer: its samples are those of the true conditional
    p(x|c,y), which `python -m ctrl_ray.verify --pipeline shapes` checks. About an hour on two CPU cores."""
    base = shapes()
    return dataclasses.replace(
        base,
        output_dir="runs/shapes-exact",
        controls={name: dataclasses.replace(c, guidance_strength=1.0) for name, c in base.controls.items()},
        num_updates=400,
        global_batch_size=64,
        micro_batch_size_per_worker=64,
        label_draws="independent",
        adapter=AdapterConfig(kind="embedding"),
        lora=dataclasses.replace(base.lora, target_modules=_EVERY_LAYER),
        estimator=EstimatorConfig(name="full"),
        optimizer=OptimizerConfig(learning_rate=4e-3, embedding_learning_rate=0.08, final_learning_rate_fraction=0.01),
        evaluation=dataclasses.replace(base.evaluation, every_updates=100),
        checkpoint_every_updates=25,
    )


def shapes_cfg() -> TrainConfig:
    """`shapes` by the baseline CFG fine-tuning: same images, LoRA's places and rank, and a label embedding. Choose the
    strength of the label, --sampler.control-scale, on a validation set."""
    return dataclasses.replace(as_cfg(shapes()), output_dir="runs/shapes-cfg")


def as_cfg(config: TrainConfig) -> TrainConfig:
    """A run with CFG fine-tuning in the place of CTRL: the batches, rates and number of updates that suit a small pipeline."""
    return dataclasses.replace(
        config,
        training_method="cfg",
        num_updates=400,
        global_batch_size=64,
        micro_batch_size_per_worker="auto" if config.micro_batch_size_per_worker == "auto" else 64,
        label_draws="independent",
        adapter=AdapterConfig(kind="embedding"),
        estimator=EstimatorConfig(name="full"),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, embedding_learning_rate=2e-2, warmup_updates=4, final_learning_rate_fraction=0.0
        ),
        evaluation=dataclasses.replace(config.evaluation, every_updates=200),
        checkpoint_every_updates=100,
    )


def stable_diffusion() -> TrainConfig:
    """Stable Diffusion 1.5 on GPUs, with the paper's sampler (50 steps, eta 1, CFG 7.5); add --control and --data."""
    return TrainConfig(
        output_dir="runs/stable-diffusion",
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        num_updates=100,
        global_batch_size=256,
        micro_batch_size_per_worker="auto",
        sampler=SamplerConfig(num_steps=50, eta=1.0, guidance_scale=7.5, reference_steps=1),
        lora=LoraConfig(rank=16, alpha=16.0),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        scaling=ScalingConfig(
            num_workers="auto",
            use_gpu=True,
            gpus_per_worker="auto",
            cpus_per_worker=4,
            precision="bf16",
            gradient_checkpointing="auto",
        ),
        # scoring is a few per cent of a worker's operations: spread over all cards it costs least, and a pool on one of them
        # would slow that card, for which all others wait. --rewards.num-actors N puts a pool on shares of the workers' cards
        rewards=RewardPoolConfig(num_actors=0, gpus_per_actor="auto", decode_chunk_size="auto"),
        evaluation=EvaluationConfig(batch_size=16),  # 128 with guidance would take 25 GiB
    )


def sdxl() -> TrainConfig:
    """Stable Diffusion XL on GPUs, at 768 pixels a side; add --control and --data. Decoding 1024 pixels with a gradient takes
    twice the memory, and 512 are fewer than it was trained for."""
    base = stable_diffusion()
    return dataclasses.replace(
        base,
        output_dir="runs/sdxl",
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        sampler=SamplerConfig(num_steps=50, eta=1.0, guidance_scale=5.0, height=768, width=768, reference_steps=1),
        evaluation=dataclasses.replace(base.evaluation, batch_size=8),
    )


def sd35_medium() -> TrainConfig:
    """Stable Diffusion 3.5 medium on GPUs, at 512 pixels a side; add --control and --data. Its 40 steps are those of an ODE,
    but training needs noise. Look at plain samples first (`python -m ctrl_ray.sample --base`), and take more steps if they
    need them."""
    base = stable_diffusion()
    return dataclasses.replace(
        base,
        output_dir="runs/sd3.5-medium",
        base_model="stabilityai/stable-diffusion-3.5-medium",
        sampler=SamplerConfig(num_steps=40, eta=1.0, guidance_scale=4.5, height=512, width=512, reference_steps=1),
        lora=dataclasses.replace(base.lora, target_modules=_JOINT_LAYERS),
        evaluation=dataclasses.replace(base.evaluation, batch_size=8),
    )


def auraflow() -> TrainConfig:
    """AuraFlow on GPUs, at 768 pixels a side; add --control and --data. Look at plain samples first (`python -m ctrl_ray.sample
    --base`): training needs noise at every step, which its own sampler, an ODE, has not."""
    return dataclasses.replace(
        sd35_medium(),
        output_dir="runs/auraflow",
        base_model="fal/AuraFlow-v0.3",
        sampler=SamplerConfig(num_steps=50, eta=1.0, guidance_scale=3.5, height=768, width=768, reference_steps=1),
    )


def paper_compressibility() -> TrainConfig:
    """The paper's single-task experiment: Stable Diffusion 1.5 controlled by the JPEG size of its 512-px images, in four
    classes with borders at 60, 85 and 110 kB (1000 bytes each; Pillow, quality 95). Add --data with labelled images.

    Rates, batch, weight decay, clipping and LoRA's rank are the public code's, and so is the sampler: DDIM, 50 steps, eta 1,
    guidance 7.5 of policy and reference. Four things are not.

    - Its reward and KL weights, 0.1 and 0.01, are an exponent of 10 by the paper's formula; but its KL is the mean over 16,384
      latent dimensions, so that what it trained for was 0.1 · 16384 / 0.01 = 163,840, hardly any KL at all. Here the KL is the
      sum, and the exponent is the 10 that is stated. The weights stay as they were, in place of 10 and 1, because clipping at
      5.0 was chosen for rewards of that size.
    - The gradient goes through all steps. There it is cut off at a random one, which biases it.
    - The pre-trained model takes the last step, which has too little noise to be worth its KL (--sampler.reference-steps 0: the
      policy takes all 50).
    - The released checkpoint has about 18 updates; this run goes on for twice as many, and exports the best.
    """
    base = stable_diffusion()
    return dataclasses.replace(
        base,
        output_dir="runs/paper-compressibility",
        controls={
            "jpeg_size": ControlConfig(
                guidance_strength=0.1, oracle="jpeg_size", thresholds=(60e3, 85e3, 110e3), unit="bytes"
            )
        },
        kl_coef=0.01,
        prompts_file=str(ANIMALS),
        num_updates=36,
        global_batch_size=256,
        lora=LoraConfig(rank=4, alpha=4.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            embedding_learning_rate=1e-2,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.999,
            gradient_clipping=5.0,
            warmup_updates=0,
            final_learning_rate_fraction=1.0,
        ),
        evaluation=dataclasses.replace(
            base.evaluation, every_updates=6, prompts_file=str(ANIMALS_HELD_BACK), clip_model=CLIP_MODEL
        ),
        checkpoint_every_updates=2,
    )


def paper_multi_task() -> TrainConfig:
    """The paper's two controls at once: a JPEG size below or above 70 kB, and an aesthetic score below or above 5.7. Add
    --data, and put the score's head, a linear layer or an MLP on CLIP ViT-L/14 image features, into the file
    aesthetic.safetensors of the working directory (`ctrl_ray.classifiers.clip_head` says how).

    As `paper_compressibility`, with the public code's rate, batch, updates and weights for this task: the JPEG size counts
    twice. One label table for the four pairs of classes is there, a table for each control here.
    """
    base = paper_compressibility()
    return dataclasses.replace(
        base,
        output_dir="runs/paper-multi-task",
        controls={
            "jpeg_size": ControlConfig(guidance_strength=0.2, oracle="jpeg_size", thresholds=(70e3,), unit="bytes"),
            "aesthetic": ControlConfig(
                guidance_strength=0.1,
                oracle=f"clip_head:{AESTHETIC_HEAD}@{CLIP_MODEL}",
                thresholds=(5.7,),
                network=f"clip:{CLIP_MODEL}",
            ),
        },
        num_updates=96,
        global_batch_size=512,
        optimizer=dataclasses.replace(base.optimizer, learning_rate=3e-4),
        evaluation=dataclasses.replace(base.evaluation, every_updates=16),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "shapes": shapes,
    "shapes-two-controls": shapes_two_controls,
    "shapes-flow": shapes_flow,
    "shapes-exact": shapes_exact,
    "shapes-cfg": shapes_cfg,
    "stable-diffusion": stable_diffusion,
    "sdxl": sdxl,
    "sd3.5-medium": sd35_medium,
    "auraflow": auraflow,
    "paper-compressibility": paper_compressibility,
    "paper-multi-task": paper_multi_task,
}


def preset(name: str) -> TrainConfig:
    """The preset of that name; ConfigError lists the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()
