"""What can be known to be wrong, or worth knowing, before Ray starts: controls, prompts, arithmetic, the plan in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.cluster.resources import check_local_machine, cluster_facts, needed_resources
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.diffusion.ddim import DDIMKernel
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.adjoint import Calls
from ctrl_ray.offline.prompts import read_prompts, training_prompts
from ctrl_ray.oracles import load_oracle
from ctrl_ray.planning.cost import Work, estimate_lines, work_of
from ctrl_ray.planning.counts import PolicyCounter, PolicyCounts, StepFlops
from ctrl_ray.planning.fits import memory_fit, remedies, resolve_num_workers
from ctrl_ray.planning.plan import RunPlan, make_plan, mean_calls, num_branches, zero_options
from ctrl_ray.planning.table import plan_lines
from ctrl_ray.policy.adapter import AdapterInfo, make_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import policy_controls


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A checked run, ready to start."""

    config: TrainConfig
    """With absolute paths, controls completed from their classifiers, and the number of workers decided."""
    asked: TrainConfig
    """The same before the number of workers (and with it the micro-batch) was decided: what config.json records, so that
    a resumed run may decide anew."""
    controls: dict[str, ControlConfig]
    """The policy's, in column order."""
    prompts: tuple[str, ...]
    evaluation_prompts: tuple[str, ...]
    info: AdapterInfo
    summary: str
    """Config, batch arithmetic, trainable parameters and the memory plan, for people."""
    work: Work | None = None
    """What a worker computes; counted for an estimate only."""

    def with_classifiers(self, folders: Mapping[str, str | Path]) -> CheckedRun:
        """The run with these classifier folders, by control, in its config and in the policy's controls."""
        fitted = {
            name: dataclasses.replace(self.config.controls[name], classifier=str(folder))
            for name, folder in folders.items()
        }
        config = dataclasses.replace(self.config, controls={**self.config.controls, **fitted})
        return dataclasses.replace(self, config=config, controls={**self.controls, **fitted})


def preflight(config: TrainConfig, *, refit_classifier: bool = False, with_estimate: bool = False) -> CheckedRun:
    """Check everything that needs no cluster; ConfigError, DataError, ModelError or ResourceError say what to change.

    with_estimate: the summary tells time and cost too (a few seconds of counting).
    """
    if not config.controls:
        raise ConfigError(
            "the run has no control; give --control NAME=CLASSIFIER_FOLDER, a preset such as shapes, or set controls in "
            "a --config file"
        )
    config = _absolute_paths(config)
    config = dataclasses.replace(
        config,
        controls={name: _complete(name, control, refit_classifier) for name, control in config.controls.items()},
    )
    for name, control in config.controls.items():
        _check_control(name, control, config)
    controls = policy_controls(config)
    prompts = training_prompts(config)
    evaluation_prompts = read_prompts(config.evaluation.prompts_file) if config.evaluation.prompts_file else prompts
    kernel = load_backbone(config.base_model, config.base_revision).make_kernel(config.sampler)
    _check_kernel(kernel, config)
    asked, planner = config, _Planner(controls, kernel, len(prompts))
    facts = cluster_facts()
    resolved = resolve_num_workers(config, facts, planner.plan)
    config = resolved.config
    check_local_machine(config)
    plan = planner.plan(config)
    fit = memory_fit(plan, config, facts)
    lines = plan_lines(plan, config, fit, remedies(config, planner.plan, facts) if fit.answer == "no" else [])
    work = work_of(config, plan, planner.flops(config)) if with_estimate else None
    if work is not None:
        lines += estimate_lines(config, plan, work)
    info = make_adapter_info(
        base_model=config.base_model,
        base_revision=config.base_revision,
        controls=controls,
        sampler=config.sampler,
        lora=None if config.full_finetune else config.lora,
        training={
            "kl_coef": config.kl_coef,
            "seed": config.seed,
            "num_updates": config.num_updates,
            "precision": config.scaling.precision,
            "evaluation_batch_size": config.evaluation.batch_size,
            "decode_chunk_size": config.rewards.decode_chunk_size,
        },
    )
    return CheckedRun(
        config=config,
        asked=asked,
        controls=controls,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        info=info,
        summary=_summary(
            config, controls, prompts, planner.counts(config), mean_calls(config, kernel), lines, resolved.why
        ),
        work=work,
    )


class _Planner:
    """Plans of configs that differ in scaling and micro-batch size only; what is counted is counted once."""

    def __init__(self, controls: dict[str, ControlConfig], kernel: DDIMKernel, num_prompts: int) -> None:
        self._controls, self._kernel, self._num_prompts = controls, kernel, num_prompts
        self._counters: dict[tuple[str, bool, int], PolicyCounter] = {}

    def plan(self, config: TrainConfig) -> RunPlan:
        """The plan of a config whose number of workers is decided."""
        step = self._counter(config).step(config.micro_batch_size_per_worker)
        return make_plan(config, self.counts(config), step, self._kernel, num_prompts=self._num_prompts)

    def flops(self, config: TrainConfig) -> StepFlops:
        """Operations of a denoising step of a micro-batch."""
        return self._counter(config).flops(config.micro_batch_size_per_worker)

    def counts(self, config: TrainConfig) -> PolicyCounts:
        """Parameters of the policy."""
        return self._counter(config).counts()

    def _counter(self, config: TrainConfig) -> PolicyCounter:
        threshold = int(zero_options(config)["stage3_param_persistence_threshold"])
        key = (config.scaling.precision, config.scaling.gradient_checkpointing, threshold)
        if key not in self._counters:
            self._counters[key] = PolicyCounter(config, self._controls, persistence_threshold=threshold)
        return self._counters[key]


