"""What a sampling task loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ctrl_ray.config import ControlConfig, SamplerConfig
from ctrl_ray.distributed.sampling import SamplingJob, load_policy


def test_the_pretrained_model_is_in_memory_once(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy without adapter has no second denoiser to compare with (1.7 GB of Stable Diffusion 1.5 in half precision)."""

    deepcopy = copy.deepcopy

    def watched(value: Any, memo: Any = None) -> Any:
        assert not isinstance(value, nn.Module), "a denoiser was copied"
        return deepcopy(value, memo)

    monkeypatch.setattr(copy, "deepcopy", watched)
    job = SamplingJob(
        adapter=None,
        base_model=str(tiny_pipeline),
        revision=None,
        controls={"size": ControlConfig(classes=("low", "high"))},
        sampler=SamplerConfig(num_steps=2),
        prompts=("a cross",),
        sample_ids=(0,),
        seed=0,
        batch_size=1,
        reference=True,
    )
    policy, controls, _ = load_policy(job)
    assert policy.reference_denoiser is None and list(controls) == ["size"]
    assert [name for name in policy.trainable_parameters() if not name.startswith("controls.")] == []
