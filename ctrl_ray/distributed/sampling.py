"""Samples of a policy and of the pre-trained model, on Ray, with the same prompts and noise."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from ctrl_ray.baselines.sampler import Baseline
from ctrl_ray.candidates.weights import log_tilts
from ctrl_ray.cluster.shared_storage import copies_of
from ctrl_ray.cluster.waiting import ClusterWait
from ctrl_ray.config import ControlConfig, Precision, SamplerConfig, ScalingConfig
from ctrl_ray.diffusion.noise import draw_noise
from ctrl_ray.diffusion.steps import DenoisingKernel, Guidance
from ctrl_ray.distributed.batches import Batch, evaluation_batch
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.errors import naming_memory
from ctrl_ray.evaluation.certificate import exponents_of
from ctrl_ray.evaluation.samples import EvaluationSamples, concatenate
from ctrl_ray.gradients.rollout import NoiseSource, Sampler, Trajectory, keyed_noise, rollout, rows_per_image
from ctrl_ray.gradients.variance_cost import LogTilt, variance_cost
from ctrl_ray.policy.adapter import check_base_model, read_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import load_adapted_policy, load_policy_on
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.precision import set_float32_precision
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model
from ctrl_ray.runs.copies import FolderCopy, folder_here

NUM_MIRRORED = 8
"""Pairs of next latents on each path, where the variances' cost is measured."""
_LOOK_EVERY_S = 1.0
_IMPORT_S = 45.0
"""A worker may import its libraries for so long before it says that it has room."""


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """What to sample."""

    adapter: str | None
    """Adapter folder; None: the pre-trained model."""
    base_model: str
    revision: str | None
    controls: Mapping[str, ControlConfig]
    """In column order of the labels that come back; the policy's own controls beyond them are null."""
    sampler: SamplerConfig
    prompts: tuple[str, ...]
    sample_ids: tuple[int, ...]
    seed: int
    batch_size: int
    reference: bool
    """Sample the pre-trained model instead of the adapter's policy (labels are still recorded)."""
    with_kl: bool = True
    with_images: bool = True
    """Decode the samples to be looked at; without, the images that come back have no pixels."""
    fork_at: int | None = None
    """From this denoising step on, other noise: with the samples of None, pairs of paths that part there. 0: they share x_T."""
    draw: Sampler = rollout
    """How trajectories are drawn; a module's function, which travels by name."""
    variance_cost_at: float | None = None
    """KL coefficient of a target: also measure what fixed step variances cost against it (`gradients.variance_cost`). That
    takes a graph of the denoiser, so `batch_size` is to be a micro-batch of training then."""
    gradient_checkpointing: bool = False
    """As in training; without a graph it changes nothing."""
    precision: Precision = "fp32"
    adapter_scale: float = 1.0
    """Scales LoRA and control embeddings, as `python -m ctrl_ray.sample --adapter-scale` does."""
    copies: Mapping[str, FolderCopy] = field(default_factory=dict, repr=False)
    """Folders of the adapter and of the sampler by value, for hosts that do not have them; `sample_policy` sets it where it is
    needed."""


def sample_policy(
    job: SamplingJob, rewards: PooledRewards | RewardModelSpec, scaling: ScalingConfig
) -> EvaluationSamples:
    """Sample `job` on `scaling.num_workers` Ray actors and return the decoded, believed samples in id order.

    Sample i depends on (seed, i) alone: not on the number of workers or on the batch size. Says what it waits for while none
    of the actors has room, and raises ResourceError after `scaling.placement_timeout_s`.
    """
    count = min(scaling.fixed_num_workers, len(job.sample_ids))
    job = with_copies(job)
    if isinstance(rewards, RewardModelSpec):
        rewards = dataclasses.replace(rewards, copies=copies_of(list(rewards.classifiers.values())))
    remote = sampling_task(_started_then_sampled, scaling, num_returns="streaming")
    streams = [
        remote.remote(
            dataclasses.replace(job, sample_ids=job.sample_ids[rank::count]),
            rewards.for_worker(rank) if isinstance(rewards, PooledRewards) else rewards,
            "cuda" if scaling.use_gpu else "cpu",
        )
        for rank in range(count)
    ]
    asked = {kind: count * amount for kind, amount in scaling.worker_resources.items()}
    limit = scaling.placement_timeout_s + _IMPORT_S
    wait = ClusterWait(asked, limit, _say, waits=lambda: True, patience_s=_IMPORT_S)
    samples = concatenate(_collected(streams, wait))
    return samples.select(np.argsort(samples.sample_ids, kind="stable"))


