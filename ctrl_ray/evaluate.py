"""`python -m ctrl_ray.evaluate`: judge an adapter, or a folder of images sampled from it; compare finished runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ctrl_ray import command
from ctrl_ray.config import ControlConfig, EvaluationConfig, MethodConfig, Precision, SamplerConfig
from ctrl_ray.config.call import CallConfig
from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from ctrl_ray.driver.before_after import Subject
    from ctrl_ray.evaluation.samples import EvaluationSamples


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Judge an adapter by the true measure of its controls, before and after, on the same prompts and noise."""

    adapter: str | None = None
    """Adapter folder, such as RUN/adapter. Its controls, classes and thresholds are judged."""
    controls: tuple[str, ...] = ()
    """With --adapter: names of the controls that get a label. The others get the null label. Empty: all get a label."""
    runs: tuple[str, ...] = ()
    """Compare these finished runs instead: accuracy and KL over guidance_strength / kl_coef, as a table and a
    picture."""
    base_model: str | None = None
    """Judge a method that steers this base model instead (--method.name, --classifier): 'shapes', a folder in the diffusers
    format, or a hub id."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """With --base-model: how the model is steered to its classes, without an adapter."""
    exponent: tuple[str, ...] = ()
    """With --base-model: NAME=NUMBER for each control. The target is p_pre(x|c) p(y|x,c)^NUMBER. Default 1."""
    num_steps: Annotated[int | None, at_least(1)] = None
    """With --base-model: denoising steps. None: 10."""
    guidance_scale: Annotated[float | None, at_least(1)] = None
    """With --base-model: classifier-free guidance of the prompt (1 switches it off). None: 1."""
    images: str | None = None
    """Judge the PNGs of this folder instead of sampling. ctrl_ray.sample writes such a folder, with manifest.jsonl."""
    before_images: str | None = None
    """With --images: a second folder to compare with, such as samples without a control."""
    num_samples: Annotated[int, at_least(1)] = 512
    """Samples before and after. The standard error of an accuracy near 0.9 is 0.013 at 512."""
    log_z_samples: Annotated[int, at_least(1)] = 512
    """The fewest samples of the pre-trained model that the distance to the target is measured from."""
    max_log_z_samples: Annotated[int, at_least(1)] = 4096
    """The most of these samples. More are drawn until log Z of every class is known to 0.1 nats."""
    prompts_file: str | None = None
    """File of prompts to evaluate on, one per line. None: the prompts of the run that made the adapter or classifier."""
    encoding: str = "utf-8"
    """Encoding of prompts_file, such as cp1252. A byte order mark in the file has priority."""
    seed: Annotated[int, at_least(0)] = 1_000_003
    """Seed of the noise. Training never uses this one."""
    batch_size: Annotated[int | None, at_least(1)] = None
    """Samples drawn at a time. None: as many as in the evaluations of the run that made the adapter."""
    classifier: tuple[str, ...] = ()
    """NAME=FOLDER for each control: a classifier. Its predictions are compared with the true classes, and it steers a method.
    Empty: RUN/classifier/NAME."""
    clip_model: str | None = None
    """Measure clip_score with this CLIP model (folder or hub id, in safetensors). It also judges the prompts where the shapes
    recogniser cannot. None: no clip_score."""
    brisque_model: str | None = None
    """Measure brisque with this folder of `allmodel` and `allrange`, the regression of BRISQUE's authors
    (`ctrl_ray.evaluation.brisque`). None: no brisque."""
    precision: Precision | None = None
    """Precision of the denoiser. None: on a GPU as in the run that made the adapter, else fp32."""
    output_dir: str | None = None
    """Folder of the report. None: 'report' in the image folder, 'evaluation' (with --controls: 'evaluation-NAMES') beside the
    adapter, or runs/METHOD."""

    def __post_init__(self) -> None:
        check_fields(self)
        if sum((self.adapter is not None, bool(self.runs), self.base_model is not None)) != 1:
            raise ConfigError(
                "give one of --adapter RUN/adapter, to judge it, --runs RUN RUN …, to compare them, and --base-model MODEL "
                "--method.name dps --classifier NAME=FOLDER, to judge a method that needs no adapter"
            )
        of_methods = [name for name in ("exponent", "num_steps", "guidance_scale") if getattr(self, name)]
        if self.method.steers:
            of_methods.insert(0, "method.name")
        if of_methods and self.base_model is None:
            flag = "--" + of_methods[0].replace("_", "-")
            raise ConfigError(f"{flag} belongs to a method on a base model; give --base-model MODEL, or leave it out")
        if self.base_model is not None and (not self.method.steers or self.images is not None):
            got = "--images" if self.images is not None else "method.name plain"
            raise ConfigError(
                f"--base-model judges a method that steers it, but got {got}; expected --method.name dps or another"
            )
        if self.controls and (self.adapter is None or self.images is not None):
            raise ConfigError(
                f"--controls {' '.join(self.controls)} says what an adapter is asked for; give --adapter RUN/adapter, and no "
                "--images"
            )
        if self.before_images is not None and self.images is None:
            raise ConfigError(f"--before-images {self.before_images} needs --images; give both folders, or neither")


def evaluate_images(
    images: str | Path,
    controls: Mapping[str, ControlConfig],
    output_dir: str | Path,
    *,
    before_images: str | Path | None = None,
    clip_model: str | None = None,
    brisque_model: str | None = None,
    adapter: str = "RUN/adapter",
) -> Path:
    """Judge a folder of sampled PNGs by its manifest alone and write the report; returns the page's path.

    DataError when a folder is not one that `ctrl_ray.sample` wrote.
    """
    from ctrl_ray.driver.before_after import check_pictures
    from ctrl_ray.evaluation.sample_folder import read_sample_folder

    after = read_sample_folder(images, controls)
    before = None if before_images is None else read_sample_folder(before_images, controls)
    check_pictures(after, f"--images {images}")
    check_pictures(before, f"--before-images {before_images}")
    return report_on(
        after, controls, output_dir, before=before, clip_model=clip_model, brisque_model=brisque_model, adapter=adapter
    )


def evaluate_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    asked: Sequence[str] = (),
    num_samples: int = 512,
    log_z_samples: int = 512,
    max_log_z_samples: int = 4096,
    prompts: Sequence[str] | None = None,
    seed: int = 1_000_003,
    batch_size: int | None = None,
    clip_model: str | None = None,
    brisque_model: str | None = None,
    classifiers: Mapping[str, str] | None = None,
    precision: Precision | None = None,
) -> Path:
    """Sample the adapter and its pre-trained model with the same prompts, labels and noise, judge both, measure the distance
    to the target, and write the report; returns the page's path. ModelError when the adapter or its base model cannot be
    loaded.

    asked: Those of its controls that have labels, the others are null; (): all. The target is that of these alone.
    precision: None, on a GPU the adapter's own. The KL's noise floor of the run is told where it is the run's.
    """
    from ctrl_ray.driver.before_after import Subject
    from ctrl_ray.evaluation.fidelity import choose_judges
    from ctrl_ray.policy.adapter_info import read_adapter_info

    counts = EvaluationConfig(log_z_samples=log_z_samples, max_log_z_samples=max_log_z_samples)
    choose_judges((), (0, 0), clip_model, brisque_model)  # whether they can be loaded: before the sampling
    training = read_adapter_info(adapter).training
    subject = Subject.of_adapter(
        adapter, asked=asked, prompts=prompts, batch_size=batch_size, classifiers=classifiers, precision=precision
    )
    floor = training.get("kl_noise_floor") if subject.precision == training.get("precision") else None
    return evaluate_subject(
        subject,
        output_dir,
        num_samples=num_samples,
        counts=counts,
        seed=seed,
        clip_model=clip_model,
        brisque_model=brisque_model,
        kl_noise_floor=floor,
    )


def evaluate_subject(
    subject: Subject,
    output_dir: str | Path,
    *,
    num_samples: int = 512,
    counts: EvaluationConfig | None = None,
    seed: int = 1_000_003,
    clip_model: str | None = None,
    brisque_model: str | None = None,
    kl_noise_floor: float | None = None,
) -> Path:
    """`evaluate_adapter` of an adapter or of a method of `ctrl_ray.baselines`. counts: how many samples log Z has.

    The report has a certificate where the density of the paths is known: of adapters, and of methods that push each step.
    """
    from ctrl_ray.driver.before_after import sample_before_and_after
    from ctrl_ray.evaluation.certificate import certify_evaluation

    drawn = sample_before_and_after(subject, num_samples=num_samples, counts=counts or EvaluationConfig(), seed=seed)
    certificate = {}
    if drawn.scored is not None:
        assert subject.kl_coef is not None
        certificate = certify_evaluation(drawn.scored, drawn.after, subject.controls, subject.kl_coef)
    return report_on(
        drawn.after,
        subject.controls,
        output_dir,
        before=drawn.before,
        clip_model=clip_model,
        brisque_model=brisque_model,
        adapter=subject.adapter or "",
        source=subject.source,
        kl_noise_floor=kl_noise_floor,
        certificate=certificate,
    )


def report_on(
    after: EvaluationSamples,
    controls: Mapping[str, ControlConfig],
    output_dir: str | Path,
    *,
    before: EvaluationSamples | None = None,
    clip_model: str | None = None,
    brisque_model: str | None = None,
    adapter: str = "RUN/adapter",
    **report_options: Any,
) -> Path:
    """Judge samples, the pre-trained ones grouped by their true class, and write the report; returns the page's path.

    `report_options` go to `write_report` (config, metrics_rows, facts, ...).
    """
    from ctrl_ray.evaluation.fidelity import choose_judges
    from ctrl_ray.evaluation.judging import judge
    from ctrl_ray.reporting.report import write_report
    from ctrl_ray.reporting.summary import Evaluation

    prompts = after.prompts if before is None else after.prompts + before.prompts
    judges = choose_judges(prompts, after.image_size, clip_model, brisque_model)._asdict()
    return write_report(
        output_dir,
        controls=controls,
        after=Evaluation(judge(after, controls, **judges, by="label"), after),
        before=None if before is None else Evaluation(judge(before, controls, **judges, by="oracle"), before),
        adapter=adapter,
        **report_options,
    )


def run(options: EvaluateOptions) -> Path:
    """Judge an adapter or a folder of its images; returns the report's page."""
    from ctrl_ray.offline.prompts import read_prompts
    from ctrl_ray.policy.adapter_info import adapter_folder, read_adapter_info
    from ctrl_ray.runs.outputs import check_output

    if options.base_model is not None:
        return _evaluate_method(options)
    assert options.adapter is not None
    adapter = adapter_folder(options.adapter)
    controls = read_adapter_info(adapter).controls
    folder = "-".join(["evaluation", *options.controls])
    beside = adapter.parent / folder if options.images is None else Path(options.images) / "report"
    output_dir = check_output(options.output_dir or beside)
    if options.images is not None:
        return evaluate_images(
            options.images,
            controls,
            output_dir,
            before_images=options.before_images,
            clip_model=options.clip_model,
            brisque_model=options.brisque_model,
            adapter=str(adapter),
        )
    return evaluate_adapter(
        adapter,
        output_dir,
        asked=options.controls,
        num_samples=options.num_samples,
        log_z_samples=options.log_z_samples,
        max_log_z_samples=options.max_log_z_samples,
        prompts=None if options.prompts_file is None else read_prompts(options.prompts_file, options.encoding),
        seed=options.seed,
        batch_size=options.batch_size,
        clip_model=options.clip_model,
        brisque_model=options.brisque_model,
        classifiers=command.named_values("--classifier", options.classifier, command.CLASSIFIER_EXAMPLE),
        precision=options.precision,
    )


