"""What can be known to be wrong, or worth knowing, before Ray starts: controls, prompts, arithmetic, the plan in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrl_ray.classifiers.checks import check_fit, prompt_doubts
from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.classifiers.soundness import warning_lines
from ctrl_ray.cluster.resources import (
    ClusterFacts,
    check_local_machine,
    check_stated,
    cluster_facts,
    needed_resources,
)
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.config.paths import absolute_paths
from ctrl_ray.diffusion.flow import FlowKernel
from ctrl_ray.diffusion.steps import DenoisingKernel
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.brisque import Brisque
from ctrl_ray.evaluation.fidelity import check_clip_model
from ctrl_ray.gradients.adjoint import Calls
from ctrl_ray.offline.prompts import NO_PROMPT, read_prompts, training_prompts
from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.oracles import load_oracle
from ctrl_ray.planning.choose import decide
from ctrl_ray.planning.cost import Work, estimate_lines, work_of
from ctrl_ray.planning.counts import PolicyCounts
from ctrl_ray.planning.data import check_labelled_images, data_lines
from ctrl_ray.planning.fits import memory_fit, remedies
from ctrl_ray.planning.machines import describe
from ctrl_ray.planning.placement import cards_needed, shares_cards
from ctrl_ray.planning.plan import mean_calls, num_branches
from ctrl_ray.planning.planner import Planner
from ctrl_ray.planning.table import decided_flags, plan_lines
from ctrl_ray.policy.adapter import AdapterInfo, make_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.base_model import is_outline
from ctrl_ray.policy.build import check_init_adapter, policy_controls
from ctrl_ray.policy.prompt_lengths import cut_prompts
from ctrl_ray.wording import counted

_WITHOUT_PROMPTS = (
    "prompts    warning: {data} has no prompts: the control is learned for the empty prompt alone; give --prompts-file with "
    "the prompts that you will draw with"
)


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A checked run, ready to start."""

    config: TrainConfig
    """With absolute paths, controls completed from their classifiers, and every 'auto' decided."""
    asked: TrainConfig
    """The same before anything was decided: what config.json records, so that a resumed run may decide anew."""
    controls: dict[str, ControlConfig]
    """The policy's, in column order."""
    prompts: tuple[str, ...]
    evaluation_prompts: tuple[str, ...]
    info: AdapterInfo
    summary: str
    """Config, batch arithmetic, trainable parameters and the memory plan, for people."""
    work: Work | None = None
    """What a worker computes; counted for an estimate only."""
    doubts: tuple[str, ...] = ()
    """Lines about classifiers whose own figures do not show them to be good; the summary ends with them."""

    def with_classifiers(self, folders: Mapping[str, str | Path]) -> CheckedRun:
        """The run with these classifier folders, by control, in its config and in the policy's controls."""
        fitted = {
            name: dataclasses.replace(self.config.controls[name], classifier=str(folder))
            for name, folder in folders.items()
        }
        config = dataclasses.replace(self.config, controls={**self.config.controls, **fitted})
        return dataclasses.replace(self, config=config, controls={**self.controls, **fitted})


