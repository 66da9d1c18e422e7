"""What the host does while a card computes: it waits for nothing in a rollout, and has little to do for a forward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.gradients.rollout import keyed_noise, rollout
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.protocol import Inputs
from tests.gpu.sd_shaped import CONTROLS, random_micro_batch, sd_config, write_sd_shaped
from tests.gpu.support import synchronize
from tests.learners import learner_on, small_config


@pytest.fixture
def waiting_is_an_error(device: torch.device) -> Iterator[Callable[[], None]]:
    """To be called when everything that happens once has happened."""

    def start() -> None:
        if device.type != "cuda":
            pytest.skip("only a card makes the host wait")
        torch.cuda.set_sync_debug_mode("error")

    yield start
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def test_rollout_steps_do_not_wait_for_the_card(
    tiny_pipeline: Path, tmp_path: Path, device: torch.device, waiting_is_an_error: Callable[[], None]
) -> None:
    """With guidance and KL, from the second rollout on; torch raises where it would wait."""
    learner = learner_on(small_config(tiny_pipeline, tmp_path / "classifier"), device, pool=False)
    batch = evaluation_batch(range(2), learner.prompts, learner.controls, ("jpeg_size",))
    inputs = Inputs(learner.encoder.encode(batch.prompts), batch.labels.to(device), learner.guidance)
    noise = keyed_noise(0, 0, batch.sample_ids, learner.engine.latent_shape, learner.kernel.num_steps, device)
    rollout(learner.engine, learner.kernel, inputs, noise, with_kl=True)
    synchronize(device)
    waiting_is_an_error()
    trajectory = rollout(learner.engine, learner.kernel, inputs, noise, with_kl=True)
    with pytest.raises(RuntimeError, match="synchroniz"):
        trajectory.clean_latents.sum().item()


@pytest.mark.parametrize("reference", [False, True])
def test_a_forward_costs_the_host_less_than_two_milliseconds(
    tmp_path: Path, device: torch.device, reference: bool, measured: Callable[..., None]
) -> None:
    """Everything around Stable Diffusion's UNet, which is the identity here: guidance, labels, 128 LoRA layers that change
    their mode. Median of 200 forwards, the card's work not waited for (a CPU's work is small)."""
    config = sd_config(write_sd_shaped(tmp_path, tiny=device.type == "cpu"), "fp32", 4, checkpointing=False)
    policy = build_policy(config, CONTROLS, empty=True)
    policy.controls.to_empty(device=device)
    unet: Any = policy.denoiser

    def identity(latents: Tensor, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)

    unet.forward = identity
    batch, kernel = random_micro_batch(policy, config, device)
    latents, times = batch.trajectory.latents[0], []
    for _ in range(220):
        started = time.perf_counter()
        policy(latents, kernel.time(7, device), batch.trajectory.inputs, reference=reference)
        times.append(time.perf_counter() - started)
        synchronize(device)
    host_ms = 1000 * statistics.median(times[20:])
    measured(host_ms=host_ms)
    assert host_ms < 2