def with_copies(job: SamplingJob) -> SamplingJob:
    """With the folders that its workers read, by value, where they may be on another host."""
    read = [] if job.adapter is None else [job.adapter]
    if isinstance(job.draw, Baseline):
        read += job.draw.folders
    return dataclasses.replace(job, copies=copies_of(read)) if read else job


def drawing_of(job: SamplingJob) -> Sampler:
    """How it draws on this host."""
    if not isinstance(job.draw, Baseline):
        return job.draw
    return job.draw.reading([folder_here(folder, job.copies) for folder in job.draw.folders])


def sampling_task(function: Callable[..., Any], scaling: ScalingConfig, **options: Any) -> Any:
    """`function` as a Ray task with the resources and the environment of one of the workers that sample."""
    worker = scaling.worker_resources
    return ray.remote(function).options(
        num_cpus=worker["CPU"],
        num_gpus=worker.get("GPU", 0.0),
        max_retries=scaling.max_failures,
        scheduling_strategy="DEFAULT",  # not the placement group of a Tune trial, which holds its driver alone
        runtime_env={"env_vars": worker_environment(use_gpu=scaling.use_gpu, num_threads=scaling.num_threads)},
        **options,
    )


def _collected(streams: list[Any], wait: ClusterWait) -> list[EvaluationSamples]:
    """What the streams of `_started_then_sampled` end with; polls `wait` until the first of them has begun. After an error
    none of them goes on."""
    parts: list[EvaluationSamples] = []
    open_streams, begun = list(streams), False
    try:
        while open_streams:
            timeout = None if begun else _LOOK_EVERY_S
            ready: list[Any] = ray.wait(open_streams, num_returns=1, timeout=timeout, fetch_local=False)[0]
            for stream in ready:
                begun = True
                item = ray.get(next(stream))
                if item is not None:
                    parts.append(item)
                    open_streams.remove(stream)
            if not begun:
                wait.poll()
    except BaseException:
        for stream in open_streams:
            ray.cancel(stream)
        raise
    return parts


def _say(line: str) -> None:
    print(line, flush=True)


def _started_then_sampled(
    job: SamplingJob, rewards: PooledRewards | RewardModelSpec, device: str
) -> Iterator[EvaluationSamples | None]:
    yield None  # it has room
    yield _sample_part(job, rewards, device)


def job_noise(job: SamplingJob, ids: Sequence[int], shape: Sequence[int], num_steps: int, device: str) -> NoiseSource:
    """The noise of some samples of a job."""
    shared = keyed_noise(job.seed, 0, ids, shape, num_steps, device)
    if job.fork_at is None:
        return shared
    fork, other = job.fork_at, keyed_noise(job.seed, 1, ids, shape, num_steps, device)
    return lambda index: (shared if index <= fork else other)(index)


