"""`python -m ctrl_ray.evaluate`: judge an adapter, or a folder of images sampled from it; compare finished runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ctrl_ray import command
from ctrl_ray.config import ControlConfig, EvaluationConfig, Precision, ScalingConfig
from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.errors import ConfigError, ModelError, own_error

if TYPE_CHECKING:
    from ctrl_ray.evaluation.samples import EvaluationSamples
    from ctrl_ray.policy.adapter_info import AdapterInfo


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Judge an adapter by the true measure of its controls, before and after, on the same prompts and noise."""

    adapter: str | None = None
    """Adapter folder, such as RUN/adapter. Its controls, classes and thresholds are judged."""
    runs: tuple[str, ...] = ()
    """Compare these finished runs instead: accuracy and KL over guidance_strength / kl_coef, as a table and a
    picture."""
    images: str | None = None
    """Judge the PNGs of this folder instead of sampling. ctrl_ray.sample writes such a folder, with manifest.jsonl."""
    before_images: str | None = None
    """With --images: a second folder to compare with, such as samples without a control."""
    num_samples: Annotated[int, at_least(1)] = 512
    """Samples before and after. The standard error of an accuracy near 0.9 is 0.013 at 512."""
    log_z_samples: Annotated[int, at_least(1)] = 512
    """Samples of the pre-trained model that the distance to the target is measured from; at least."""
    max_log_z_samples: Annotated[int, at_least(1)] = 4096
    """The same at most: more are drawn until log Z of every class is known to 0.1 nats."""
    prompts_file: str | None = None
    """File of prompts to evaluate on, one per line. None: the prompts of the run that made the adapter."""
    encoding: str = "utf-8"
    """Encoding of prompts_file, such as cp1252. A byte order mark says it better."""
    seed: Annotated[int, at_least(0)] = 1_000_003
    """Seed of the noise. Training never uses this one."""
    batch_size: Annotated[int | None, at_least(1)] = None
    """Samples drawn at a time. None: as many as in the evaluations of the run that made the adapter."""
    classifier: tuple[str, ...] = ()
    """NAME=FOLDER for each control: the classifier whose belief is compared with the truth. Empty:
    RUN/classifier/NAME."""
    clip_model: str | None = None
    """Judge prompts by this CLIP model (folder or hub id). None: by the shapes recogniser, if the prompts are of its
    kind."""
    precision: Precision | None = None
    """Precision of the denoiser. None: on a GPU that of the run that made the adapter, else fp32."""
    output_dir: str | None = None
    """Folder of the report. None: 'report' in the image folder, or 'evaluation' beside the adapter."""

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.adapter is None) == (not self.runs):
            raise ConfigError("give either --adapter RUN/adapter, to judge it, or --runs RUN RUN …, to compare them")
        if self.before_images is not None and self.images is None:
            raise ConfigError(f"--before-images {self.before_images} needs --images; give both folders, or neither")


def evaluate_images(
    images: str | Path,
    controls: Mapping[str, ControlConfig],
    output_dir: str | Path,
    *,
    before_images: str | Path | None = None,
    clip_model: str | None = None,
    adapter: str = "RUN/adapter",
) -> Path:
    """Judge a folder of sampled PNGs by its manifest alone and write the report; returns the page's path.

    DataError when a folder is not one that `ctrl_ray.sample` wrote.
    """
    from ctrl_ray.evaluation.sample_folder import read_sample_folder

    after = read_sample_folder(images, controls)
    before = None if before_images is None else read_sample_folder(before_images, controls)
    _check_pictures(after, f"--images {images}")
    _check_pictures(before, f"--before-images {before_images}")
    return report_on(after, controls, output_dir, before=before, clip_model=clip_model, adapter=adapter)