def _evaluate_method(options: EvaluateOptions) -> Path:
    from ctrl_ray.driver.before_after import Subject
    from ctrl_ray.evaluation.fidelity import choose_judges
    from ctrl_ray.offline.prompts import read_prompts
    from ctrl_ray.runs.outputs import check_output

    output_dir = check_output(options.output_dir or f"runs/{options.method.name}")
    counts = EvaluationConfig(log_z_samples=options.log_z_samples, max_log_z_samples=options.max_log_z_samples)
    choose_judges((), (0, 0), options.clip_model, options.brisque_model)
    call = CallConfig(num_inference_steps=options.num_steps, guidance_scale=options.guidance_scale)
    subject = Subject.of_method(
        options.method,
        options.base_model or "",
        command.named_values("--classifier", options.classifier, command.CLASSIFIER_EXAMPLE),
        exponents=command.exponents(options.exponent),
        sampler=call.sampler(SamplerConfig()),
        prompts=None if options.prompts_file is None else read_prompts(options.prompts_file, options.encoding),
        batch_size=options.batch_size,
        precision=options.precision,
    )
    return evaluate_subject(
        subject,
        output_dir,
        num_samples=options.num_samples,
        counts=counts,
        seed=options.seed,
        clip_model=options.clip_model,
        brisque_model=options.brisque_model,
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
