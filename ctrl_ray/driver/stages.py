"""The stages of a run, on the driver: stage 1, fine-tuning, evaluation, report. `ctrl_ray.train` puts them in order."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.train import UserCallback

from ctrl_ray.classifiers.soundness import warning_lines
from ctrl_ray.cluster.resources import needed_resources
from ctrl_ray.cluster.shared_storage import copies_of
from ctrl_ray.cluster.waiting import ClusterWait, pool_waits
from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.launch import TrainingResult, export_adapter, run_training
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.sampling import sample_policy
from ctrl_ray.distributed.worker import TrainJob
from ctrl_ray.distributed.worker_group import new_channel
from ctrl_ray.driver.candidates import carry_classifiers, store_candidate_share
from ctrl_ray.driver.classifier import SamplePipeline, fit_classifier
from ctrl_ray.driver.pre_trained import PreTrained, has_target, reference_job
from ctrl_ray.driver.remedies import with_remedies
from ctrl_ray.driver.run_log import RunLog
from ctrl_ray.driver.structural import measure_structural
from ctrl_ray.evaluation.certificate import certificate_row, certify_evaluation
from ctrl_ray.evaluation.fidelity import judges_of
from ctrl_ray.evaluation.judging import evaluation_row, judge
from ctrl_ray.evaluation.samples import EvaluationSamples, caption
from ctrl_ray.offline.reading import OnBadRow
from ctrl_ray.planning.preflight import CheckedRun
from ctrl_ray.reporting.pictures import reliability_pictures
from ctrl_ray.reporting.report import REPORT, report_pictures, write_report
from ctrl_ray.reporting.summary import Evaluation, not_learned_of
from ctrl_ray.reporting.tracking import RunTracker, read_metrics
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.rewards.pool import start_reward_pool
from ctrl_ray.runs.copies import CLASSIFIER
from ctrl_ray.runs.folder import ADAPTER, CHECKPOINTS, RunFolder, below

NOT_DRAWN = PreTrained()
Scorer = PooledRewards | RewardModelSpec


@dataclass(frozen=True, kw_only=True)
class FinalEvaluation:
    """The pre-trained model and the trained policy, on the same prompts and noise."""

    before: Mapping[str, Any]
    """The judgement of the pre-trained model (`judge`)."""
    after: Mapping[str, Any]
    """That of the policy."""
    samples: EvaluationSamples
    """The policy's."""
    report: Path
    """The page."""
    kl_noise_floor: float | None
    """Of the training, in nats (`ctrl_ray.evaluation.metric_names`)."""


def prepare_classifiers(
    checked: CheckedRun, folder: RunFolder, sample_pipeline: SamplePipeline | None, on_bad_row: OnBadRow = "error"
) -> CheckedRun:
    """Stage 1: fit the classifiers that the config does not give; the run keeps a copy of every one it uses."""
    folders: dict[str, Path] = {}
    for name, control in checked.config.controls.items():
        target = folder / CLASSIFIER / name
        if not (target / "classifier.json").is_file():
            if control.classifier is not None:
                _copy_whole(Path(control.classifier), target)
            else:
                wants_samples = checked.config.classifier.num_pipeline_samples > 0
                fitted = fit_classifier(
                    checked.config,
                    name,
                    output_dir=target,
                    sample_pipeline=sample_pipeline if wants_samples else None,
                    on_bad_row=on_bad_row,
                    storage_path=below(folder.storage_path, CHECKPOINTS) if not folder.is_local else None,
                )
                folder.upload()
                print(
                    f"classifier of {name}: accuracy {fitted.after['accuracy']:.3f}, ECE {fitted.after['ece']:.3f} on "
                    "held-out images",
                    *warning_lines(name, fitted.doubts),
                    sep="\n",
                    flush=True,
                )
        folders[name] = target
    return checked.with_classifiers(folders)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder to where none is, or a part of one that a killed run has left; a half copy is never in its place."""
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


@contextmanager
def rewards_of(config: TrainConfig) -> Iterator[Scorer]:
    """The pool's client, or (with rewards.num_actors = 0) what every worker loads for itself."""
    classifiers = {name: str(control.classifier) for name, control in config.controls.items()}
    spec = RewardModelSpec(
        base_model=config.base_model,
        revision=config.base_revision,
        classifiers=classifiers,
        decode_chunk_size=config.rewards.fixed_decode_chunk_size,
        precision=config.scaling.precision,
        copies=copies_of(list(classifiers.values())),
    )
    if config.rewards.num_actors == 0:
        yield spec
        return
    limit = config.scaling.placement_timeout_s
    wait = ClusterWait(
        needed_resources(config), limit, lambda line: print(line, flush=True), waits=lambda: pool_waits(config)
    )
    with start_reward_pool(
        spec,
        config.rewards,
        num_workers=config.scaling.fixed_num_workers,
        placement_timeout_s=limit,
        on_wait=wait.poll,
    ) as pool:
        yield pool.client()