def evaluate_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    num_samples: int = 512,
    log_z_samples: int = 512,
    max_log_z_samples: int = 4096,
    prompts: Sequence[str] | None = None,
    seed: int = 1_000_003,
    batch_size: int | None = None,
    clip_model: str | None = None,
    classifiers: Mapping[str, str] | None = None,
    precision: Precision | None = None,
) -> Path:
    """Sample the adapter and its pre-trained model with the same prompts, labels and noise, judge both, measure the distance
    to the target, and write the report; returns the page's path. ModelError when the adapter or its base model cannot be
    loaded.

    precision: None, as for `sample_before_and_after`. The KL's noise floor of the run is told where it is the run's.
    """
    from ctrl_ray.evaluation.certificate import certify_evaluation
    from ctrl_ray.evaluation.fidelity import choose_fidelity
    from ctrl_ray.policy.adapter_info import read_adapter_info

    info = read_adapter_info(adapter)
    precision = precision or _precision(info)
    if clip_model is not None:
        choose_fidelity((), (0, 0), clip_model)  # what cannot be loaded is known before the sampling
    before, after, scored = sample_before_and_after(
        adapter,
        num_samples=num_samples,
        log_z_samples=log_z_samples,
        max_log_z_samples=max_log_z_samples,
        prompts=prompts,
        seed=seed,
        batch_size=batch_size,
        classifiers=classifiers,
        precision=precision,
    )
    certificate = {}
    if scored is not None:
        certificate = certify_evaluation(scored, after, info.controls, info.training["kl_coef"])
    floor = info.training.get("kl_noise_floor") if precision == info.training.get("precision") else None
    return report_on(
        after,
        info.controls,
        output_dir,
        before=before,
        clip_model=clip_model,
        adapter=str(adapter),
        kl_noise_floor=floor,
        certificate=certificate,
    )


class BeforeAndAfter(NamedTuple):
    """What `sample_before_and_after` drew."""

    before: EvaluationSamples
    after: EvaluationSamples
    scored: EvaluationSamples | None
    """Of the pre-trained model, without images: as many as log Z needs. None where the adapter's run has no target."""


def sample_before_and_after(
    adapter: str | Path,
    *,
    num_samples: int,
    log_z_samples: int = 512,
    max_log_z_samples: int = 4096,
    prompts: Sequence[str] | None = None,
    seed: int = 1_000_003,
    batch_size: int | None = None,
    classifiers: Mapping[str, str] | None = None,
    precision: Precision | None = None,
) -> BeforeAndAfter:
    """Samples of the pre-trained model and of the adapter: the same prompts, labels and noise, row by row.

    Prompts and classifiers (whose belief is compared with the truth) default to those of the run around the adapter, the
    batch size to that of its evaluations, and on a GPU the precision to its own. Runs on the connected Ray, else on a local
    one, with a GPU where there is one.
    """
    import os

    import torch

    from ctrl_ray.cluster.connection import connected
    from ctrl_ray.distributed.log_z import draw_for_log_z
    from ctrl_ray.distributed.sampling import SamplingJob, evaluation_ids, sample_policy
    from ctrl_ray.policy.adapter_info import read_adapter_info
    from ctrl_ray.policy.build import check_adapter
    from ctrl_ray.rewards.model import RewardModelSpec
    from ctrl_ray.runs.finished import run_classifiers, run_prompts

    settings = EvaluationConfig(log_z_samples=log_z_samples, max_log_z_samples=max_log_z_samples)
    info = read_adapter_info(adapter)
    if (warning := check_adapter(adapter, info)) is not None:
        print(f"warning: {warning}", flush=True)
    job = SamplingJob(
        adapter=str(Path(adapter).resolve()),
        base_model=info.base_model,
        revision=info.base_revision,
        controls=info.controls,
        sampler=info.sampler,
        prompts=tuple(prompts) if prompts else run_prompts(adapter, info.base_model),
        sample_ids=tuple(evaluation_ids(num_samples)),
        seed=seed,
        batch_size=batch_size or info.training.get("evaluation_batch_size", 128),
        reference=True,
        precision=precision or _precision(info),
    )
    rewards = RewardModelSpec(
        base_model=info.base_model,
        revision=info.base_revision,
        precision=job.precision,
        classifiers=run_classifiers(adapter, list(info.controls), classifiers or {}),
        decode_chunk_size=info.training.get("decode_chunk_size", 32),
    )
    scaling = ScalingConfig(use_gpu=torch.cuda.is_available(), threads_per_worker=os.cpu_count() or 1)
    try:
        with connected():
            print(f"drawing {num_samples} samples of the pre-trained model and as many of the adapter", flush=True)
            before = sample_policy(job, rewards, scaling)
            _check_pictures(before, "the pre-trained model's samples")
            after = sample_policy(dataclasses.replace(job, reference=False), rewards, scaling)
            _check_pictures(after, "the adapter's samples")
            scored, kl_coef = None, info.training.get("kl_coef", 0.0)
            if kl_coef > 0 and info.training.get("latent_reduction", "sum") == "sum":
                first = before.without_images()
                scored = draw_for_log_z(first, job, rewards, scaling, info.controls, kl_coef, settings)
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from error
    return BeforeAndAfter(before, after, scored)


