"""`python -m ctrl_ray.classify --data data.parquet --control NAME`: stage 1, fit and calibrate p(y|x,c)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ctrl_ray import command, embedded
from ctrl_ray.config import (
    ClassifierConfig,
    ControlConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
    presets,
)
from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.config.paths import absolute_paths
from ctrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from ctrl_ray.baselines.noised_classifier import NoisedClassifier
    from ctrl_ray.driver.classifier import FitResult


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig:
    """Fit and calibrate the classifier of one control. Without flags: the classifier of the built-in example."""

    data: str | None = None
    """Parquet file or folder that `python -m ctrl_ray.label` wrote. 'shapes': draw the images of the built-in
    example. None means 'shapes' when the base model is 'shapes'."""
    control: str = "jpeg_size"
    """Name of the control. A control of the built-in example keeps its settings, unless a flag below changes them."""
    thresholds: tuple[float, ...] = ()
    """Class borders of a measured number, ascending."""
    equal_classes: Annotated[int | None, at_least(2)] = None
    """With --oracle, instead of thresholds: make this many classes. Their borders give each class an equal share of the
    pipeline's samples (without samples: of the decoded images)."""
    oracle: str | None = None
    """What measures the decoded images again: 'jpeg_size', 'colourfulness', 'clip_head:FILE' (`ctrl_ray.classifiers.clip_head`)
    or 'my_module:my_oracle'. If it has a parameter `prompt`, it gets the prompt too."""
    classes: tuple[str, ...] = ()
    """Class names. You must give them when the column holds integer labels."""
    unit: str | None = None
    """Unit of the measured number. Pictures show it."""
    column: str | None = None
    """Column of the data set. None: the column with the control's name."""
    base_model: str = embedded.NAME
    """The model whose VAE decodes the images: 'shapes', a folder in the diffusers format, or a hub id."""
    base_revision: str | None = None
    """Hub revision of base_model."""
    output_dir: str = "runs/classifier"
    """Folder to write model.safetensors, classifier.json and reliability.png to."""
    prompts_file: str | None = None
    """File of prompts, one per line, for the pipeline's samples. None: the data set's prompts, or
    the empty prompt if it has none."""
    encoding: str = "utf-8"
    """Encoding of prompts_file, such as cp1252. A byte order mark in the file has priority."""
    num_drawn_images: Annotated[int, at_least(1)] = 6000
    """With data 'shapes': how many images are drawn."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the splits, the weights, the order and the pipeline's samples."""
    on_bad_row: Literal["error", "skip"] = "error"
    """'error': stop at the first row that cannot be used. 'skip': set it aside in DATA.bad_rows.jsonl."""
    overwrite: bool = False
    """Replace a classifier that output_dir already holds."""
    noised: bool = False
    """Fit p(y|x_t, t), a classifier of noised latents, instead. `--method.name classifier_guidance` needs it. The fit runs in
    this process, on the labelled images alone."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Network and fitting."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the pipeline's samples are drawn."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Devices, CPUs and threads of a worker. The number of workers is classifier.num_workers."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    import tyro

    shapes = presets.shapes()
    default = ClassifyConfig(
        classifier=shapes.classifier,
        sampler=shapes.sampler,
        scaling=shapes.scaling,
        num_drawn_images=shapes.num_drawn_images,
    )
    run(tyro.cli(ClassifyConfig, args=argv, default=default, prog="python -m ctrl_ray.classify"))


def run(settings: ClassifyConfig) -> FitResult | NoisedClassifier:
    """Fit, and print the metrics: before and after scaling, or by noise level."""
    from ctrl_ray.classifiers.checks import prompt_doubts
    from ctrl_ray.classifiers.soundness import warning_lines
    from ctrl_ray.driver.classifier import fit_classifier
    from ctrl_ray.policy.control.labels import number_names_line
    from ctrl_ray.runs.outputs import check_output

    output_dir = check_output(settings.output_dir)
    config = absolute_paths(train_config(settings))
    doubts = prompt_doubts(config.controls[settings.control], config.classifier.prompt_conditional)
    for warning in warning_lines(settings.control, doubts):
        print(warning, flush=True)
    if settings.noised:
        if settings.equal_classes is not None:
            raise ConfigError(
                "--equal-classes chooses thresholds, but --noised needs those of the control; give --thresholds"
            )
        return _run_noised(settings, config, output_dir)
    sampler = None
    if config.classifier.num_pipeline_samples:
        from ctrl_ray.offline.prompts import sampling_prompts
        from ctrl_ray.policy.pipeline_sampler import PipelineSampler

        prompts, note = sampling_prompts(config)
        if note:
            print(note, flush=True)
        sampler = PipelineSampler(config, prompts)
    if line := number_names_line(settings.control, config.controls[settings.control]):
        print(line, flush=True)
    result = fit_classifier(
        config,
        settings.control,
        output_dir=output_dir,
        sample_pipeline=sampler,
        on_bad_row=settings.on_bad_row,
        overwrite=settings.overwrite,
        equal_classes=settings.equal_classes,
    )
    print(describe(result, settings.control))
    return result


def _run_noised(settings: ClassifyConfig, config: TrainConfig, output_dir: str) -> NoisedClassifier:
    from ctrl_ray.baselines import noised_fit
    from ctrl_ray.classifiers.checks import check_fit

    # the pipeline's samples are left out, so nothing needs to draw them
    check_fit(replace(config, classifier=replace(config.classifier, num_pipeline_samples=0)), settings.control)
    classifier = noised_fit.fit_noised_classifier(
        config,
        settings.control,
        output_dir=output_dir,
        on_bad_row=settings.on_bad_row,
        overwrite=settings.overwrite,
        say=lambda line: print(line, flush=True),
    )
    print(noised_fit.describe(classifier, output_dir))
    return classifier


def train_config(settings: ClassifyConfig) -> TrainConfig:
    """The run's config that the flags stand for; raises ConfigError where they contradict each other."""
    shapes = presets.shapes()
    known = shapes.controls if embedded.is_embedded(settings.base_model) else {}
    spec = known.get(settings.control, ControlConfig())
    if settings.thresholds or settings.classes or settings.equal_classes:
        spec = replace(spec, thresholds=settings.thresholds, classes=settings.classes, label_weights=())
    given = {name: getattr(settings, name) for name in ("oracle", "unit", "column")}
    spec = replace(spec, classifier=None, **{name: value for name, value in given.items() if value is not None})
    return replace(
        shapes,
        controls={settings.control: spec},
        data=embedded.data_or_embedded(settings.data, settings.base_model),
        base_model=settings.base_model,
        base_revision=settings.base_revision,
        prompts_file=settings.prompts_file,
        encoding=settings.encoding,
        num_drawn_images=settings.num_drawn_images,
        seed=settings.seed,
        classifier=settings.classifier,
        sampler=settings.sampler,
        scaling=replace(settings.scaling, num_workers=1),
    )


def describe(result: FitResult, control: str) -> str:
    """The metrics as a table, and what they give to doubt."""
    from ctrl_ray.classifiers.soundness import warning_lines

    lines = [
        f"classifier written to {result.folder} (epoch {result.best_epoch}, temperature {result.temperature:.4f}; "
        f"judged on {result.num_rows['judged']} held-out images)",
        f"{'':10}{'before':>10}{'after scaling':>15}",
    ]
    lines += [f"{name:10}{result.before[name]:10.4f}{result.after[name]:15.4f}" for name in result.before]
    lines.append(f"reliability diagram: {Path(result.folder) / 'reliability.png'}")
    return "\n".join([*lines, *warning_lines(control, result.doubts)])


if __name__ == "__main__":
    sys.exit(main())
