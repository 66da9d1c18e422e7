"""The plan of a run: memory of a worker, network traffic and denoiser calls of an update, as pure functions.

Bytes are tensor bytes of one worker. What DeepSpeed 0.19 keeps at each ZeRO stage, for trainable float32 parameters of P
bytes on N workers, read from its source:

    stage   weights       master copies   gradients    moments   communication
    0       P             0               P            m P       one flat copy of the gradients at the update
    1       P             P / N           P            m P / N   one bucket
    2       P             P / N           2 P / N      m P / N   one bucket
    3       P / N         P / N           P / N        m P / N   one bucket, and the parameters gathered at a time

with m moments a parameter: 2 for AdamW, 1 for SGD.
Frozen weights are whole in stages 0 to 2 and sharded in stage 3.

On paper, for many H100: Stable Diffusion 1.5 at 512 px with guidance, 3.2 million trained elements, ZeRO-1, 50 steps, two
micro-batches of 8 a worker. By the counted operations and the utilisation of `planning.cost` an update computes for 37 s.

    workers   a worker sends in an update, MB                                     requests / s   dispatchers   cards that score
              gradients   updated weights   to the pool   and gets from it
    256       25.5        12.8              1.05          1.05                    14             2             6
    1024      25.6        12.8              1.05          1.05                    55             8             24

At 10 GB/s a card (a machine of eight has 50) weights and gradients take 4 ms. A ring of 1024 cards has 3 · 1023 hops; at
20 µs a hop that is 61 ms, .2 % of the update. Each scoring card gets and sends 1.2 MB/s. So neither grows into the update; what
does is one worker that is slow, for which all wait at the update's end, and what no plan knows: the loss of machines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctrl_ray.config import TrainConfig
from ctrl_ray.diffusion.steps import NO_GUIDANCE, Guidance, StepKernel
from ctrl_ray.gradients.adjoint import Calls
from ctrl_ray.gradients.estimators import make_estimator
from ctrl_ray.planning.counts import PolicyCounts, StepBytes
from ctrl_ray.planning.deepspeed_config import MOMENTS, deepspeed_config
from ctrl_ray.policy.backbones.text import CACHED_PROMPTS

FLOAT = 4
DEFAULT_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size where the configuration sets none."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters where the configuration sets none."""
PERSISTENCE_THRESHOLD = 100_000
"""DeepSpeed's stage3_param_persistence_threshold where the configuration sets none."""
NUM_DENOISED = 3
"""Tensors like the latents that a method without trajectories holds: clean, their noise, and noised."""
_PLANS_AVERAGED = 64


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Tensor bytes of one worker in an adjoint pass, row by row, and the peaks of all phases of a run."""

    frozen_weights: int
    """Without the reference copy and the prompt encoder."""
    reference_weights: int
    """The frozen copy that full fine-tuning compares with."""
    trainable_weights: int
    prompt_encoder: int
    """Features of the empty prompt (those of the others are kept on the CPU); with `keeps_encoder` the text encoder too."""
    reward_model: int
    """VAE of local rewards (rewards.num_actors = 0), float32; the classifiers are not counted."""
    master_weights: int
    """Float32 copies of this worker's partition (ZeRO 1 to 3)."""
    gradients: int
    optimizer: int
    """AdamW's two moments, or SGD's momentum."""
    communication: int
    """DeepSpeed's reduction bucket; under ZeRO-3 also the parameters gathered at a time."""
    activations: int
    """Forwards and backwards of one denoising step, at their peak; with estimator.keep_graphs also the graphs of all other
    steps, and of the micro-batch that is scored meanwhile."""
    policy_kept: int
    """Of the activations: what the policy's forward keeps for its backward."""
    reference_kept: int
    """Of the activations: what the reference's forward keeps."""
    latents: int
    """(T + 1) latents of the micro-batch and T means where the estimator keeps them, twice where one more is in flight while
    the pool scores; without trajectories NUM_DENOISED."""
    requests: int
    """Reward cotangents (none without trajectories) and encoded prompts of the micro-batches under way."""
    rollout_peak: int
    """All of the worker's tensors while a trajectory is rolled out; 0 for a method that draws none."""
    update_peak: int
    """All of the worker's tensors during the optimizer step."""
    evaluation_peak: int
    """All of the worker's tensors during an evaluation."""
    scoring_peak: int = 0
    """All of the worker's tensors while it scores a micro-batch itself (local rewards; a method without trajectories scores in
    evaluations only); the classifiers are not counted."""
    encoding_peak: int = 0
    """The text encoder, which encodes the run's prompts before anything else is there."""
    offloaded: int = 0
    """Master copies, gradients and moments in host memory (optimizer offload); not part of the rows above."""

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return (
            self.frozen_weights
            + self.reference_weights
            + self.trainable_weights
            + self.prompt_encoder
            + self.reward_model
            + self.master_weights
            + self.optimizer
        )

    @property
    def backward_peak(self) -> int:
        """All of the worker's tensors during the adjoint pass: the sum of the rows."""
        return self.resident + self.gradients + self.communication + self.activations + self.latents + self.requests

    @property
    def peak(self) -> int:
        """The largest of all phases."""
        return max(
            *(self.backward_peak, self.rollout_peak, self.update_peak, self.evaluation_peak, self.scoring_peak),
            self.encoding_peak,
        )