def _check_pictures(samples: EvaluationSamples | None, what: str) -> None:
    """ModelError where all pictures are black: there is nothing to judge; a line that counts them where some are."""
    from ctrl_ray.policy.outputs import black_rows, black_text

    black = [] if samples is None else black_rows(samples.images)
    if samples is None or not black:
        return
    text = f"{what}: {black_text([f'sample {row}' for row in black], len(samples))}"
    if len(black) == len(samples):
        raise ModelError(text)
    print(f"warning: {text}", flush=True)


def _precision(info: AdapterInfo) -> Precision:
    """The one that an adapter is evaluated in here, where none is asked for."""
    import torch

    from ctrl_ray.policy.precision import sampling_precision

    return sampling_precision(None, info.training, "cuda" if torch.cuda.is_available() else "cpu")


def report_on(
    after: EvaluationSamples,
    controls: Mapping[str, ControlConfig],
    output_dir: str | Path,
    *,
    before: EvaluationSamples | None = None,
    clip_model: str | None = None,
    adapter: str = "RUN/adapter",
    **report_options: Any,
) -> Path:
    """Judge samples, the pre-trained ones grouped by their true class, and write the report; returns the page's path.

    `report_options` go to `write_report` (config, metrics_rows, facts, ...).
    """
    from ctrl_ray.evaluation.fidelity import choose_fidelity
    from ctrl_ray.evaluation.judging import judge
    from ctrl_ray.reporting.report import write_report
    from ctrl_ray.reporting.summary import Evaluation

    height, width = after.images.shape[1:3]
    prompts = after.prompts if before is None else after.prompts + before.prompts
    fidelity = choose_fidelity(prompts, (height, width), clip_model)
    return write_report(
        output_dir,
        controls=controls,
        after=Evaluation(judge(after, controls, fidelity=fidelity, by="label"), after),
        before=None if before is None else Evaluation(judge(before, controls, fidelity=fidelity, by="oracle"), before),
        adapter=adapter,
        **report_options,
    )


def run(options: EvaluateOptions) -> Path:
    """Judge an adapter or a folder of its images; returns the report's page."""
    from ctrl_ray.offline.prompts import read_prompts
    from ctrl_ray.policy.adapter_info import adapter_folder, read_adapter_info
    from ctrl_ray.runs.outputs import check_output

    assert options.adapter is not None
    adapter = adapter_folder(options.adapter)
    controls = read_adapter_info(adapter).controls
    beside = adapter.parent / "evaluation" if options.images is None else Path(options.images) / "report"
    output_dir = check_output(options.output_dir or beside)
    if options.images is not None:
        return evaluate_images(
            options.images,
            controls,
            output_dir,
            before_images=options.before_images,
            clip_model=options.clip_model,
            adapter=str(adapter),
        )
    return evaluate_adapter(
        adapter,
        output_dir,
        num_samples=options.num_samples,
        log_z_samples=options.log_z_samples,
        max_log_z_samples=options.max_log_z_samples,
        prompts=None if options.prompts_file is None else read_prompts(options.prompts_file, options.encoding),
        seed=options.seed,
        batch_size=options.batch_size,
        clip_model=options.clip_model,
        classifiers=command.named_values("--classifier", options.classifier, command.CLASSIFIER_EXAMPLE),
        precision=options.precision,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    """Judge, or compare; print the numbers and where the report or the picture lies."""
    import tyro

    options = tyro.cli(EvaluateOptions, args=argv, prog="python -m ctrl_ray.evaluate")
    if options.runs:
        from ctrl_ray.reporting.comparison import compare_runs, format_runs
        from ctrl_ray.runs.outputs import check_output

        results, picture = compare_runs(options.runs, check_output(options.output_dir or "runs/comparison"))
        print(f"{format_runs(results)}\npicture: {picture}")
        return
    from ctrl_ray.reporting.report import SUMMARY_FILE
    from ctrl_ray.reporting.summary_text import closing_lines, format_summary

    page = run(options)
    summary = json.loads((page.parent / SUMMARY_FILE).read_text(encoding="utf-8"))
    print("\n".join([format_summary(summary), *closing_lines(summary), f"report: {page}"]))


if __name__ == "__main__":
    sys.exit(main())
