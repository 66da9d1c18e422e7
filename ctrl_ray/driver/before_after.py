"""What is judged, and its samples beside the pre-trained model's: an adapter, or a method that steers the pre-trained model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ctrl_ray.baselines.methods import make_sampler
from ctrl_ray.classifiers.classifier import read_control
from ctrl_ray.cluster.connection import connected
from ctrl_ray.config import ControlConfig, EvaluationConfig, MethodConfig, Precision, SamplerConfig, ScalingConfig
from ctrl_ray.distributed.log_z import draw_for_log_z
from ctrl_ray.distributed.sampling import SamplingJob, evaluation_ids, sample_policy
from ctrl_ray.errors import ConfigError, ModelError, own_error
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.gradients.rollout import Sampler, rollout
from ctrl_ray.policy.adapter_info import read_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import check_adapter
from ctrl_ray.policy.outputs import black_rows, black_text
from ctrl_ray.policy.precision import sampling_precision
from ctrl_ray.reporting.page import Source
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.finished import classifier_prompts, run_classifiers, run_prompts

_BATCH, _CHUNK = 128, 32
"""Where no run says how many samples and images fit at a time."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Who draws the samples that are judged, and what they are judged by."""

    name: str
    """For messages: 'the adapter', 'method dps'."""
    adapter: str | None
    base_model: str
    revision: str | None
    controls: Mapping[str, ControlConfig]
    """In label-column order; their guidance strengths over `kl_coef` are the exponents."""
    kl_coef: float | None
    """None: there is no target, so no certificate."""
    sampler: SamplerConfig
    prompts: tuple[str, ...]
    classifiers: Mapping[str, str]
    """Folder of each control."""
    precision: Precision
    batch_size: int = _BATCH
    decode_chunk_size: int = _CHUNK
    draw: Sampler = rollout
    source: Source | None = None
    """How more samples are made, where no adapter makes them."""

    @classmethod
    def of_adapter(
        cls,
        adapter: str | Path,
        *,
        asked: Sequence[str] = (),
        prompts: Sequence[str] | None = None,
        batch_size: int | None = None,
        classifiers: Mapping[str, str] | None = None,
        precision: Precision | None = None,
    ) -> Subject:
        """Prompts and classifiers default to those of the run around the adapter, the batch size to that of its evaluations,
        and on a GPU the precision to its own. asked: Those of its controls that have labels, the others are null; (): all.
        ConfigError for a control that it does not have. ModelError for an adapter that is damaged or of another denoiser; a
        warning is printed for another VAE or text encoder."""
        info = read_adapter_info(adapter)
        if (warning := check_adapter(adapter, info)) is not None:
            print(f"warning: {warning}", flush=True)
        if unknown := sorted(set(asked) - set(info.controls)):
            raise ConfigError(f"--controls names {unknown}; the adapter has the controls {list(info.controls)}")
        controls = {name: control for name, control in info.controls.items() if name in asked or not asked}
        kl_coef = info.training.get("kl_coef", 0.0)
        known = kl_coef > 0 and info.training.get("latent_reduction", "sum") == "sum"
        return cls(
            name="the adapter",
            adapter=str(Path(adapter).resolve()),
            base_model=info.base_model,
            revision=info.base_revision,
            controls=controls,
            kl_coef=kl_coef if known else None,
            sampler=info.sampler,
            prompts=tuple(prompts) if prompts else run_prompts(adapter, info.base_model),
            classifiers=run_classifiers(adapter, list(controls), classifiers or {}),
            precision=sampling_precision(precision, info.training, _device()),
            batch_size=batch_size or info.training.get("evaluation_batch_size", _BATCH),
            decode_chunk_size=info.training.get("decode_chunk_size", _CHUNK),
        )

    @classmethod
    def of_method(
        cls,
        method: MethodConfig,
        base_model: str,
        classifiers: Mapping[str, str],
        *,
        exponents: Mapping[str, float] | None = None,
        sampler: SamplerConfig | None = None,
        prompts: Sequence[str] | None = None,
        batch_size: int | None = None,
        precision: Precision | None = None,
    ) -> Subject:
        """A method on the pre-trained model. classifiers: a folder of each control. exponents: of each, 1 where none is named.

        ConfigError where there is no classifier, an exponent is of no control, or prompts are not known."""
        if not classifiers:
            raise ConfigError(
                f"method {method.name} steers by classifiers, but none is given; give --classifier NAME=FOLDER"
            )
        sampler, exponents = method.sampler(sampler or SamplerConfig()), exponents or {}
        load_backbone(base_model, sampler=sampler).make_kernel(sampler)
        if unknown := sorted(set(exponents) - set(classifiers)):
            raise ConfigError(f"--exponent names {unknown}; the classifiers are of {list(classifiers)}")
        controls = {
            name: dataclasses.replace(read_control(folder, name), guidance_strength=exponents.get(name, 1.0))
            for name, folder in classifiers.items()
        }
        return cls(
            name=f"method {method.name}",
            adapter=None,
            base_model=base_model,
            revision=None,
            controls=controls,
            kl_coef=1.0,
            sampler=sampler,
            prompts=tuple(prompts) if prompts else classifier_prompts(classifiers.values(), base_model),
            classifiers={name: str(Path(folder).resolve()) for name, folder in classifiers.items()},
            precision=sampling_precision(precision, {}, _device()),
            batch_size=batch_size or _BATCH,
            draw=make_sampler(method, [control.guidance_strength for control in controls.values()], list(controls)),
            source=_source(method, base_model, classifiers, exponents, sampler),
        )

    def job(self, num_samples: int, seed: int) -> SamplingJob:
        """The samples of the pre-trained model."""
        return SamplingJob(
            adapter=self.adapter,
            base_model=self.base_model,
            revision=self.revision,
            controls=self.controls,
            sampler=self.sampler,
            prompts=self.prompts,
            sample_ids=tuple(evaluation_ids(num_samples)),
            seed=seed,
            batch_size=self.batch_size,
            reference=True,
            precision=self.precision,
        )

    def rewards(self) -> RewardModelSpec:
        """The classifiers, whose belief is compared with the truth."""
        return RewardModelSpec(
            base_model=self.base_model,
            revision=self.revision,
            precision=self.precision,
            classifiers=self.classifiers,
            decode_chunk_size=self.decode_chunk_size,
        )


