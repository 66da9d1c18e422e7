"""Configurations that several kinds of tests start from."""

from __future__ import annotations

from pathlib import Path

from ctrl_ray.config import (
    ClassifierConfig,
    ControlConfig,
    EvaluationConfig,
    LoraConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)


def tiny_run(pipeline: Path) -> TrainConfig:
    """The whole main job, its classifier still to be fitted, on a tiny pipeline: updates of eight trajectories of three steps,
    no evaluation before the last."""
    return TrainConfig(
        base_model=str(pipeline),
        data="shapes",
        num_drawn_images=160,
        global_batch_size=8,
        micro_batch_size_per_worker=4,
        controls={
            "jpeg_size": ControlConfig(
                oracle="jpeg_size", thresholds=(1000.0, 1200.0, 1400.0), unit="bytes", guidance_strength=2.0
            )
        },
        classifier=ClassifierConfig(epochs=1, batch_size=32),
        sampler=SamplerConfig(num_steps=3),
        lora=LoraConfig(rank=2, alpha=2.0),
        scaling=ScalingConfig(max_failures=0),
        evaluation=EvaluationConfig(
            every_updates=0, final_num_samples=8, log_z_samples=8, max_log_z_samples=8, num_pairs=0, batch_size=8
        ),
        aim=False,
    )