def fine_tune(
    checked: CheckedRun,
    folder: RunFolder,
    rewards: Scorer,
    *,
    resume: bool,
    pre_trained: PreTrained = NOT_DRAWN,
    callbacks: Sequence[UserCallback] = (),
    on_bad_row: OnBadRow = "error",
) -> TrainingResult:
    """Stages 2 and 3: train the workers, follow their metrics, export the best checkpoint's adapter.

    pre_trained: with them every evaluation has a certificate. callbacks: Ray Train's, such as the one that tells Ray Tune.
    on_bad_row: As for `prepare_classifiers`, where the workers read the data set too (CFG fine-tuning).
    """
    log = RunLog(checked.config, folder, resume=resume)
    job = train_job(checked, rewards, pre_trained, on_bad_row)
    try:
        with with_remedies(checked):
            trained = run_training(job, folder.storage_path, folder.name, log, callbacks=callbacks)
        export_adapter(trained, folder / ADAPTER)
        carry_classifiers(checked.config, folder / ADAPTER)
    finally:
        log.close()
        folder.upload()
    return trained


def train_job(
    checked: CheckedRun, rewards: Scorer, pre_trained: PreTrained = NOT_DRAWN, on_bad_row: OnBadRow = "error"
) -> TrainJob:
    """What the workers of a checked run get, with a channel of their own to this process."""
    return TrainJob(
        config=checked.config,
        controls=checked.controls,
        prompts=checked.prompts,
        evaluation_prompts=checked.evaluation_prompts,
        pre_trained_log_probs={} if pre_trained.scored is None else pre_trained.scored.class_log_probs,
        rewards=rewards,
        info=checked.info,
        channel=new_channel(),
        make_method=functools.partial(make_method, on_bad_row=on_bad_row),
        copies=copies_of([checked.config.init_adapter] if checked.config.init_adapter else []),
    )


def evaluate_and_report(
    checked: CheckedRun,
    folder: RunFolder,
    rewards: Scorer,
    trained: TrainingResult,
    facts: Mapping[str, str],
    *,
    pre_trained: PreTrained = NOT_DRAWN,
) -> FinalEvaluation:
    """Sample before and after with the same prompts and noise, judge both by the oracles, write the report.

    facts: what else the report should tell, such as times. pre_trained: what is there already.
    """
    updates_done, floor = trained.updates_done, trained.kl_noise_floor
    config = checked.config
    job = reference_job(checked)
    evaluations, judges = {}, None
    for name, reference in (("before", True), ("after", False)):
        if reference and pre_trained.shown is not None:
            samples = pre_trained.shown
        else:
            part = dataclasses.replace(job, reference=reference, adapter=str(folder / ADAPTER))
            with with_remedies(checked):
                samples = sample_policy(part, rewards, config.scaling)
        judges = judges or judges_of(config.evaluation, checked.evaluation_prompts, samples.image_size)
        judged = judge(samples, config.controls, **judges._asdict(), by="oracle" if reference else "label")
        evaluations[name] = Evaluation(judged, samples)
    scored = pre_trained.scored or evaluations["before"].samples
    after = evaluations["after"].samples
    certificate = certify_evaluation(scored, after, config.controls, config.kl_coef) if has_target(config) else {}
    if certificate:
        certificate["structural"] = measure_structural(*(checked, rewards, str(folder / ADAPTER), scored, after.labels))
    with with_remedies(checked):
        store_candidate_share(config, folder / ADAPTER, job, rewards, evaluations["before"].samples, after)
    with RunTracker(
        folder.local,
        run_name=folder.name,
        config=config,
        tracker=config.tracker,
        resume_from_update=updates_done,
    ) as tracker:
        known = {} if floor is None else {"kl_noise_floor": floor}
        row = evaluation_row(evaluations["after"].judged) | certificate_row(certificate) | known
        tracker.log("evaluation", updates_done, row)
        _log_images(tracker, updates_done, config, evaluations)
        page = write_report(
            folder / REPORT,
            controls=config.controls,
            before=evaluations["before"],
            after=evaluations["after"],
            config=config,
            metrics_rows=read_metrics(folder.local),
            classifier_figures=reliability_pictures(
                {name: Path(str(control.classifier)) for name, control in config.controls.items()}
            ),
            facts={"exported update": f"{trained.best_metrics['updates_done']} of {updates_done}", **facts},
            adapter=str(folder / ADAPTER),
            images_per_class=config.export_images,
            kl_noise_floor=floor,
            certificate=certificate,
        )
        for name, picture in report_pictures(folder / REPORT).items():
            tracker.log_images(updates_done, name, [picture], [name])
    folder.upload()
    return FinalEvaluation(
        before=evaluations["before"].judged,
        after={**evaluations["after"].judged, **certificate, "not_learned": not_learned_of(*evaluations.values())},
        samples=evaluations["after"].samples,
        report=page,
        kl_noise_floor=floor,
    )


def _log_images(tracker: RunTracker, update: int, config: TrainConfig, evaluations: Mapping[str, Evaluation]) -> None:
    for name, evaluation in evaluations.items():
        count = min(config.export_images * 4, len(evaluation.samples))
        samples = evaluation.samples.select(np.arange(count))
        rows = zip(samples.prompts, samples.labels.tolist(), strict=True)
        captions = [caption(prompt, tuple(config.controls), labels) for prompt, labels in rows]
        tracker.log_images(update, name, list(samples.images), captions)
