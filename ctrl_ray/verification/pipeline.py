"""Any adapter against exact samples of its target: sample it and its pre-trained model, compare joint class by joint class."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ctrl_ray.cluster.connection import connected
from ctrl_ray.config import ControlConfig, ScalingConfig
from ctrl_ray.distributed.sampling import SamplingJob
from ctrl_ray.errors import DataError
from ctrl_ray.policy.adapter_info import AdapterInfo, read_adapter_info
from ctrl_ray.policy.build import check_adapter
from ctrl_ray.policy.precision import sampling_precision
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.files import write_whole
from ctrl_ray.runs.finished import run_classifiers, run_prompts
from ctrl_ray.verification.distances import Comparison, compare, own_distance
from ctrl_ray.verification.drawing import Drawer
from ctrl_ray.verification.gaps import certify_classes
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.pictures import plot_overview, plot_statistic
from ctrl_ray.verification.rejection import Pool, fewest, grow_pool, shortage
from ctrl_ray.verification.summary import MAX_RATIO, farthest, headline
from ctrl_ray.verification.target import JointClass, joint_classes, trained_exponents

POOL_ROUNDS = 8
"""Pre-trained samples at most, by default, in num_samples × joint classes."""
_TUNED_IDS, _POOL_IDS = 1 << 22, 1 << 23
_SAMPLES_A_PROMPT = 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of an adapter."""

    adapter: str
    """Its folder."""
    num_samples: int
    """Fine-tuned samples of each joint class; exact ones are wanted twice as many, for two halves."""
    max_pool_samples: int | None = None
    """Pre-trained samples at most; None: POOL_ROUNDS × num_samples × joint classes."""
    prompts: tuple[str, ...] | None = None
    """None: those of the run that made the adapter."""
    classifiers: Mapping[str, str] = field(default_factory=dict)
    """Folder by control; the others are at RUN/classifier/NAME."""
    seed: int = 0