@dataclass(frozen=True, kw_only=True)
class TrafficPlan:
    """Bytes that one worker sends in an update (ring collectives; it receives as many)."""

    reduction: int
    """Gradients."""
    gather: int
    """Updated weights after the step (ZeRO 1 and 2); parameters before every forward and backward (ZeRO 3)."""
    num_reductions: int
    """How often the gradients are reduced: once, or at every backward under ZeRO 2 and 3."""
    reward_requests: int
    """Latents, labels, weights and prompts to the pool; 0 with local rewards."""
    reward_answers: int
    """Log-probabilities and cotangents from the pool."""


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """Denoiser calls of an update: of one worker, each with a whole micro-batch and all its guidance branches."""

    forwards: float
    backwards: float
    parameter_backwards: float
    """Those that make parameter gradients (one reduction each under ZeRO 2 and 3)."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will take."""

    memory: MemoryPlan
    traffic: TrafficPlan
    calls: CallPlan
    actor_bytes: int
    """One reward actor: the decoder's weights and a chunk of images with its gradient; its classifiers come on top."""
    evaluation_bytes: int = 0
    """A process that only evaluates (asynchronous evaluation, the samples before and after training)."""


def keeps_encoder(config: TrainConfig, num_prompts: int) -> bool:
    """Whether the text encoder stays in a worker's memory when the run's prompts are encoded (`worker.load_prompts`)."""
    return not config.draws_trajectories or num_prompts >= CACHED_PROMPTS


def make_plan(
    config: TrainConfig,
    counts: PolicyCounts,
    step: StepBytes,
    evaluation: int,
    kernel: StepKernel,
    *,
    with_encoder: bool = False,
) -> RunPlan:
    """The plan of a config whose values are decided. `step` was counted at its micro-batch size, `evaluation` (bytes of one
    step of an evaluation) at its evaluation's batch size. with_encoder: `keeps_encoder`."""
    calls, decoder = call_plan(config, kernel), counts.decoder
    return RunPlan(
        memory=memory_plan(config, counts, step, evaluation, with_encoder=with_encoder),
        traffic=traffic_plan(config, counts, calls),
        calls=calls,
        actor_bytes=decoder.weights + _chunk(config) * decoder.with_gradient,
        evaluation_bytes=_evaluation_process(config, counts, evaluation, with_encoder),
    )