def preflight(
    config: TrainConfig,
    *,
    refit_classifier: bool = False,
    with_estimate: bool = False,
    stated: ClusterFacts | None = None,
    without_data: bool = False,
) -> CheckedRun:
    """Check everything that needs no cluster; ConfigError, DataError, ModelError or ResourceError say what to change.

    with_estimate: the summary tells time and cost too (a few seconds of counting). stated: machines to plan for, which need
    not be there (`ctrl_ray.planning.machines`); None: those that are there. without_data: the data set is not looked at.
    """
    if not config.controls:
        raise ConfigError(
            "the run has no control; give --control NAME=CLASSIFIER_FOLDER, a preset such as shapes, or set controls in "
            "a --config file"
        )
    config = absolute_paths(config)
    found: list[str] = []
    config = dataclasses.replace(
        config,
        controls={name: _complete(name, control, refit_classifier, found) for name, control in config.controls.items()},
    )
    looks = stated is None and not without_data  # else the data may be elsewhere too
    for name, control in config.controls.items():
        _check_control(name, control, config)
        if control.classifier is None:
            found += warning_lines(name, prompt_doubts(control, config.classifier.prompt_conditional))
            if looks:
                check_fit(config, name, has_sampler=True)
    if not config.draws_trajectories and looks:
        check_labelled_images(config)
    _check_evaluation(config, elsewhere=stated is not None)
    controls = policy_controls(config)
    prompts = training_prompts(config)
    own = config.evaluation.prompts_file
    evaluation_prompts = read_prompts(own, config.encoding) if own else prompts
    backbone = load_backbone(config.base_model, config.base_revision, config.sampler)
    warning = check_init_adapter(config, controls, backbone)
    kernel = backbone.make_kernel(config.sampler)
    _check_kernel(kernel, config)
    planner = Planner(controls, kernel, num_prompts=len({*prompts, *evaluation_prompts}))
    asked, facts = config, stated or cluster_facts()
    decided = decide(config, facts, planner.plan, planner.estimate)
    config = decided.config
    if stated is None:
        check_local_machine(config)
    else:
        check_stated(config, stated)
    plan = planner.plan(config)
    fit = memory_fit(plan, config, facts)
    fixes = remedies(config, planner.plan, facts) if fit.answer == "no" else []
    lines = plan_lines(plan, config, facts, fit, fixes)
    unknown = set() if is_outline(backbone.folder) else {*prompts, *evaluation_prompts} - set(PROMPTS)  # PROMPTS fit
    too_long = cut_prompts(backbone, unknown)
    lines = [
        *([] if without_data else data_lines(config, math.prod(backbone.latent_shape))),
        *([_WITHOUT_PROMPTS.format(data=config.data)] if prompts == NO_PROMPT else []),
        *(f"prompts    {line}" for line in too_long),
        *lines,
    ]
    if warning is not None:
        lines = [f"adapter    warning: {warning}", *lines]
    if stated is not None:
        lines = [f"machines   {describe(stated)}", *lines, *decided_flags(asked, config)]
    counts = planner.counts(config)
    height, width = backbone.image_size()
    chain = (
        f"{'flow, ' + config.sampler.flow_sde if isinstance(kernel, FlowKernel) else 'DDIM'}, {width} × {height} pixels"
    )
    work = work_of(config, plan, planner.flops(config), counts.decoder) if with_estimate else None
    if work is not None:
        lines += estimate_lines(config, plan, work, facts)
    return CheckedRun(
        config=config,
        asked=asked,
        controls=controls,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts,
        info=_adapter_info(config, controls),
        summary="\n".join(
            [
                _summary(*(config, controls, prompts, counts, mean_calls(config, kernel), lines, decided.why, chain)),
                *found,
            ]
        ),
        work=work,
        doubts=tuple(found),
    )


def _adapter_info(config: TrainConfig, controls: Mapping[str, ControlConfig]) -> AdapterInfo:
    """The facts of the run's adapter, as far as they are known before it."""
    return make_adapter_info(
        base_model=config.base_model,
        base_revision=config.base_revision,
        controls=controls,
        sampler=config.sampler,
        lora=None if config.full_finetune else config.lora,
        kind=config.adapter.kind,
        training={
            "method": config.training_method,
            "kl_coef": config.kl_coef,
            "latent_reduction": config.latent_reduction,
            "seed": config.seed,
            "num_updates": config.num_updates,
            "precision": config.scaling.precision,
            "evaluation_batch_size": config.evaluation.fixed_batch_size,
            "decode_chunk_size": config.rewards.fixed_decode_chunk_size,
        },
    )


def _complete(name: str, control: ControlConfig, refit: bool, doubts: list[str]) -> ControlConfig:
    """Take classes, thresholds, unit and oracle from the classifier's folder where the config leaves them open. What its
    figures give to doubt goes to `doubts`."""
    if refit or control.classifier is None:
        return dataclasses.replace(control, classifier=None)
    classifier = ImageClassifier.from_pretrained(control.classifier)
    doubts += warning_lines(name, classifier.doubts)
    spec = classifier.spec
    asked = dataclasses.replace(control, oracle=control.oracle or spec.oracle)
    doubts += warning_lines(name, prompt_doubts(asked, classifier.prompt_conditional))
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