class BeforeAndAfter(NamedTuple):
    """What `sample_before_and_after` drew."""

    before: EvaluationSamples
    after: EvaluationSamples
    scored: EvaluationSamples | None
    """Of the pre-trained model, without images: as many as log Z needs. None where the subject has no target, or the density of
    its paths is not known."""


def sample_before_and_after(
    subject: Subject, *, num_samples: int, counts: EvaluationConfig, seed: int = 1_000_003
) -> BeforeAndAfter:
    """Samples of the pre-trained model and of the subject: the same prompts, labels and noise, row by row.

    counts: how many log Z has. Runs on the connected Ray, else on a local one, with a GPU where there is one.
    """
    job, rewards = subject.job(num_samples, seed), subject.rewards()
    scaling = ScalingConfig(use_gpu=torch.cuda.is_available(), threads_per_worker=os.cpu_count() or 1)
    theirs = dataclasses.replace(job, reference=subject.adapter is None, draw=subject.draw)
    try:
        with connected():
            print(f"drawing {num_samples} samples of the pre-trained model and as many of {subject.name}", flush=True)
            before = sample_policy(job, rewards, scaling)
            check_pictures(before, "the pre-trained model's samples")
            after = sample_policy(theirs, rewards, scaling)
            check_pictures(after, f"{subject.name}'s samples")
            scored = None
            if subject.kl_coef is not None and (subject.draw is rollout or after.log_ratio is not None):
                first = before.without_images()
                scored = draw_for_log_z(first, job, rewards, scaling, subject.controls, subject.kl_coef, counts)
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from error
    return BeforeAndAfter(before, after, scored)


def check_pictures(samples: EvaluationSamples | None, what: str) -> None:
    """ModelError where all pictures are black: there is nothing to judge; a line that counts them where some are."""
    black = [] if samples is None else black_rows(samples.images)
    if samples is None or not black:
        return
    text = f"{what}: {black_text([f'sample {row}' for row in black], len(samples))}"
    if len(black) == len(samples):
        raise ModelError(text)
    print(f"warning: {text}", flush=True)


def _source(
    method: MethodConfig,
    base_model: str,
    classifiers: Mapping[str, str],
    exponents: Mapping[str, float],
    sampler: SamplerConfig,
) -> Source:
    """The commands that sample with a method."""
    options = {"name": method.name, "reference_steps": method.reference_steps, **method.given}
    flags = ["--base-model", base_model, "--num-steps", str(sampler.num_steps)]
    call = f", num_inference_steps={sampler.num_steps}"
    if sampler.guidance_scale != 1:
        flags += ["--guidance-scale", f"{sampler.guidance_scale:g}"]
        call += f", guidance_scale={sampler.guidance_scale:g}"
    for name, folder in classifiers.items():
        flags += ["--classifier", f"{name}={folder}"]
    for name, exponent in exponents.items():
        flags += ["--exponent", f"{name}={exponent:g}"]
    for option, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--method.{option.replace('_', '-')}", *map(str, values)]
    settings = ", ".join(f"{option}={value!r}" for option, value in options.items())
    models = f"{base_model!r}, classifiers={dict(classifiers)!r}, exponents={dict(exponents)!r}"
    loading = f"ctrl_ray.ControlledPipeline.from_base_model({models})"
    return Source(tuple(flags), loading, f"{call}, method=ctrl_ray.MethodConfig({settings})", method.name)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
