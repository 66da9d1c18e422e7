"""The KL that a run reads where there is next to none: what rounding costs, measured before the first update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.errors import ConfigError, NonFiniteError
from ctrl_ray.policy.control.gains import GAINS
from ctrl_ray.policy.controlled import ControlledPolicy

TRUE_KL = 1e-3
"""Nats: the policy that is measured is nearer than this to the pre-trained model."""
_NUM_SAMPLES = 8
_NEAR, _AIM, _FAR = 0.03, 0.1, 0.5
"""Nats a latent dimension. From the first to the last a KL is mostly no rounding, and grows with the square of the amplitude
(within 10 % for `shapes`, with guidance and without)."""
_MARGIN = 2
_FINER = {"tf32": "fp32", "fp16": "fp32", "bf16": "fp16 or fp32"}
_FIRST_AMPLITUDE = 0.1
_MAX_TRIES = 8


def measure_noise_floor(learner: Learner) -> float:
    """KL in nats per trajectory, in the run's precision and with its guidance, of a policy whose true KL is below TRUE_KL.

    Such a policy is made of random LoRA updates and tables (of relative changes of all weights under full fine-tuning)
    around the pre-trained model, whatever the policy's parameters are; they are restored. How large these may be is found
    without another precision: an amplitude a with a KL D(a) that rounding cannot explain is looked for, and a small KL
    grows with the square, so a √(TRUE_KL / 2 D(a)) has half of TRUE_KL. Rounding only adds to D(a), so it errs to the safe
    side. Mean over 8 samples of the evaluation's noise, prompts and labels, reduced as the run reduces its KLs.

    learner: with the bare policy in the engine's place. NonFiniteError where the KL is not a number.
    """
    dimensions = math.prod(learner.engine.latent_shape)
    per_nat = 1 if learner.config.latent_reduction == "sum" else 1 / dimensions
    amplitude = _FIRST_AMPLITUDE
    for _ in range(_MAX_TRIES):
        kl = _reading(learner, amplitude) / per_nat
        if _NEAR * dimensions <= kl <= _FAR * dimensions:
            break
        further = math.sqrt(_AIM * dimensions / kl) if kl > 0 else math.inf
        amplitude *= min(32.0, max(1 / 32, further)) if math.isfinite(kl) else 1 / 32
    if not 0 < kl < math.inf:
        raise NonFiniteError(
            f"the KL of a policy next to the pre-trained model is {kl} in scaling.precision "
            f"{learner.config.scaling.precision}; expected a positive number. Use another precision: bf16 has the range of "
            "float32, fp16 has not"
        )
    return _reading(learner, amplitude * math.sqrt(0.5 * TRUE_KL / kl))


def add_noise_floor(learner: Learner, progress: dict[str, Any]) -> None:
    """Add the floor to a run's progress, and what it was measured in; collective: rank 0 measures.

    A run that goes on has it from its checkpoint, unless it goes on in another precision. Raises ConfigError for a target_kl
    that is too near (`check_target_kl`).
    """
    precision = learner.config.scaling.precision
    if progress.get("precision") != precision:
        floor = [measure_noise_floor(learner) if learner.rank.index == 0 else math.nan]
        if learner.rank.size > 1:
            dist.broadcast_object_list(floor, src=0)
        progress |= {"precision": precision, "kl_noise_floor": floor[0]}
    check_target_kl(learner.config, progress["kl_noise_floor"])


def check_target_kl(config: TrainConfig, floor: float) -> None:
    """ConfigError for a target_kl that rounding alone may exceed: below twice the noise floor."""
    if config.target_kl is None or config.target_kl >= _MARGIN * floor:
        return
    precision = config.scaling.precision
    enough = f"{1.05 * _MARGIN * floor:.2g}"  # two digits, rounded up
    finer = f", or scaling.precision to {_FINER[precision]}" if precision in _FINER else ""
    raise ConfigError(
        f"target_kl is {config.target_kl:g} nats, but in scaling.precision {precision} a policy next to the pre-trained model "
        f"already reads {floor:.2g} (kl_noise_floor); expected at least {_MARGIN} times as much. Set target_kl to {enough} or "
        f"more{finer}"
    )


def _reading(learner: Learner, amplitude: float) -> float:
    """Mean KL of the trajectories of a policy at that distance from the pre-trained model."""
    config, policy = learner.config, learner.engine
    assert isinstance(policy, ControlledPolicy)
    size = min(_NUM_SAMPLES, config.fixed_micro_batch_size)
    total = 0.0
    with near_reference(policy, amplitude, config.seed):
        for start in range(0, _NUM_SAMPLES, size):
            ids = range(start, min(start + size, _NUM_SAMPLES))
            batch = evaluation_batch(ids, learner.prompts, learner.controls, tuple(config.controls))
            trajectory = learner.roll_out(batch, config.evaluation.seed, 0, with_kl=True)
            assert trajectory.kl_per_step is not None
            total += float(trajectory.kl_per_step.double().sum())
    return total / _NUM_SAMPLES


@contextmanager
@torch.no_grad()
def near_reference(policy: ControlledPolicy, amplitude: float, seed: int) -> Iterator[None]:
    """Meanwhile the policy is the pre-trained model but for small random changes, the same but for their amplitude.

    B matrices and the embeddings' tables (null rows stay zero) are amplitude × N(0, 1), weights that are trained as a whole are
    those of the reference × (1 + amplitude × N(0, 1)).
    """
    trainable = policy.trainable_parameters()
    reference = {} if policy.reference_denoiser is None else dict(policy.reference_denoiser.named_parameters())
    kept = {name: parameter.detach().cpu().clone() for name, parameter in trainable.items()}
    device = next(iter(trainable.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    try:
        for name, parameter in trainable.items():
            if "lora_A" in name or f"{GAINS}.down." in name or f"{GAINS}.tables." in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator, device=device).mul_(amplitude)
            pretrained = reference.get(name.removeprefix(f"{policy.backbone.denoiser}."))
            parameter.copy_(noise if pretrained is None else pretrained + pretrained * noise)
        for name in policy.controls.tables:
            policy.controls.table(name).weight[-1] = 0
        yield
    finally:
        for name, parameter in trainable.items():
            parameter.copy_(kept[name])
