"""The DeepSpeed engine around a policy: forward, backward of one denoising step, update, consolidated state."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
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

from ctrl_ray.config import OptimizerConfig, TrainConfig
from ctrl_ray.diffusion.steps import ModelOutput
from ctrl_ray.distributed.deepspeed_internals import (
    flat_partitions,
    leave_out_shared_memory_op,
    link_moments,
    set_own_moment,
    whole_shape,
    whole_values,
)
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.planning.deepspeed_config import MOMENTS, deepspeed_config
from ctrl_ray.policy.protocol import Inputs, Policy, TrainablePolicy, beside_reference

_ELEMENTS_AT_A_TIME = 1 << 24
"""64 MB of float32 state are gathered at a time."""


def learning_rate_factor(config: TrainConfig, update: int) -> float:
    """Linear warm-up, then a cosine from 1 to `final_learning_rate_fraction` over the run; update counts from 0."""
    warmup = config.optimizer.warmup_updates
    if update < warmup:
        return (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, config.num_updates - warmup)
    floor = config.optimizer.final_learning_rate_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW or SGD with momentum over parameter groups; DeepSpeed shards its state."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum)
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)


class PolicyEngine:
    """A `Policy` whose parameters are sharded by DeepSpeed; every rank must make the same calls."""

    def __init__(self, policy: TrainablePolicy, config: TrainConfig) -> None:
        """`torch.distributed` must be initialised (Ray Train does it). ZeRO gives every rank a shard of the state."""
        self.policy = policy
        self.latent_shape = policy.latent_shape
        self._config = config
        groups = policy.parameter_groups(config.optimizer.learning_rate, config.optimizer.embedding_learning_rate)
        self._rates = tuple(float(group["lr"]) for group in groups)
        self._optimizer = make_optimizer(groups, config.optimizer)
        self._moments = MOMENTS[config.optimizer.name]
        self._updates = 0
        leave_out_shared_memory_op()
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=self._optimizer,
            config=deepspeed_config(config, sum(p.numel() for p in policy.trainable_parameters().values())),
            dist_init_required=False,
        )
        self.engine.eval()  # no dropout: the adjoint pass computes again what the rollout computed
        self._initialise_optimizer_state()

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """The policy's forward, through the engine.

        The reference goes past it (the module's own hooks gather what ZeRO-3 shards): it has no parameter gradients, and the
        engine takes a `torch.autograd.grad` through its output for a backward. It refuses that under ZeRO-0; under ZeRO-3 the
        parameter gradients of later backwards were measured to be half wrong.
        """
        forward = self.policy if reference else self.engine
        return forward(latents, time, inputs, reference=reference)

    @property
    def for_latents(self) -> Policy:
        """What `torch.autograd.grad` to the latents may go through: past the engine, for the same reason."""
        return self.policy

    def beside_reference(self, inputs: Inputs) -> Inputs | None:
        """The policy's: see `ctrl_ray.policy.protocol.beside_reference`."""
        return beside_reference(self.policy, inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the parameter gradients of a scalar; leaves such as the step's latents get theirs unscaled."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, update: int) -> float:
        """Average gradients over ranks, clip, update; returns the global gradient norm before clipping (ZeRO-0: NaN).

        NonFiniteError on every rank, with nothing changed, when the norm is not finite on any of them.
        """
        if self._config.scaling.zero_stage == 0 and not self._gradients_are_finite():
            raise _not_finite(update)
        factor = learning_rate_factor(self._config, update)
        for group, rate in zip(self.engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.engine.step()
        if not self.engine.was_step_applied():  # under ZeRO 1 to 3 DeepSpeed looks at the norm first
            raise _not_finite(update)
        self._updates += 1
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _gradients_are_finite(self) -> bool:
        """Of every rank, before they are averaged; collective. For ZeRO-0, where DeepSpeed would take any step."""
        gradients = [p.grad for p in self.policy.trainable_parameters().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return float(all_reduce_sum((~torch.isfinite(norm)).double(), norm.device)) == 0

    @property
    def learning_rate(self) -> float:
        """Learning rate of the denoiser's group at the last update."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    @contextmanager
    def gathered(self) -> Iterator[TrainablePolicy]:
        """The policy with its trainable parameters whole (ZeRO-3 shards them; the frozen ones stay sharded); collective."""
        parameters = list(self.policy.trainable_parameters().values()) if self._config.scaling.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
            yield self.policy

    def state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Float32 state on the CPU: parameters, moments and the optimizer's step count; collective.

        It does not depend on the ZeRO stage or on the number of workers. Keys: 'NAME', 'MOMENT/NAME' for every moment of
        the optimizer, 'step'. At most _ELEMENTS_AT_A_TIME, or one parameter, are gathered at a time; a rank keeps those in
        `names` (None: all).
        """
        state: dict[str, Tensor] = {"step": torch.tensor(float(self._updates))}
        for some in self._portions():
            asked = [(name, parameter, moment) for name, parameter in some for moment in (None, *self._moments)]
            values = self._get([(parameter, moment) for _, parameter, moment in asked])
            for (name, _, moment), whole in zip(asked, values, strict=True):
                if names is None or name in names:
                    state[name if moment is None else f"{moment}/{name}"] = _cpu(whole)
        return state

    def _portions(self) -> Iterator[list[tuple[str, Any]]]:
        """Parameters, by name, that are gathered together: many workers wait for each collective."""
        portion: list[tuple[str, Any]] = []
        size = 0
        for name, parameter in self.policy.trainable_parameters().items():
            more = (1 + len(self._moments)) * whole_shape(parameter).numel()
            if portion and size + more > _ELEMENTS_AT_A_TIME:
                yield portion
                portion, size = [], 0
            portion.append((name, parameter))
            size += more
        if portion:
            yield portion

    def sizes(self) -> dict[str, int]:
        """Elements of every trainable parameter, whole (ZeRO-3 leaves an empty tensor in its place)."""
        return {name: whole_shape(parameter).numel() for name, parameter in self.policy.trainable_parameters().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore moments and step count; parameters must have been loaded into the policy before the engine was made
        (`load_parameters`), because ZeRO copies them at start."""
        for name, parameter in self.policy.trainable_parameters().items():
            for moment in self._moments:
                self._set_moment(parameter, moment, state[f"{moment}/{name}"])
        self._updates = int(state["step"])
        for values in self._optimizer.state.values():
            if "step" in values:
                values["step"] = torch.as_tensor(float(self._updates)).to(values["step"])

    def _initialise_optimizer_state(self) -> None:
        """Zero moments for every flat partition, linked to the parameters they belong to."""
        for partition in self._partitions():
            values = {moment: torch.zeros_like(partition) for moment in self._moments}
            if isinstance(self._optimizer, torch.optim.AdamW):
                values["step"] = torch.tensor(0.0)
            self._optimizer.state[partition] = values
        if self._config.scaling.zero_stage in (1, 2):
            link_moments(self.engine.optimizer)

    def _partitions(self) -> list[Any]:
        stage = self._config.scaling.zero_stage
        if stage == 0:
            return list(self.policy.trainable_parameters().values())
        return flat_partitions(self.engine.optimizer, stage)

    def _get(self, asked: Sequence[tuple[Any, str | None]]) -> list[Tensor]:
        """Whole values of (parameter, moment; None: the parameter itself)."""
        stage = self._config.scaling.zero_stage
        if stage == 0:
            return [p if moment is None else self._optimizer.state[p][moment] for p, moment in asked]
        if stage < 3:
            return whole_values(asked)
        found = [
            safe_get_full_fp32_param(p) if moment is None else safe_get_full_optimizer_state(p, moment)
            for p, moment in asked
        ]
        assert all(whole.shape == whole_shape(p) for whole, (p, _) in zip(found, asked, strict=True))
        return found

    def _set_moment(self, parameter: Any, moment: str, value: Tensor) -> None:
        stage = self._config.scaling.zero_stage
        if stage == 0:
            self._optimizer.state[parameter][moment].copy_(value)
        elif stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        else:
            set_own_moment(parameter, moment, value)


def _not_finite(update: int) -> NonFiniteError:
    return NonFiniteError(
        f"update {update}: the gradient's norm is not finite though every cotangent was, so the update was not made; lower "
        "optimizer.learning_rate or guidance_strength, or use scaling.precision fp32"
    )


def load_parameters(policy: TrainablePolicy, state: Mapping[str, Tensor]) -> None:
    """Copy a consolidated state's parameters into a policy, before an engine shards it."""
    for name, parameter in policy.trainable_parameters().items():
        parameter.data.copy_(state[name].to(parameter.device))


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone().contiguous()


def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
    """Sum over ranks of a float64 tensor, where it lies; `device`: what the group reduces on (NCCL: CUDA tensors alone)."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)
