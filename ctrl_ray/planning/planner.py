"""Plans of configs that differ in scaling and sizes only; what is counted is counted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ctrl_ray.cluster.resources import cluster_facts
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.diffusion.steps import DenoisingKernel
from ctrl_ray.offline.prompts import training_prompts
from ctrl_ray.planning.counts import PolicyCounter, PolicyCounts, StepBytes, StepFlops
from ctrl_ray.planning.fits import memory_fit, remedies
from ctrl_ray.planning.plan import PERSISTENCE_THRESHOLD, RunPlan, keeps_encoder, make_plan
from ctrl_ray.policy.backbones import load_backbone

_FIRST_SIZE = 2
"""Micro-batch that `Planner.estimate` counts where none has been; live bytes are nearly affine in it."""


class Planner:
    """What a config will take.

    planner = Planner(controls, kernel)
    planner.plan(config).memory.peak  # a few seconds for each new combination of sizes, for Stable Diffusion
    planner.estimate(config)  # at once, after the first count
    """

    def __init__(self, controls: Mapping[str, ControlConfig], kernel: DenoisingKernel, *, num_prompts: int = 1) -> None:
        """controls: the policy's, in column order; kernel: the sampler's chain of steps; num_prompts: of the run, different
        ones."""
        self._controls, self._kernel, self._num_prompts = controls, kernel, num_prompts
        self._counters: dict[tuple[str, bool, int, bool], PolicyCounter] = {}

    def plan(self, config: TrainConfig) -> RunPlan:
        """The plan of a config whose values are decided, counted at its sizes."""
        counter = self._counter(config)
        step = counter.step(config.fixed_micro_batch_size)
        evaluation = self._evaluations(config).evaluation(config.evaluation.fixed_batch_size)
        return self._made(config, counter.counts(), step, evaluation)

    def estimate(self, config: TrainConfig) -> RunPlan:
        """The same for any micro-batch size from those that were counted: proportional to the first one, which is too much
        rather than too little, and affine between two."""
        counter = self._counter(config)
        sizes = counter.counted_sizes or [_FIRST_SIZE]
        first, last = counter.step(sizes[0]), counter.step(sizes[-1])
        step = StepBytes(
            **{
                field.name: _between(
                    (sizes[0], getattr(first, field.name)),
                    (sizes[-1], getattr(last, field.name)),
                    config.fixed_micro_batch_size,
                )
                for field in dataclasses.fields(StepBytes)
            }
        )
        evaluation = self._evaluations(config).evaluation(config.evaluation.fixed_batch_size)
        return self._made(config, counter.counts(), step, evaluation)

    def _made(self, config: TrainConfig, counts: PolicyCounts, step: StepBytes, evaluation: int) -> RunPlan:
        with_encoder = keeps_encoder(config, self._num_prompts)
        return make_plan(config, counts, step, evaluation, self._kernel, with_encoder=with_encoder)

    def flops(self, config: TrainConfig) -> StepFlops:
        """Operations of a denoising step of a micro-batch."""
        return self._counter(config).flops(config.fixed_micro_batch_size)

    def counts(self, config: TrainConfig) -> PolicyCounts:
        """Parameters of the policy."""
        return self._counter(config).counts()

    def _evaluations(self, config: TrainConfig) -> PolicyCounter:
        """Without a backward, gradient checkpointing makes no difference: any counter will do."""
        plain = dataclasses.replace(config.scaling, gradient_checkpointing=False)
        key = self._key(dataclasses.replace(config, scaling=plain))
        return self._counters.get(key) or self._counter(config)

    def _counter(self, config: TrainConfig) -> PolicyCounter:
        key = self._key(config)
        if key not in self._counters:
            self._counters[key] = PolicyCounter(config, self._controls, persistence_threshold=key[2])
        return self._counters[key]

    def _key(self, config: TrainConfig) -> tuple[str, bool, int, bool]:
        scaling = config.scaling
        threshold = scaling.zero3_persistence_threshold if scaling.zero_stage == 3 else PERSISTENCE_THRESHOLD
        return scaling.precision, scaling.fixed_gradient_checkpointing, threshold, config.estimator.fixed_keep_graphs


def memory_advice(config: TrainConfig, controls: Mapping[str, ControlConfig]) -> str:
    """What to change where a GPU's memory did not suffice, for people; seconds of counting on the CPU."""
    kernel = load_backbone(config.base_model, config.base_revision, config.sampler).make_kernel(config.sampler)
    planner = Planner(controls, kernel, num_prompts=len(set(training_prompts(config))))
    facts = cluster_facts()
    planned = memory_fit(planner.plan(config), config, facts).reason
    fixes = remedies(config, planner.plan, facts)
    if not fixes:
        return f"The planner counts {planned}, and knows no single setting that lowers it; take larger cards"
    return f"The planner counts {planned}; lower it by one of: {'; '.join(fixes)}"


def _between(first: tuple[int, int], last: tuple[int, int], size: int) -> int:
    """Bytes at `size` on the line through two points (size, bytes), or through the origin where they are one."""
    (low, low_bytes), (high, high_bytes) = (0, 0) if first == last else first, last
    return round(low_bytes + (high_bytes - low_bytes) * (size - low) / (high - low))
