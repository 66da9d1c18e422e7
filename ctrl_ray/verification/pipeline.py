"""An image pipeline against rejection sampling: sample an adapter and its pre-trained model, compare class by class."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from ctrl_ray.cluster.connection import connected
from ctrl_ray.config import ScalingConfig
from ctrl_ray.distributed.sampling import SamplingJob, sample_policy
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.samples import EvaluationSamples, concatenate
from ctrl_ray.policy.adapter import AdapterInfo, read_adapter_info
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.finished import run_classifiers, run_prompts
from ctrl_ray.verification.rejection import compare, format_comparisons, plot_rejection, summary_of
from ctrl_ray.wording import duration

MAX_RATIO = 3.0
"""Bar: Wasserstein distance of the measured value, in noise floors."""

_POOL_IDS, _TUNED_IDS = 1 << 22, 1 << 23
_CHUNK = 1024


def verify_pipeline(folder: Path, *, adapter: str, num_samples: int, seed: int) -> bool:
    """Print and write the comparison of an adapter's samples with rejection samples; whether the bar is met.

    Raises ConfigError for an adapter that was trained at another strength than kl_coef.
    """
    info = read_adapter_info(adapter)
    for name, control in info.controls.items():
        if control.guidance_strength != info.training.get("kl_coef", 1.0):
            raise ConfigError(
                f"adapter {adapter} was trained for {name} with guidance_strength {control.guidance_strength:g} and "
                f"kl_coef {info.training.get('kl_coef')}; rejection gives exact samples only where they are equal"
            )
    classes = max(control.num_classes for control in info.controls.values())
    with connected():
        tuned = _sample(info, adapter, range(_TUNED_IDS, _TUNED_IDS + classes * num_samples), seed, reference=False)
        pool = _sample(info, adapter, range(_POOL_IDS, _POOL_IDS + 2 * classes * num_samples), seed, reference=True)
    folder.mkdir(parents=True, exist_ok=True)
    met, everything = True, {}
    for column, (name, control) in enumerate(info.controls.items()):
        comparisons = compare(pool, tuned, name, control, column=column, seed=seed)
        print(f"\n{name}, {comparisons[0].num_samples} samples of each class on each side")
        print(format_comparisons(comparisons, control.class_names))
        everything[name] = summary_of(comparisons)
        met &= all(
            c.ratio <= MAX_RATIO for c in comparisons if (c.statistic, c.distance) == ("measured", "Wasserstein")
        )
        if control.oracle:
            print(
                "picture", plot_rejection(folder / f"rejection_{name}.png", pool, tuned, name, control, column=column)
            )
    (folder / "rejection.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    print(f"Wasserstein distance at most {MAX_RATIO:g} × the noise floor in every class: {'yes' if met else 'NO'}")
    return met


def _sample(info: AdapterInfo, adapter: str, ids: range, seed: int, *, reference: bool) -> EvaluationSamples:
    job = SamplingJob(
        adapter=str(Path(adapter).resolve()),
        base_model=info.base_model,
        revision=info.base_revision,
        controls=info.controls,
        sampler=info.sampler,
        prompts=run_prompts(adapter, info.base_model),
        sample_ids=(),
        seed=seed + 2_000_003,
        batch_size=128,
        reference=reference,
        with_kl=False,
    )
    rewards = RewardModelSpec(
        base_model=info.base_model,
        revision=info.base_revision,
        classifiers=run_classifiers(adapter, list(info.controls), {}),
    )
    scaling = ScalingConfig(threads_per_worker=2)
    parts, started = [], time.monotonic()
    for first in range(0, len(ids), _CHUNK):
        part = dataclasses.replace(job, sample_ids=tuple(ids[first : first + _CHUNK]))
        parts.append(sample_policy(part, rewards, scaling))
        done = first + len(part.sample_ids)
        left = duration((time.monotonic() - started) / done * (len(ids) - done))
        kind = "pre-trained" if reference else "fine-tuned"
        print(f"{done}/{len(ids)} {kind} samples · {left} left", flush=True)
    return concatenate(parts)
