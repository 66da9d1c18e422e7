"""Drawing and timing as Ray tasks; what is drawn is kept in parts, so that a comparison that is killed goes on where it was.

A part's place is a hash of all that its images depend on: settings, seeds, and the files of adapter and classifiers. What two
methods share, such as plain samples, is drawn once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from ctrl_ray.baselines.methods import make_sampler
from ctrl_ray.cluster.shared_storage import copies_of
from ctrl_ray.comparison.cost import Calls, Cost, CountedPolicy, CountedRewards, timed_pairs
from ctrl_ray.comparison.methods import Setting
from ctrl_ray.config import ScalingConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.distributed.sampling import (
    SamplingJob,
    drawing_of,
    job_noise,
    load_policy,
    prepare_process,
    sample_policy,
    sampling_task,
    with_copies,
)
from ctrl_ray.evaluation.samples import EvaluationSamples, concatenate, load_samples, save_samples
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.files import whole_file, write_whole
from ctrl_ray.verification.drawing import files_below

PART_UNITS = 4096.0
"""Nominal cost of a part, in plain samples: what a kill loses at most."""
_FEWEST_A_PART = 16
_NOT_SEEN = ("sample_ids", "batch_size", "copies")
"""Fields of a job that leave sample i as it is."""


def job_of(base: SamplingJob, setting: Setting, adapter: str | None, exponents: tuple[float, ...]) -> SamplingJob:
    """`base` drawn by one setting of a method. exponents: λ of each control, in the order of the labels."""
    sampler = base.sampler
    if setting.control_scale is not None:
        sampler = dataclasses.replace(sampler, control_scale=setting.control_scale)
    return dataclasses.replace(
        base,
        adapter=adapter,
        reference=adapter is None,
        adapter_scale=setting.adapter_scale,
        sampler=sampler,
        draw=make_sampler(setting.method, exponents, list(base.controls)),
    )


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Draws jobs, times them, and keeps both below `folder`."""

    rewards: RewardModelSpec
    scaling: ScalingConfig
    folder: Path
    drawn: Callable[[float, float | None], None]
    """Told the nominal cost of a part, in plain samples, and the seconds it took; None: it was there."""
    timing_s: float
    """As in `plan.Budget`."""

    def draw(self, job: SamplingJob, cost: float) -> EvaluationSamples:
        """The job's samples: parts that are there are read, the others drawn. cost: nominal, of an image."""
        size = max(_FEWEST_A_PART, int(PART_UNITS / cost))
        folder = self.folder / "samples" / self.key(job)
        parts = []
        for start in range(0, len(job.sample_ids), size):
            ids = job.sample_ids[start : start + size]
            file = folder / f"{ids[0]}-{len(ids)}.safetensors"
            started = None if file.is_file() else time.monotonic()
            if started is not None:
                samples = sample_policy(dataclasses.replace(job, sample_ids=ids), self.rewards, self.scaling)
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as draft:
                    save_samples(samples, draft)
            parts.append(load_samples(file))
            self.drawn(len(ids) * cost, None if started is None else time.monotonic() - started)
        return concatenate(parts)

    def time(self, job: SamplingJob, plain: SamplingJob) -> Cost:
        """What an image of a job costs, beside plain sampling, in one Ray task that has its worker for itself."""
        ids = job.sample_ids
        file = self.folder / "cost" / f"{self.key(job)}-{ids[0]}-{ids[-1]}-{len(ids)}.json"
        if file.is_file():
            return _cost_of(json.loads(file.read_text(encoding="utf-8")))
        job, plain = with_copies(job), with_copies(plain)
        rewards = dataclasses.replace(self.rewards, copies=copies_of(list(self.rewards.classifiers.values())))
        device = "cuda" if self.scaling.use_gpu else "cpu"
        cost: Cost = ray.get(sampling_task(time_job, self.scaling).remote(job, plain, rewards, device, self.timing_s))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(dataclasses.asdict(cost), indent=2) + "\n")
        return cost

    def key(self, job: SamplingJob) -> str:
        """Name of what a job draws; two jobs with the same one draw the same samples."""
        fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.name not in _NOT_SEEN}
        draw = fields.pop("draw")
        known = {
            "job": {name: repr(value) for name, value in fields.items()},
            "draw": getattr(draw, "__qualname__", None) or repr(draw),  # a function's repr holds its address
            "files": [files_below(folder) for folder in (job.adapter, *self.rewards.classifiers.values())],
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def time_job(job: SamplingJob, plain: SamplingJob, rewards: RewardModelSpec, device: str, timing_s: float) -> Cost:
    """Time `job` and `plain` in turn in this process, each drawing the images of `job.sample_ids` at once, decoded."""
    scorer = prepare_process(job, rewards, device)
    calls = Calls()
    return timed_pairs(
        _run(job, scorer, calls, device),
        _run(plain, scorer, Calls(), device),
        len(job.sample_ids),
        calls,
        long_enough_s=timing_s,
    )


def _run(job: SamplingJob, scorer: Any, calls: Calls, device: str) -> Callable[[], None]:
    """One call draws and decodes the job's samples; the KL is not asked for."""
    policy, controls, kernel = load_policy(job)
    policy.to(device)
    draw = drawing_of(job)
    batch = evaluation_batch(job.sample_ids, job.prompts, controls, tuple(job.controls))
    condition = policy.backbone.load_encoder(device).encode(batch.prompts)
    inputs = Inputs(condition, batch.labels.to(device), Guidance.of(job.sampler))
    counted, rewards = CountedPolicy(policy, calls), CountedRewards(scorer, calls)

    def run() -> None:
        noise = job_noise(job, job.sample_ids, policy.latent_shape, kernel.num_steps, device)
        with torch.no_grad(), policy.folded(inputs):
            path = draw(counted, kernel, inputs, noise, rewards, reference=job.reference)
        rewards.decode(path.clean_latents).cpu()

    return run


def _cost_of(row: dict[str, Any]) -> Cost:
    low, high = row.pop("ratio_range")
    return Cost(ratio_range=(low, high), **row)