def verify_pipeline(folder: Path, question: Question, say: Callable[[str], None]) -> dict[str, Any]:
    """Draw, compare, write results.json and the pictures; returns what results.json holds. `bar.met` is the verdict.

    say: told of the progress. A class with too few exact samples is not compared and says why (`shortages`). Raises
    ConfigError where the target is unknown.
    """
    info = read_adapter_info(question.adapter)
    if (warning := check_adapter(question.adapter, info)) is not None:
        say(f"warning: {warning}")
    exponents = trained_exponents(question.adapter, info)
    controls = {name: info.controls[name] for name in exponents}
    classes = joint_classes(controls)
    of_run = question.prompts or run_prompts(question.adapter, info.base_model)
    prompts = _spread(of_run, max(1, question.num_samples // _SAMPLES_A_PROMPT))
    limit = question.max_pool_samples or POOL_ROUNDS * question.num_samples * len(classes)
    say(
        f"{len(classes)} joint classes × {question.num_samples} fine-tuned samples, at most {limit} pre-trained ones; "
        f"{len(prompts)} of the run's {len(of_run)} prompts; exponents "
        + ", ".join(f"{name} {exponent:g}" for name, exponent in exponents.items())
    )
    with connected():
        pool = grow_pool(
            _drawer(folder, question, info, controls, prompts, say, reference=True).draw,
            exponents,
            classes,
            unit=len(classes) * len(prompts),
            worth=fewest(len(prompts)),
            wanted=2 * question.num_samples,
            limit=limit,
            seed=question.seed,
            say=say,
        )
        tuned = _drawer(folder, question, info, controls, prompts, say, reference=False).draw(
            question.num_samples * len(classes)
        )
    results = _compared(pool, tuned, controls, exponents, classes, question.seed)
    results = {
        "headline": headline(question.adapter, results),
        "adapter": question.adapter,
        "base_model": info.base_model,
        "exponents": exponents,
        "num_prompts": len(prompts),
        "prompts_of_the_run": len(of_run),
        "pool_samples": len(pool.samples),
        "fine_tuned_samples": len(tuned),
        **results,
    }
    results["pictures"] = [str(path) for path in _draw_pictures(folder, pool, tuned, controls, classes, results)]
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def shortages(results: Mapping[str, Any]) -> DataError | None:
    """An error that names the classes with too few exact samples; None where there are none."""
    short = [row["shortage"] for row in results["classes"] if row["shortage"]]
    if not short:
        return None
    more = f"; and {len(short) - 3} more classes" if len(short) > 3 else ""
    return DataError(
        f"{'; '.join(short[:3])}{more}. Give --max-pool-samples as many (the samples drawn so far are kept, and results.json "
        "holds the other classes), or judge an adapter of a smaller guidance_strength / kl_coef"
    )


def _compared(
    pool: Pool,
    tuned: Measured,
    controls: Mapping[str, ControlConfig],
    exponents: Mapping[str, float],
    classes: Sequence[JointClass],
    seed: int,
) -> dict[str, Any]:
    certificates, of_all = certify_classes(pool.samples, tuned, exponents, classes)
    rows: list[dict[str, Any]] = []
    bars = {own_distance(name, control) for name, control in controls.items()}
    num_prompts = len(set(pool.samples.prompts))
    for index, joint in enumerate(classes):
        compared: list[Comparison] = compare(pool.samples, pool.accepted[index], tuned, joint, controls, seed=seed)
        ratio = farthest(compared, bars)
        rows.append(
            {
                "name": joint.name,
                "labels": dict(zip(controls, joint.labels, strict=True)),
                "acceptance": float(pool.rates[index]),
                "exact_samples": int(pool.accepted[index].sum()),
                "certificate": certificates[index],
                "distances": [item.to_row() for item in compared],
                "bar_ratio": None if ratio is None else round(ratio, 4),
                "bar_met": bool(compared) and ratio is not None and ratio <= MAX_RATIO,
                "shortage": None if compared else shortage(joint.name, pool, index, num_prompts),
            }
        )
    met = all(row["bar_met"] for row in rows)
    return {
        "bar": {"distances": [list(bar) for bar in sorted(bars)], "max_ratio": MAX_RATIO, "met": met},
        "certificate": of_all,
        "classes": rows,
    }


def _draw_pictures(
    folder: Path,
    pool: Pool,
    tuned: Measured,
    controls: Mapping[str, ControlConfig],
    classes: Sequence[JointClass],
    results: Mapping[str, Any],
) -> list[Path]:
    pictures = [plot_overview(folder / "verification.png", results)]
    for name, control in controls.items():
        bar = own_distance(name, control)
        label = f"{name} / {control.unit}" if control.oracle and control.unit else bar[0]
        file = folder / f"rejection_{name}.png"
        pictures.append(plot_statistic(file, pool, tuned, list(controls), classes, bar, label, results))
    return pictures


def _spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """At most `count` of the prompts, evenly spread, without repeats."""
    unique = list(dict.fromkeys(prompts))
    return (
        tuple(unique[index * len(unique) // count] for index in range(count)) if len(unique) > count else tuple(unique)
    )


def _drawer(
    folder: Path,
    question: Question,
    info: AdapterInfo,
    controls: Mapping[str, ControlConfig],
    prompts: tuple[str, ...],
    say: Callable[[str], None],
    *,
    reference: bool,
) -> Drawer:
    use_gpu = torch.cuda.is_available()
    precision = sampling_precision(None, info.training, "cuda" if use_gpu else "cpu")
    job = SamplingJob(
        adapter=str(Path(question.adapter).resolve()),
        base_model=info.base_model,
        revision=info.base_revision,
        controls=controls,
        sampler=info.sampler,
        prompts=prompts,
        sample_ids=(),
        seed=question.seed + 2_000_003,
        batch_size=info.training.get("evaluation_batch_size", 128),
        reference=reference,
        with_kl=not reference,
        precision=precision,
    )
    rewards = RewardModelSpec(
        base_model=info.base_model,
        revision=info.base_revision,
        precision=precision,
        classifiers=run_classifiers(question.adapter, list(controls), question.classifiers),
        decode_chunk_size=info.training.get("decode_chunk_size", 32),
    )
    return Drawer(
        job=job,
        rewards=rewards,
        scaling=ScalingConfig(use_gpu=use_gpu, threads_per_worker=os.cpu_count() or 1),
        first_id=_POOL_IDS if reference else _TUNED_IDS,
        folder=folder / "samples",
        say=say,
    )
