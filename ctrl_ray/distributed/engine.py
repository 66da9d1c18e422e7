"""The DeepSpeed engine around a policy: forward, backward of one denoising step, update, consolidated state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from ctrl_ray.config import TrainConfig
from ctrl_ray.diffusion.steps import Guidance, ModelOutput
from ctrl_ray.distributed.deepspeed_config import deepspeed_config
from ctrl_ray.policy.condition import Condition, TrainablePolicy

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_factor(config: TrainConfig, update: int) -> float:
    """Linear warm-up, then a cosine from 1 to `final_learning_rate_fraction` over the run; update counts from 0."""
    warmup = config.optimizer.warmup_updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, config.num_updates - warmup)
    floor = config.optimizer.final_learning_rate_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class PolicyEngine:
    """A `Policy` whose parameters are sharded by DeepSpeed; every rank must make the same calls."""

    def __init__(self, policy: TrainablePolicy, config: TrainConfig) -> None:
        """`torch.distributed` must be initialised (Ray Train does it). ZeRO gives every rank a shard of the state."""
        self.policy = policy
        self.latent_shape = policy.latent_shape
        self.prediction_type = policy.prediction_type
        self._config = config
        groups = policy.parameter_groups(config.optimizer.learning_rate, config.optimizer.embedding_learning_rate)
        self._rates = tuple(float(group["lr"]) for group in groups)
        optimizer = torch.optim.AdamW(
            groups,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            weight_decay=config.optimizer.weight_decay,
        )
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config=deepspeed_config(config),
            dist_init_required=False,
        )
        self.engine.eval()  # the backbone has no dropout to switch on: rollout = sweep
        self._initialise_optimizer_state()

    def __call__(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Condition,
        labels: Tensor,
        guidance: Guidance,
        *,
        reference: bool,
    ) -> ModelOutput:
        """The policy's forward, through the engine (which gathers what ZeRO-3 has sharded)."""
        return self.engine(latents, time, condition, labels, guidance, reference=reference)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the parameter gradients of a scalar; leaves such as the step's latents get theirs unscaled."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, update: int) -> float:
        """Average gradients over ranks, clip, update; returns the global gradient norm before clipping."""
        factor = learning_rate_factor(self._config, update)
        for group, rate in zip(self.engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the denoiser's group at the last update."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @contextmanager
    def gathered(self) -> Iterator[TrainablePolicy]:
        """The policy with whole parameters (ZeRO-3 shards them); collective."""
        parameters = list(self.policy.parameters()) if self._config.scaling.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
            yield self.policy

    def state(self) -> dict[str, Tensor]:
        """Consolidated float32 state on the CPU: parameters, moments and the optimizer's step count; collective.

        It does not depend on the ZeRO stage or on the number of workers. Keys: 'NAME', 'exp_avg/NAME',
        'exp_avg_sq/NAME', 'step'.
        """
        state: dict[str, Tensor] = {"step": torch.tensor(float(self._step_count()))}
        for name, parameter in self.policy.trainable_parameters().items():
            state[name] = _cpu(self._get(parameter, None))
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = _cpu(self._get(parameter, moment))
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore moments and step count; parameters must have been loaded into the policy before the engine was made
        (`load_parameters`), because ZeRO copies them at start."""
        for name, parameter in self.policy.trainable_parameters().items():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, state[f"{moment}/{name}"])
        for values in self._base_optimizer().state.values():
            values["step"] = torch.as_tensor(float(state["step"])).to(values["step"])

    def _initialise_optimizer_state(self) -> None:
        """Zero moments for every flat partition, linked to the parameters they belong to.

        DeepSpeed links them after the first update of the *first* parameter group only, so that with two groups the
        second one's moments could neither be read nor set.
        """
        optimizer, stage = self.engine.optimizer, self._config.scaling.zero_stage
        state = self._base_optimizer().state
        for partition in self._partitions():
            state[partition] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        if stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Any]:
        optimizer, stage = self.engine.optimizer, self._config.scaling.zero_stage
        if stage == 0:
            return list(self.policy.trainable_parameters().values())
        return list(optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat)

    def _base_optimizer(self) -> Any:
        optimizer = self.engine.optimizer
        while not isinstance(optimizer, torch.optim.AdamW):
            optimizer = optimizer.optimizer
        return optimizer

    def _step_count(self) -> float:
        steps = {float(values["step"]) for values in self._base_optimizer().state.values()}
        assert len(steps) == 1, steps
        return steps.pop()

    def _get(self, parameter: Any, moment: str | None) -> Tensor:
        if self._config.scaling.zero_stage == 0:
            if moment is None:
                return parameter
            return self._base_optimizer().state[parameter][moment]
        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    def _set_moment(self, parameter: Any, moment: str, value: Tensor) -> None:
        value = value.to(parameter.device if parameter.numel() else value.device)
        if self._config.scaling.zero_stage == 0:
            self._base_optimizer().state[parameter][moment].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)


def load_parameters(policy: TrainablePolicy, state: Mapping[str, Tensor]) -> None:
    """Copy a consolidated state's parameters into a policy, before an engine shards it."""
    for name, parameter in policy.trainable_parameters().items():
        parameter.data.copy_(state[name].to(parameter.device))


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks of a float64 tensor (in place)."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values