def memory_plan(
    config: TrainConfig, counts: PolicyCounts, step: StepBytes, evaluation: int, *, with_encoder: bool = False
) -> MemoryPlan:
    """Tensor bytes of one worker; see the table at the top of the module, and `make_plan` for the arguments."""
    stage, workers = config.scaling.zero_stage, config.scaling.fixed_num_workers
    zero = zero_options(config, counts.trainable_elements)
    trained, frozen = counts.trainable_bytes, counts.frozen_bytes - counts.reference_bytes
    shard = math.ceil(trained / workers)
    num_moments = len(MOMENTS[config.optimizer.name])
    master, moments = (shard, num_moments * shard) if stage else (0, num_moments * trained)
    gradients = {0: trained, 1: trained, 2: 2 * shard, 3: shard}[stage]
    bucket = FLOAT * int(zero["reduce_bucket_size"]) if stage else 0
    weights = {"frozen": frozen, "reference": counts.reference_bytes, "trained": trained}
    gathered = 0
    if stage == 3:
        weights, gathered = _partitioned(weights, counts, workers, int(zero["stage3_max_live_parameters"]))
    offload = _offloads(zero)
    offloaded = master + moments + shard if offload and stage else 0
    if offloaded:
        master = moments = 0
    batch = config.fixed_micro_batch_size
    latents = FLOAT * batch * counts.latent_elements
    draws = config.draws_trajectories
    num_steps = config.sampler.num_steps
    path = (num_steps + 1 if draws else NUM_DENOISED) * latents
    means = num_steps * latents if keeps_means(config) else 0
    trajectory = path + means
    in_flight = min(2, config.num_micro_batches) if draws else 1
    prompts = batch * counts.prompt_bytes
    encoder = (counts.encoder_bytes if with_encoder else 0) + counts.prompt_bytes
    local = config.rewards.num_actors == 0
    local_rewards = counts.decoder.weights if local else 0
    resident = sum(weights.values()) + encoder + local_rewards + master + moments
    kept_buffers = bucket if stage == 3 else 0
    graphs = (num_steps - config.sampler.reference_steps) * step.graph_kept
    waiting = (in_flight - 1) * (trajectory + prompts + graphs)
    always = resident + gradients + kept_buffers + gathered
    other_graphs = graphs - step.graph_kept
    rollout = 3 * path + 2 * means + prompts + other_graphs + step.rollout_peak  # noise; what is kept, and its stack
    scoring = trajectory + prompts + graphs + min(_chunk(config), batch) * counts.decoder.with_gradient
    evaluated = 0 if config.evaluation.asynchronous else always + _evaluating(config, counts, evaluation)
    return MemoryPlan(
        frozen_weights=weights["frozen"],
        reference_weights=weights["reference"],
        trainable_weights=weights["trained"],
        prompt_encoder=encoder,
        reward_model=local_rewards,
        master_weights=master,
        gradients=gradients,
        optimizer=moments,
        communication=bucket + gathered,
        activations=step.backward_peak + other_graphs + (in_flight - 1) * graphs,
        policy_kept=step.policy_kept,
        reference_kept=step.reference_kept,
        latents=in_flight * trajectory,
        requests=in_flight * prompts + (2 * latents if draws else 0),
        rollout_peak=always + waiting + rollout if draws else 0,
        update_peak=resident + gradients + _update_extra(config, counts, shard, bucket),
        evaluation_peak=max(evaluated, _evaluation_process(config, counts, evaluation, with_encoder)),
        scoring_peak=always + waiting + scoring if local and draws else 0,
        encoding_peak=counts.encoder_bytes,
        offloaded=offloaded,
    )


def keeps_means(config: TrainConfig) -> bool:
    """Whether a micro-batch's rollout keeps the means of its steps beside the latents."""
    return config.draws_trajectories and make_estimator(config.estimator, config.sampler.num_steps).keep_means


def _chunk(config: TrainConfig) -> int:
    """Images that are decoded at a time: a request has no more than a micro-batch."""
    return min(config.rewards.fixed_decode_chunk_size, config.fixed_micro_batch_size)


def _evaluating(config: TrainConfig, counts: PolicyCounts, step: int) -> int:
    """A batch of an evaluation, beyond what is resident: its trajectories, then its images where rewards are local."""
    batch = config.evaluation.fixed_batch_size
    trajectory = FLOAT * batch * counts.latent_elements * (config.sampler.num_steps + 1)
    chunk = min(config.rewards.fixed_decode_chunk_size, batch) if config.rewards.num_actors == 0 else 0
    images = trajectory + chunk * counts.decoder.without_gradient
    return batch * counts.prompt_bytes + max(3 * trajectory + step, images)


def _evaluation_process(config: TrainConfig, counts: PolicyCounts, step: int, with_encoder: bool) -> int:
    """A process that evaluates and does not train: whole weights, no optimizer."""
    weights = counts.frozen_bytes + counts.trainable_bytes + counts.prompt_bytes
    weights += counts.encoder_bytes if with_encoder else 0
    local = counts.decoder.weights if config.rewards.num_actors == 0 else 0
    return max(counts.encoder_bytes, weights + local + _evaluating(config, counts, step))


def zero_options(config: TrainConfig, trained_elements: int) -> dict[str, Any]:
    """The run's `zero_optimization` section with DeepSpeed's defaults for the sizes that decide memory."""
    return {
        "reduce_bucket_size": DEFAULT_BUCKET_ELEMENTS,
        "stage3_max_live_parameters": MAX_LIVE_ELEMENTS,
        "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        **deepspeed_config(config, trained_elements)["zero_optimization"],
    }


