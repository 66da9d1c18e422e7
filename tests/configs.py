"""Configurations that several kinds of tests start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ctrl_ray.config import (
    AdapterConfig,
    ClassifierConfig,
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.config.presets import preset

EVERY_LAYER = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "linear_1", "linear_2"),
)
"""LoRA's layers of the small denoiser, written out: what tests and benchmarks compare with does not move with a preset."""


def shapes_of_the_paper() -> TrainConfig:
    """The built-in example with the paper's adapter and gradient, which every sharding and precision trains: a label embedding,
    LoRA on every layer, no graphs kept."""
    return replace(
        preset("shapes"),
        global_batch_size=64,
        micro_batch_size_per_worker=64,
        label_draws="independent",
        adapter=AdapterConfig(kind="embedding"),
        lora=LoraConfig(rank=8, alpha=8.0, target_modules=EVERY_LAYER),
        estimator=EstimatorConfig(name="full"),
    )


def tiny_run(pipeline: Path) -> TrainConfig:
    """The whole main job, its classifier still to be fitted, on a tiny pipeline: updates of eight trajectories of three steps,
    no evaluation before the last. The thresholds are quartiles of the drawn images as that pipeline's VAE decodes them."""
    return TrainConfig(
        base_model=str(pipeline),
        data="shapes",
        num_drawn_images=160,
        global_batch_size=8,
        micro_batch_size_per_worker=4,
        controls={
            "jpeg_size": ControlConfig(
                oracle="jpeg_size", thresholds=(1455.0, 1472.0, 1491.0), unit="bytes", guidance_strength=2.0
            )
        },
        classifier=ClassifierConfig(epochs=1, batch_size=32),
        sampler=SamplerConfig(num_steps=3),
        lora=LoraConfig(rank=2, alpha=2.0),
        scaling=ScalingConfig(max_failures=0),
        evaluation=EvaluationConfig(
            every_updates=0, final_num_samples=8, log_z_samples=8, max_log_z_samples=8, num_pairs=0, batch_size=8
        ),
        tracker="none",
    )


def tiny_experiment(name: str, pipeline: Path, clip: Path, head: Path) -> TrainConfig:
    """A preset of the paper's experiments with its models replaced by tiny ones, and the drawn images for data; nothing else
    is changed."""
    config = preset(name)
    controls = dict(config.controls)
    if "aesthetic" in controls:
        controls["aesthetic"] = replace(
            controls["aesthetic"], oracle=f"clip_head:{head}@{clip}", network=f"clip:{clip}"
        )
    return replace(
        config,
        base_model=str(pipeline),
        data="shapes",
        controls=controls,
        evaluation=replace(config.evaluation, clip_model=str(clip)),
    )


def on_a_cpu(config: TrainConfig) -> TrainConfig:
    """A preset for GPUs where there is none."""
    return replace(
        config,
        micro_batch_size_per_worker=32,
        scaling=ScalingConfig(max_failures=0),
        rewards=replace(config.rewards, gpus_per_actor=0.0, decode_chunk_size=8),
    )
