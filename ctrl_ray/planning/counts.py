"""What a policy takes, counted without its weights: parameters, and the live tensor bytes of one denoising step.

The policy is built and run on fake tensors (shapes, types and lifetimes, no values), through the same forward, the same
kernel and torch's own autograd, while a dispatch mode follows which storages are alive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.diffusion.steps import NO_GUIDANCE, DenoisingKernel, GaussianStep, Guidance, StepKernel, step_kl
from ctrl_ray.gradients.adjoint import Calls, Estimator, MicroBatch, TerminalReward
from ctrl_ray.gradients.estimators import make_estimator
from ctrl_ray.gradients.rollout import Trajectory, policy_step, step_graph
from ctrl_ray.planning.decoder_counts import DecoderCounts, count_decoder
from ctrl_ray.planning.live_bytes import LiveBytes, as_fake_cpu
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Condition, Inputs, beside_reference


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Live tensor bytes of one denoising step of a micro-batch, beyond weights, gradients and the latents it reads."""

    policy_kept: int
    """Alive after the policy's forward: what its backward needs."""
    reference_kept: int
    """Alive in addition after the reference's forward."""
    backward_peak: int
    """The most that is alive during the estimator's forwards and backwards at a step."""
    rollout_peak: int
    """The most that is alive during one forward without gradient; with kept graphs, during the forwards of policy and
    reference with theirs."""
    graph_kept: int = 0
    """Alive from the rollout to the adjoint pass: a step's graph, where the estimator keeps it."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating-point operations of one denoising step of a micro-batch, with all its guidance branches: two for each
    multiply-add of convolutions, matrix products and attention; the rest hardly counts."""

    forward: float
    """A denoiser forward without gradient."""
    backward: float
    """A backward, with what gradient checkpointing computes again; the mean over policy and reference."""


@dataclass(frozen=True, kw_only=True)
class PolicyCounts:
    """Parameters of a policy and of what a worker loads beside it."""

    trainable_elements: int
    table_elements: int
    """Of them, the control embeddings."""
    largest_trainable: int
    """Elements of the largest trained tensor."""
    trainable_tensors: int
    trainable_bytes: int
    frozen_elements: int
    frozen_bytes: int
    reference_bytes: int
    """Of the frozen bytes, the reference copy of full fine-tuning."""
    unpartitioned_bytes: int
    """Bytes of parameters that ZeRO-3 would leave whole at its persistence threshold."""
    largest_bytes: int
    """The largest single parameter."""
    latent_elements: int
    """Of one sample."""
    prompt_bytes: int
    """Encoded features of one prompt, float32."""
    encoder_bytes: int
    """The text encoder, float32."""
    decoder: DecoderCounts
    """The VAE: in a reward actor, or in the worker with local rewards."""

    @property
    def elements(self) -> int:
        """All parameters of the policy."""
        return self.trainable_elements + self.frozen_elements