def _absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in another working directory: no relative path may reach them."""

    def absolute(path: str | None) -> str | None:
        if path is None or is_embedded(path) or "://" in path:
            return path
        return str(Path(path).expanduser().resolve())

    base = config.base_model
    if not is_embedded(base) and Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())
    return dataclasses.replace(
        config,
        base_model=base,
        data=absolute(config.data),
        prompts_file=absolute(config.prompts_file),
        init_adapter=absolute(config.init_adapter),
        evaluation=dataclasses.replace(config.evaluation, prompts_file=absolute(config.evaluation.prompts_file)),
        controls={
            name: dataclasses.replace(control, classifier=absolute(control.classifier))
            for name, control in config.controls.items()
        },
    )


def _complete(name: str, control: ControlConfig, refit: bool) -> ControlConfig:
    """Take classes, thresholds, unit and oracle from the classifier's folder where the config leaves them open."""
    if refit or control.classifier is None:
        return dataclasses.replace(control, classifier=None)
    spec = ImageClassifier.from_pretrained(control.classifier).spec
    if control.num_classes and (control.thresholds, control.num_classes) != (spec.thresholds, spec.num_classes):
        raise ConfigError(
            f"control {name!r} has thresholds {control.thresholds} ({control.num_classes} classes) in the config, but its "
            f"classifier {control.classifier} was fitted for {spec.thresholds} ({spec.num_classes} classes); leave them "
            "out of the config, or fit again with --refit-classifier"
        )
    return dataclasses.replace(
        control,
        classes=control.classes or spec.classes,
        thresholds=spec.thresholds,
        unit=control.unit or spec.unit,
        oracle=control.oracle or spec.oracle,
    )


def _check_control(name: str, control: ControlConfig, config: TrainConfig) -> None:
    if control.num_classes < 2:
        raise ConfigError(
            f"control {name!r} has {control.num_classes} classes; give thresholds, class names, or a fitted classifier"
        )
    if control.classifier is None and config.data is None:
        raise ConfigError(
            f"control {name!r} has no classifier and there is no data to fit one on; give --data FILE.parquet, or "
            f"--control {name}=CLASSIFIER_FOLDER"
        )
    if control.oracle:
        load_oracle(control.oracle)
        if not control.thresholds:
            raise ConfigError(f"control {name!r} has the oracle {control.oracle!r} but no thresholds; give them")


def _check_kernel(kernel: DDIMKernel, config: TrainConfig) -> None:
    if not any(kernel.controlled(k) and kernel.std(k) > 0 for k in range(kernel.num_steps)):
        raise ConfigError(
            f"no step of this sampler has noise (eta {config.sampler.eta}, {kernel.num_steps} steps), so there is no KL; "
            "set sampler.eta to 1.0"
        )
    first = kernel.num_steps - (config.estimator.steps or 1)
    if config.estimator.name == "last_k" and not any(kernel.controlled(k) for k in range(first, kernel.num_steps)):
        raise ConfigError(
            f"estimator.name last_k trains the last {config.estimator.steps or 1} steps, and all of them are the pre-trained "
            f"model's (sampler.reference_steps is {config.sampler.reference_steps}), so nothing would be trained; give "
            "more estimator.steps"
        )


def _summary(
    config: TrainConfig,
    controls: dict[str, ControlConfig],
    prompts: tuple[str, ...],
    counts: PolicyCounts,
    calls: Calls,
    plan: list[str],
    why: str,
) -> str:
    total, tables = counts.trainable_elements, counts.table_elements
    forwards, backwards = (number * num_branches(config) for number in calls[:2])
    workers = config.scaling.fixed_num_workers
    needed = needed_resources(config)
    kind = "the whole denoiser" if config.full_finetune else f"LoRA rank {config.lora.rank}"
    lines = [
        to_json(config),
        "",
        f"batch      {config.global_batch_size} trajectories per update = {workers} workers × {config.num_micro_batches} "
        f"micro-batches × {config.micro_batch_size_per_worker}; {len(prompts)} prompts",
        *([f"workers    {why}"] if why else []),
        "controls   "
        + ", ".join(
            f"{name} ({c.num_classes} classes, guidance_strength {c.guidance_strength:g} / kl_coef {config.kl_coef:g})"
            for name, c in controls.items()
        ),
        f"sampler    DDIM, {config.sampler.num_steps} steps, eta {config.sampler.eta:g}, guidance_scale "
        f"{config.sampler.guidance_scale:g}",
        f"trainable  {total:,} of {counts.elements:,} parameters: {kind} {total - tables:,}, control embeddings {tables:,}",
        f"denoiser   per sample and update {forwards:g} forwards and {backwards:g} backwards; "
        f"{forwards * config.global_batch_size:,.0f} and {backwards * config.global_batch_size:,.0f} an update",
        "KL floor   measured when the run starts: what rounding reads as KL, which target_kl must exceed twice",
        *plan,
        f"cluster    {needed['CPU']:g} CPUs and {needed['GPU']:g} GPUs: {workers} training workers, "
        f"{config.rewards.num_actors} reward actors",
    ]
    return "\n".join(lines)