def _check_evaluation(config: TrainConfig, *, elsewhere: bool = False) -> None:
    """elsewhere: the run will be started on other machines, whose files are not here."""
    beside = config.evaluation
    if beside.brisque_model is not None and not elsewhere:
        Brisque.from_folder(beside.brisque_model)
    if beside.clip_model is not None and not elsewhere:
        check_clip_model(beside.clip_model)
    if beside.asynchronous and config.scaling.use_gpu and beside.num_gpus == 0:
        raise ConfigError(
            "evaluation.asynchronous with scaling.use_gpu, but evaluation.num_gpus is 0: the evaluations would run on the CPU, "
            "for hours each; set evaluation.num_gpus (0.2 shares a worker's card with scaling.gpus_per_worker auto), or "
            "evaluation.asynchronous false"
        )


def _check_kernel(kernel: DenoisingKernel, config: TrainConfig) -> None:
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


def _shares(config: TrainConfig) -> str:
    """'4 workers × 2 micro-batches × 8', or what the workers have where it does not divide."""
    workers, size = config.scaling.fixed_num_workers, config.fixed_micro_batch_size
    fewest, most = config.worker_shares
    if fewest == most and most % size == 0:
        return f"{counted(workers, 'worker')} × {counted(config.num_micro_batches, 'micro-batch')} × {size}"
    shares = f"{most}" if fewest == most else f"{fewest} or {most}"
    rounds = config.num_micro_batches
    text = f"{counted(workers, 'worker')} × {shares}, in {counted(rounds, 'micro-batch')} of at most {size}"
    idle = 1 - config.global_batch_size / (workers * most)
    return text + (f" ({idle:.0%} of their time is waiting for those with {most})" if idle else "")


def _samples_word(config: TrainConfig) -> str:
    return "trajectories" if config.draws_trajectories else "labelled images"


def _summary(
    config: TrainConfig,
    controls: dict[str, ControlConfig],
    prompts: tuple[str, ...],
    counts: PolicyCounts,
    calls: Calls,
    plan: list[str],
    why: Sequence[str],
    chain: str,
) -> str:
    total, tables = counts.trainable_elements, counts.table_elements
    forwards, backwards = (number * num_branches(config) for number in calls[:2])
    workers = config.scaling.fixed_num_workers
    needed = needed_resources(config)
    gains = " with label gains" if config.adapter.kind != "embedding" else ""
    kind = "the whole denoiser" if config.full_finetune else f"LoRA rank {config.lora.rank}{gains}"
    lines = [
        to_json(config),
        "",
        f"batch      {config.global_batch_size} {_samples_word(config)} per update = {_shares(config)}; {len(prompts)} prompts",
        *(f"{'decided' if i == 0 else '':<11}{line}" for i, line in enumerate(why)),
        "controls   "
        + ", ".join(
            f"{name} ({c.num_classes} classes, guidance_strength {c.guidance_strength:g} / kl_coef {config.kl_coef:g})"
            for name, c in controls.items()
        ),
        f"sampler    {chain}, {config.sampler.num_steps} steps, eta {config.sampler.eta:g}, guidance_scale "
        f"{config.sampler.guidance_scale:g}"
        + (f", control_scale {config.sampler.control_scale:g}" if config.sampler.control_scale is not None else ""),
        f"trainable  {total:,} of {counts.elements:,} parameters: {kind} {total - tables:,}"
        + (f", control embeddings {tables:,}" if tables else ""),
        f"denoiser   per sample and update {forwards:g} forwards and {backwards:g} backwards; "
        f"{forwards * config.global_batch_size:,.0f} and {backwards * config.global_batch_size:,.0f} an update",
        "KL floor   measured when the run starts: what rounding reads as KL; target_kl must be at least twice that",
        *plan,
        f"cluster    {counted(needed['CPU'], 'CPU')} and {counted(needed['GPU'], 'GPU')}"
        + (f" (shares of {counted(cards_needed(config), 'card')})" if shares_cards(config) else "")
        + f": {counted(workers, 'training worker')}, {counted(config.rewards.num_actors, 'reward actor')}",
    ]
    return "\n".join(lines)