class PolicyCounter:
    """Counts one policy; building it takes a second or a few, a step of a new micro-batch size about the same."""

    def __init__(
        self, config: TrainConfig, controls: Mapping[str, ControlConfig], *, persistence_threshold: int = 100_000
    ) -> None:
        """persistence_threshold: ZeRO-3 leaves smaller parameters whole."""
        self._config = config
        self._fake = FakeTensorMode()
        self._policy = build_policy(config, controls, empty=True)
        self._kernel = self._policy.backbone.make_kernel(config.sampler)
        with self._fake:
            as_fake_cpu(self._policy)
        self._persistence_threshold = persistence_threshold
        self._steps: dict[int, StepBytes] = {}
        self._evaluations: dict[int, int] = {}
        self._operations: tuple[float, float] | None = None
        self._counts: PolicyCounts | None = None

    def counts(self) -> PolicyCounts:
        """Parameters and sizes."""
        if self._counts is None:
            self._counts = self._count()
        return self._counts

    def _count(self) -> PolicyCounts:
        policy = self._policy
        trainable = policy.trainable_parameters()
        parameters = list(policy.parameters())
        frozen = [p for p in parameters if not p.requires_grad]
        reference = [] if policy.reference_denoiser is None else list(policy.reference_denoiser.parameters())
        return PolicyCounts(
            trainable_elements=sum(p.numel() for p in trainable.values()),
            table_elements=sum(p.numel() for name, p in trainable.items() if name.startswith("controls.")),
            largest_trainable=max(p.numel() for p in trainable.values()),
            trainable_tensors=len(trainable),
            trainable_bytes=_bytes(trainable.values()),
            frozen_elements=sum(p.numel() for p in frozen),
            frozen_bytes=_bytes(frozen),
            reference_bytes=_bytes(reference),
            unpartitioned_bytes=_bytes(p for p in parameters if p.numel() <= self._persistence_threshold),
            largest_bytes=max(p.numel() * p.element_size() for p in parameters),
            latent_elements=math.prod(policy.latent_shape),
            prompt_bytes=4 * sum(math.prod(shape) for shape in policy.backbone.condition_shapes(1).values()),
            encoder_bytes=policy.backbone.encoder_bytes(on_gpu=self._config.scaling.use_gpu),
            decoder=count_decoder(policy.backbone),
        )

    def step(self, batch_size: int) -> StepBytes:
        """Live bytes of one step of a micro-batch, counted once for each size."""
        if batch_size not in self._steps:
            with self._fake, self._watch() as live:
                if self._config.draws_trajectories:
                    counted, *operations = _count_step(self._policy, self._kernel, self._config, batch_size, live)
                else:
                    counted, *operations = _count_denoising(self._policy, batch_size, live)
            self._steps[batch_size] = counted
            self._operations = (operations[0] / batch_size, operations[1] / batch_size)
        return self._steps[batch_size]

    @property
    def counted_sizes(self) -> list[int]:
        """Micro-batch sizes whose step has been counted, ascending."""
        return sorted(self._steps)

    def evaluation(self, batch_size: int) -> int:
        """The most bytes that are alive in a step of an evaluation, beyond weights and latents; counted once for each size."""
        if batch_size not in self._evaluations:
            with self._fake, self._watch() as live:
                self._evaluations[batch_size] = _count_evaluation(
                    *(self._policy, self._kernel, self._config, batch_size, live)
                )
        return self._evaluations[batch_size]

    def _watch(self) -> LiveBytes:
        """Knows the weights: a view of one that an operation takes (a linear layer's) is nothing new."""
        live = LiveBytes()
        for parameter in self._policy.parameters():
            live.add(parameter)
        return live

    def flops(self, batch_size: int) -> StepFlops:
        """Operations of one step of a micro-batch, from a size that was counted; all of them are proportional to it."""
        if self._operations is None:
            self.step(batch_size)
        assert self._operations is not None
        forward, adjoint = (operations * batch_size for operations in self._operations)
        if self._config.draws_trajectories:
            estimator = make_estimator(self._config.estimator, self._kernel.num_steps)
            calls = estimator.step_calls(controlled=True, weighted=True)
        else:
            calls = Calls(1, 1, 1)
        return StepFlops(forward=forward, backward=(adjoint - calls.forwards * forward) / calls.backwards)


