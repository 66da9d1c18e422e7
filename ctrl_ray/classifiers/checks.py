"""What can be known to be wrong with a fit before Ray starts."""

from __future__ import annotations

from ctrl_ray.classifiers.examples import require_prompts_for_oracle
from ctrl_ray.classifiers.soundness import check_classes
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.label_counts import count_labels
from ctrl_ray.offline.plan import plan_reading
from ctrl_ray.offline.prompts import has_prompts
from ctrl_ray.oracles import is_told_prompt, load_oracle
from ctrl_ray.policy.backbones import load_backbone


def check_fit(
    config: TrainConfig, control: str, *, has_sampler: bool = False, equal_classes: int | None = None
) -> None:
    """Raise ConfigError, DataError or ModelError where the classifier of `control` cannot be fitted.

    Reads the data set's footers, its first image, and the control's column where that holds the labels. has_sampler: whether
    there is something that draws the pipeline's samples. equal_classes: the fit chooses thresholds for so many classes.
    """
    if control not in config.controls:
        raise ConfigError(f"control {control!r} is unknown; the config has {sorted(config.controls)}")
    spec = config.controls[control]
    if equal_classes is not None and (spec.oracle is None or spec.num_classes):
        got = f"has {spec.num_classes} classes already" if spec.num_classes else "has no oracle to measure it"
        raise ConfigError(
            f"equal_classes is {equal_classes}, but control {control!r} {got}; it chooses the thresholds of a control that an "
            "oracle measures: give --oracle, and neither --thresholds nor --classes"
        )
    if spec.num_classes < 2 and equal_classes is None:
        raise ConfigError(
            f"control {control!r} has {spec.num_classes} classes; expected at least 2: give thresholds for a measured "
            "number, or class names for integer labels"
        )
    num_samples = config.classifier.num_pipeline_samples
    if num_samples > 0 and (spec.oracle is None or not has_sampler):
        lacking = "the control has no oracle to label them" if spec.oracle is None else "there is no sample_pipeline"
        raise ConfigError(f"classifier.num_pipeline_samples is {num_samples}, but {lacking}; set it to 0, or add one")
    if spec.oracle is not None:
        load_oracle(spec.oracle)
        if not spec.thresholds and equal_classes is None:
            raise ConfigError(
                f"control {control!r} is measured by the oracle {spec.oracle!r} but has no thresholds to make classes "
                "of its numbers; give thresholds"
            )
    image_size = load_backbone(config.base_model, config.base_revision, config.sampler).image_size()
    if config.data is None:
        raise ConfigError(f"control {control!r} needs a classifier, and there is no data to fit one on; give --data")
    if is_told_prompt(spec.oracle) and not has_prompts(config.data):
        raise DataError(
            f"oracle {spec.oracle!r} judges an image with its prompt, but the images of {config.data} have none; expected a "
            "column 'prompt': label again with --prompts or --prompts-file"
        )
    require_prompts_for_oracle(config, control)
    if is_embedded(config.data):
        if spec.oracle is None:
            raise ConfigError(
                f"data {config.data!r} has no labels of control {control!r}; name an oracle that measures them"
            )
        return
    _check_data(config, control, spec, image_size)


def prompt_doubts(spec: ControlConfig, sees_prompt: bool) -> list[str]:
    """What people must be told where the oracle judges an image with its prompt, and the classifier does not see the prompt."""
    if sees_prompt or not is_told_prompt(spec.oracle):
        return []
    return [
        f"the oracle {spec.oracle!r} judges an image with its prompt, but the classifier does not see the prompt: it learns "
        "the average over prompts, and the policy follows that (ctrl_ray/verification/README.md says how far off it is); "
        "set --classifier.prompt-conditional"
    ]


def _check_data(config: TrainConfig, control: str, spec: ControlConfig, image_size: tuple[int, int]) -> None:
    plan = plan_reading(
        config.data or "",
        {} if spec.oracle else {control: spec},
        image_size=image_size,
        needs_prompts=config.classifier.prompt_conditional,
    )
    if not spec.oracle:  # an oracle measures again what the pipeline's VAE makes of the images
        counts = count_labels(plan, control, spec, config.classifier.max_images)
        if not counts.num_bad:  # a bad row is named when it is read
            check_classes(control, spec, counts.rows, "rows", counts.span)