@naming_memory("sampling for an evaluation")
def _sample_part(job: SamplingJob, rewards: PooledRewards | RewardModelSpec, device: str) -> EvaluationSamples:
    scorer = prepare_process(job, rewards, device)
    policy, controls, kernel = load_policy(job)
    if job.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    encoder = policy.backbone.load_encoder(device).only(job.prompts)  # before the policy is on the device too
    policy.to(device)
    guidance = Guidance.of(job.sampler)
    draw = drawing_of(job)
    parts = []
    size = max(1, job.batch_size // rows_per_image(job.draw))
    for start in range(0, len(job.sample_ids), size):
        ids = job.sample_ids[start : start + size]
        batch = evaluation_batch(ids, job.prompts, controls, tuple(job.controls))
        trajectory = draw(
            policy,
            kernel,
            Inputs(encoder.encode(batch.prompts), batch.labels.to(device), guidance),
            job_noise(job, ids, policy.latent_shape, kernel.num_steps, device),
            scorer,
            reference=job.reference,
            with_kl=job.with_kl,
        )
        samples = _judged(job, batch, trajectory, scorer)
        if job.variance_cost_at is not None:
            noise = draw_noise(job.seed, 0, ids, "variance cost", (NUM_MIRRORED, *policy.latent_shape), device=device)
            tilt = _log_tilt(exponents_of(job.controls, job.variance_cost_at), batch, scorer)
            cost = variance_cost(policy, kernel, trajectory, tilt, noise.transpose(0, 1))
            samples = dataclasses.replace(samples, variance_cost=cost.cpu().numpy())
        parts.append(samples)
    return concatenate(parts)


def prepare_process(job: SamplingJob, rewards: PooledRewards | RewardModelSpec, device: str) -> Any:
    """Set this process's precision and threads for a job; returns the rewards, loaded where only their spec is given."""
    set_float32_precision(job.precision)
    if isinstance(rewards, RewardModelSpec):
        rewards = LocalRewards(load_reward_model(dataclasses.replace(rewards, device=device)))  # type: ignore[assignment]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return rewards


def _judged(job: SamplingJob, batch: Batch, trajectory: Trajectory, scorer: Any) -> EvaluationSamples:
    latents, kl, ratio = trajectory.clean_latents, trajectory.kl_per_step, trajectory.log_ratio
    believed = scorer.class_log_probs(latents, batch.prompts)
    per_step = None if kl is None else kl.double().cpu().numpy()
    return EvaluationSamples(
        images=scorer.decode(latents).cpu().numpy() if job.with_images else np.empty((len(batch), 0, 0, 3), np.uint8),
        prompts=batch.prompts,
        labels=batch.labels[:, : len(job.controls)].numpy(),
        kl=np.full(len(batch), np.nan) if per_step is None else per_step.sum(1),
        class_log_probs={name: believed[name].float().cpu().numpy() for name in job.controls},
        sample_ids=np.array(batch.sample_ids, dtype=np.int64),
        kl_per_step=per_step,
        log_ratio=None if ratio is None else ratio.cpu().numpy(),
    )


def _log_tilt(exponents: Mapping[str, float], batch: Batch, rewards: Any) -> LogTilt:
    """Σ_c γ_c / β log p_c of what the batch asks for; a null label counts for nothing."""

    def log_tilt(latents: Tensor) -> Tensor:
        believed = rewards.class_log_probs(latents, batch.prompts)
        tilts = log_tilts({name: believed[name].cpu().numpy() for name in exponents}, batch.labels.numpy(), exponents)
        return torch.from_numpy(tilts).to(latents.device)

    return log_tilt


def load_policy(job: SamplingJob) -> tuple[ControlledPolicy, dict[str, ControlConfig], DenoisingKernel]:
    """(policy, its controls in column order, kernel): from the adapter, or untouched when there is none."""
    backbone = load_backbone(job.base_model, job.revision, job.sampler)
    controls = dict(job.controls)
    if job.adapter is None:
        counts = {name: control.num_classes for name, control in controls.items()}
        policy = load_policy_on(backbone, counts, lora=None, precision=job.precision)
        return policy.eval(), controls, backbone.make_kernel(job.sampler)
    adapter = folder_here(job.adapter, job.copies)
    info = read_adapter_info(adapter)
    check_base_model(info, backbone)
    for name, control in info.controls.items():
        controls.setdefault(name, control)
    controls = {name: info.controls.get(name, control) for name, control in controls.items()}
    counts = {name: control.num_classes for name, control in controls.items()}
    policy = load_adapted_policy(adapter, info, backbone, counts, job.precision)
    policy.scale_adapter(job.adapter_scale)
    return policy.eval(), controls, backbone.make_kernel(job.sampler, info.scheduler)


def evaluation_ids(num_samples: int) -> Sequence[int]:
    """Ids of the final evaluation; they start where the evaluations during training never reach."""
    first = 1 << 20
    return tuple(range(first, first + num_samples))