class _WatchedMicroBatch(MicroBatch):
    """An adjoint step on fake tensors: notes what each forward leaves alive. A step that looked at a value would fail here, as
    it would wait for a GPU."""

    def __init__(self, live: LiveBytes, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.live = live
        self.kept = {False: 0, True: 0}

    def step(self, step_index: int, latents: Tensor, *, reference: bool) -> GaussianStep:
        """The step; `kept` says what its forward leaves alive."""
        before = self.live.bytes
        step = super().step(step_index, latents, reference=reference)
        self.kept[reference] = self.live.bytes - before
        return step

    def through_reference(self, step_index: int, cotangent: Tensor) -> tuple[Tensor, GaussianStep]:
        """By `backward`: the reference has no parameter gradients, so it is the same as `autograd.grad`."""
        latents = self.leaf(step_index)
        with torch.enable_grad():
            ref = self.step(step_index, latents, reference=True)
            (ref.mean * cotangent).sum().backward()
        assert latents.grad is not None
        return latents.grad, GaussianStep(ref.mean.detach(), ref.std.detach())


def _count_step(
    policy: ControlledPolicy,
    kernel: DenoisingKernel,
    config: TrainConfig,
    batch_size: int,
    live: LiveBytes,
) -> tuple[StepBytes, float, float]:
    """One step of the rollout, and one of the adjoint pass by the run's own estimator, on fake tensors; with the operations
    of each."""
    estimator = make_estimator(config.estimator, kernel.num_steps)
    step_index, weight = _trained_step(estimator, kernel, config.seed)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    latents, inputs = _inputs(policy, batch_size, Guidance.of(config.sampler))
    path = latents.expand(kernel.num_steps + 1, *latents.shape)
    trajectory = Trajectory(path, inputs, means=path[1:] if estimator.keep_means else None)
    batch = _WatchedMicroBatch(
        *(live, policy, kernel, trajectory),
        kl_coef=config.kl_coef,
        sample_weights=torch.ones(batch_size),
        backward=lambda loss: loss.backward(),
        latent_reduction=config.latent_reduction,
    )
    carried = estimator.start(batch, TerminalReward(torch.zeros(batch_size), torch.zeros_like(latents)))
    start, live.operations = live.restart_peak(), 0.0
    with torch.no_grad():
        policy_step(policy, kernel, step_index, latents, inputs, reference=False)
    rollout_peak, forward = live.peak - start, live.operations
    start, live.operations, graph_kept = live.restart_peak(), 0.0, 0
    if estimator.keep_graphs:
        graph = step_graph(policy, kernel, step_index, latents, inputs, beside_reference(policy, inputs))
        rollout_peak, graph_kept = live.peak - start, live.bytes - start
        batch.kept = {False: graph_kept // 2, True: graph_kept - graph_kept // 2}
        batch.trajectory = dataclasses.replace(trajectory, graphs={step_index: graph})
        live.operations -= forward  # the policy's own belongs to the rollout
    estimator.pull_back(batch, step_index, carried, weight)
    peak, adjoint = live.peak - start, live.operations
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    counted = StepBytes(
        policy_kept=batch.kept[False],
        reference_kept=batch.kept[True],
        backward_peak=peak,
        rollout_peak=rollout_peak,
        graph_kept=graph_kept,
    )
    return counted, forward, adjoint


def _count_denoising(policy: ControlledPolicy, batch_size: int, live: LiveBytes) -> tuple[StepBytes, float, float]:
    """The loss of labelled images and its backward, on fake tensors, with the operations of a forward and of both."""
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    latents, inputs = _inputs(policy, batch_size, NO_GUIDANCE)
    timesteps, noise = torch.zeros(batch_size, dtype=torch.long), torch.zeros_like(latents)
    start, live.operations = live.restart_peak(), 0.0
    loss = (policy(latents, timesteps, inputs, reference=False).prediction - noise).square().mean()
    kept, forward = live.bytes - start, live.operations
    loss.backward()
    counted = StepBytes(policy_kept=kept, reference_kept=0, backward_peak=live.peak - start, rollout_peak=0)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None
    return counted, forward, live.operations


def _count_evaluation(
    policy: ControlledPolicy, kernel: DenoisingKernel, config: TrainConfig, batch_size: int, live: LiveBytes
) -> int:
    """One step of a rollout with its KL, on fake tensors."""
    step_index, _ = _trained_step(make_estimator(config.estimator, kernel.num_steps), kernel, config.seed)
    latents, inputs = _inputs(policy, batch_size, Guidance.of(config.sampler))
    start = live.restart_peak()
    with torch.no_grad():
        step, ref = (
            policy_step(policy, kernel, step_index, latents, inputs, reference=reference) for reference in (False, True)
        )
        step_kl(step, ref, config.latent_reduction)
    return live.peak - start


def _inputs(policy: ControlledPolicy, batch_size: int, guidance: Guidance) -> tuple[Tensor, Inputs]:
    """Latents and inputs of a batch, without values."""
    latents = torch.zeros(batch_size, *policy.latent_shape)
    shapes = policy.backbone.condition_shapes(batch_size)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    null = {name: torch.zeros(shape[1:]).expand(shape) for name, shape in shapes.items()}
    labels = torch.zeros(batch_size, len(policy.controls.names), dtype=torch.long)
    return latents, Inputs(Condition(("",) * batch_size, tensors, null), labels, guidance)


def _trained_step(estimator: Estimator, kernel: StepKernel, seed: int) -> tuple[int, float]:
    """A step that is the policy's and gets a parameter gradient, and its weight; all of them are alike in size."""
    for update in range(1000):  # a random plan may visit none
        plan = estimator.plan(kernel.num_steps, seed, update, 0)
        for step_index in range(plan.stop_below, kernel.num_steps):
            if kernel.controlled(step_index) and plan.weights[step_index]:
                return step_index, plan.weights[step_index]
    raise AssertionError("preflight refuses an estimator that trains nothing")


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