def _offloads(zero: Mapping[str, Any]) -> bool:
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def _partitioned(
    weights: Mapping[str, int], counts: PolicyCounts, workers: int, max_live_elements: int
) -> tuple[dict[str, int], int]:
    """ZeRO-3: (weights by kind, bytes gathered at a time). Small parameters stay whole, spread over the kinds."""
    total = sum(weights.values())
    whole = counts.unpartitioned_bytes / total
    kept = {kind: math.ceil(size * (whole + (1 - whole) / workers)) for kind, size in weights.items()}
    bytes_per_element = total / counts.elements
    gathered = min(total - counts.unpartitioned_bytes, max_live_elements * bytes_per_element)
    return kept, int(max(gathered, min(counts.largest_bytes, total - counts.unpartitioned_bytes)))


def _update_extra(config: TrainConfig, counts: PolicyCounts, shard: int, bucket: int) -> int:
    """The optimizer step, beyond weights, moments and gradients: reduction, a flat gradient, AdamW's temporaries."""
    if config.scaling.zero_stage == 0:
        tensor = counts.trainable_bytes if config.scaling.use_gpu else FLOAT * counts.largest_trainable
        return max(counts.trainable_bytes, 2 * tensor)
    return max(bucket + shard, 3 * shard)


def call_plan(config: TrainConfig, kernel: StepKernel) -> CallPlan:
    """Denoiser calls of a worker in an update; the mean over plans where the estimator draws them."""
    calls = mean_calls(config, kernel)
    scale = config.num_micro_batches
    return CallPlan(
        forwards=calls.forwards * scale,
        backwards=calls.backwards * scale,
        parameter_backwards=calls.parameter_backwards * scale,
    )


def mean_calls(config: TrainConfig, kernel: StepKernel) -> Calls:
    """Denoiser calls of a micro-batch's trajectory and its adjoint pass, by the estimator; the mean over its plans. Those of a
    method without trajectories are one forward and one backward."""
    if not config.draws_trajectories:
        return Calls(1, 1, 1)
    num_steps = kernel.num_steps
    estimator = make_estimator(config.estimator, num_steps)
    plans = [estimator.plan(num_steps, config.seed, update, 0) for update in range(_PLANS_AVERAGED)]
    return Calls(*(sum(counts) / len(plans) for counts in zip(*(estimator.calls(p, kernel) for p in plans))))


def traffic_plan(config: TrainConfig, counts: PolicyCounts, calls: CallPlan) -> TrafficPlan:
    """Bytes a worker sends in an update. A ring all-reduce of S bytes sends 2 (N − 1)/N S, an all-gather or a
    reduce-scatter (N − 1)/N S; DeepSpeed's stages 0 to 2 all-reduce."""
    stage, workers = config.scaling.zero_stage, config.scaling.fixed_num_workers
    ring = (workers - 1) / workers
    reductions = 1 if stage < 2 else round(calls.parameter_backwards)
    per_reduction = (2 if stage < 3 else 1) * ring * counts.trainable_bytes
    sharded = counts.trainable_bytes + counts.frozen_bytes - counts.unpartitioned_bytes
    gather = {0: 0.0, 1: 1.0, 2: 1.0, 3: calls.forwards + calls.backwards}[stage]
    if stage == 3:  # a call reads the policy or its reference copy, not both
        sharded -= counts.reference_bytes
    gathered = sharded if stage == 3 else counts.trainable_bytes
    columns = len(config.controls)
    asks_pool = config.draws_trajectories and config.rewards.num_actors > 0
    samples = math.ceil(config.global_batch_size / workers) if asks_pool else 0
    return TrafficPlan(
        reduction=round(reductions * per_reduction) if workers > 1 else 0,
        gather=round(gather * ring * gathered),
        num_reductions=reductions if workers > 1 else 0,
        reward_requests=samples * (FLOAT * counts.latent_elements + (8 + FLOAT) * columns + _PROMPT_BYTES),
        reward_answers=samples * (FLOAT * counts.latent_elements + FLOAT * columns),
    )


_PROMPT_BYTES = 32
"""A short prompt as text; beside the latents it hardly counts."""


def num_branches(config: TrainConfig) -> int:
    """Denoiser rows per sample of an update; a method without trajectories trains without guidance."""
    return training_guidance(config).num_branches


def training_guidance(config: TrainConfig) -> Guidance:
    """The guidance of an update's denoiser calls."""
    return Guidance.of(config.sampler) if config.draws_trajectories else NO_GUIDANCE
