"""One LoRA for all labels: our order of its products beside peft's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners import lora as peft_lora
from torch import Tensor

from ctrl_ray.config import LoraConfig, Precision
from ctrl_ray.planning.live_bytes import LiveBytes
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.configs import EVERY_LAYER
from tests.policies import make_policy, moved

LORA = LoraConfig(rank=2, alpha=6.0, target_modules=EVERY_LAYER)
"""Convolutions, with strides too, attention, time projections; alpha is not the rank."""


def _policy(folder: Path, precision: Precision, *, peft: bool = False) -> ControlledPolicy:
    """Off the pre-trained model; peft: with peft's own layers."""
    policy = moved(make_policy(folder, {"size": 2}, lora=LORA, precision=precision), by=0.05, seed=1)
    wrapped = [module for module in policy.denoiser.modules() if isinstance(module, peft_lora.LoraLayer)]
    assert {type(module).__mro__[2] for module in wrapped} == {peft_lora.Linear, peft_lora.Conv2d}
    for module in wrapped if peft else ():
        module.__class__ = type(module).__mro__[2]
    return policy


def _given(folder: Path) -> tuple[Tensor, Tensor, Inputs]:
    condition = load_backbone(str(folder)).load_encoder().encode(["a red circle", "a blue cross"])
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor(500), Inputs(condition, torch.tensor([[0], [1]]))


def _prediction_and_gradients(policy: ControlledPolicy, folder: Path) -> tuple[Tensor, Tensor]:
    prediction = policy(*_given(folder), reference=False).prediction
    prediction.square().sum().backward()
    return prediction.detach(), torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_it_is_pefts_function(tiny_pipeline: Path) -> None:
    """Prediction and gradients, where both compute in float32; the trained part counts."""
    ours, theirs = (
        _prediction_and_gradients(_policy(tiny_pipeline, "fp32", peft=peft), tiny_pipeline) for peft in (False, True)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        reference = _policy(tiny_pipeline, "fp32")(*_given(tiny_pipeline), reference=True).prediction
    assert _error(ours[0], reference) > 0.01


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.full)])
def test_sixteen_bits_round_it_as_finely_as_the_denoiser(tiny_pipeline: Path, precision: Precision) -> None:
    """Updates far larger than a run's: prediction and gradients err at most half as much again as with LoRA's products in
    float32."""
    exact = _prediction_and_gradients(_policy(tiny_pipeline, "fp32"), tiny_pipeline)
    ours, theirs = (
        _prediction_and_gradients(_policy(tiny_pipeline, precision, peft=peft), tiny_pipeline) for peft in (False, True)
    )
    for found, beside, truth in zip(ours, theirs, exact, strict=True):
        assert 0 < _error(found, truth) < 1.5 * _error(beside, truth)


def test_a_graph_in_sixteen_bits_keeps_no_float32_copies(tiny_pipeline: Path) -> None:
    """Of the layers' inputs: the graph is smaller than with peft's layers."""
    kept = []
    for peft in (False, True):
        policy = _policy(tiny_pipeline, "bf16", peft=peft)
        latents, time, inputs = _given(tiny_pipeline)
        with LiveBytes() as live:
            output = policy(latents, time, inputs, reference=False)
            kept.append(live.bytes)
        del output
    assert kept[0] < 0.8 * kept[1]
