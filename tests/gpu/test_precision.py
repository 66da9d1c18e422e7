"""What each precision costs in KL on a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from ctrl_ray.config import SamplerConfig, ScalingConfig
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.noise_floor import TRUE_KL, measure_noise_floor
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.precision import set_float32_precision
from tests.configs import shapes_of_the_paper
from tests.gpu.support import PRECISIONS
from tests.learners import PROMPTS


@pytest.fixture
def floors(device: torch.device) -> Iterator[dict[str, float]]:
    """Of the shipped pipeline, with guidance: nats by precision."""
    shapes = shapes_of_the_paper()
    found = {}
    for precision in PRECISIONS:
        set_float32_precision(precision)  # type: ignore[arg-type]
        config = dataclasses.replace(
            shapes,
            scaling=ScalingConfig(precision=precision),  # type: ignore[arg-type]
            sampler=SamplerConfig(num_steps=10, guidance_scale=3.0, reference_steps=1),
        )
        policy = build_policy(config).to(device)
        learner = Learner(
            config=config,
            engine=policy,  # type: ignore[arg-type]
            kernel=policy.backbone.make_kernel(config.sampler),
            encoder=policy.backbone.load_encoder(device),
            rewards=None,  # type: ignore[arg-type]
            controls=config.controls,
            prompts=PROMPTS,
            rank=Rank(0, 1, device),
        )
        found[precision] = measure_noise_floor(learner)
    yield found


def test_the_noise_floor_follows_the_precision(floors: dict[str, float], measured: Callable[..., None]) -> None:
    """In float32 it is the KL of the policy that it is measured with, half of TRUE_KL to a fifth; fp16, three bits finer than
    bf16, lies at least 8 times below it (64 times were rounding all that is read); tf32 has fp16's mantissa, and no bf16's."""
    measured(**floors)
    assert floors["fp32"] == pytest.approx(TRUE_KL / 2, rel=0.2)
    assert 8 * (floors["fp16"] - floors["fp32"]) < floors["bf16"]
    assert floors["tf32"] < floors["bf16"]
