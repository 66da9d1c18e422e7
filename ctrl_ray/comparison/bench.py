"""What all methods of a comparison share, and what is done with each: training, the choice of its knob's value, the test."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctrl_ray.comparison.adapters import adapter_note
from ctrl_ray.comparison.classifiers import classifier_difference, shipped_classifiers, with_classifiers
from ctrl_ray.comparison.cost import Cost
from ctrl_ray.comparison.drawing import Desk, job_of
from ctrl_ray.comparison.methods import METHODS, PLAIN
from ctrl_ray.comparison.plan import (
    EXACT_A_TEST_IMAGE,
    FIRST_TEST,
    FIRST_VALIDATION,
    MOST_POOL,
    MethodPlan,
    Plan,
    held_out_prompts,
)
from ctrl_ray.comparison.progress import Progress
from ctrl_ray.comparison.results import Target, choose, distance_of, numbers_of, over_seeds
from ctrl_ray.comparison.side_by_side import runs_at_a_time, sharing
from ctrl_ray.comparison.training import (
    HELD_OUT,
    Train,
    TrainedRun,
    held_out_config,
    is_finished,
    noised_runs,
    run_config,
    trained_run,
)
from ctrl_ray.config import ScalingConfig, TrainConfig
from ctrl_ray.distributed.sampling import SamplingJob
from ctrl_ray.evaluation.certificate import exponents_of
from ctrl_ray.evaluation.fidelity import judges_of
from ctrl_ray.evaluation.judging import oracle_labels
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.offline.prompts import training_prompts
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.verification.drawing import Drawer
from ctrl_ray.verification.measured import measure_samples
from ctrl_ray.verification.rejection import fewest, grow_pool
from ctrl_ray.verification.target import joint_classes

TIMED_IMAGES = 16
"""Drawn at once where costs are measured."""
_VALIDATION_SEED, _TEST_SEED, _POOL_SEED = 3_000_017, 4_000_037, 5_000_011
"""Added to the comparison's seed: noise that no run, no evaluation and no verification draws."""
_FIRST_POOL = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is compared, and where it is written."""

    preset: str
    config: TrainConfig
    """The preset's."""
    plan: Plan
    classifiers: Mapping[str, str]
    """Folders that are given, by control; the others are fitted."""
    folder: Path
    seed: int
    command: str
    """As it was given, for the report."""


@dataclass(frozen=True)
class Source:
    """What a method draws with, beside its setting."""

    adapter: str | None = None
    """Folder of a trained policy; None: the pre-trained model."""
    noised: tuple[str, ...] = ()
    """NAME=FOLDER of each control's noised classifier, for methods that need them."""

    @classmethod
    def of(cls, noised: Mapping[str, TrainedRun], adapter: str | None = None) -> Source:
        """noised: of each control."""
        return cls(adapter, tuple(f"{name}={run.adapter}" for name, run in noised.items()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all methods of a comparison share."""

    question: Question
    config: TrainConfig
    """With the comparison's classifiers."""
    base: SamplingJob
    """A plain job without ids."""
    desk: Desk
    target: Target
    progress: Progress
    say: Callable[[str], None]
    at_a_time: int
    """Runs that train side by side."""
    shown: dict[str, EvaluationSamples] = dataclasses.field(default_factory=dict)
    """Title of each method to its first test images."""

    @classmethod
    def made(cls, question: Question, folders: Mapping[str, str], say: Callable[[str], None]) -> Bench:
        """Draws the pool of pre-trained and exact samples."""
        config = with_classifiers(question.config, folders)
        scaling, base = _scaling(config), _base_job(config)
        rewards = _rewards(config, folders)
        classes = joint_classes(config.controls)
        exponents = exponents_of(config.controls, config.kl_coef)
        test = max(plan.counts.test for plan in question.plan.methods)
        pool = grow_pool(
            Drawer(
                job=dataclasses.replace(base, seed=question.seed + _POOL_SEED, with_kl=False),
                rewards=rewards,
                scaling=scaling,
                first_id=_FIRST_POOL,
                folder=question.folder / "samples" / "pool",
                say=say,
            ).draw,
            exponents,
            classes,
            unit=len(classes) * len(base.prompts),
            worth=fewest(len(base.prompts)),
            wanted=EXACT_A_TEST_IMAGE * test // len(classes),
            limit=MOST_POOL * test,
            seed=question.seed,
            say=say,
        )
        progress = Progress(question.plan.units, say)
        desk = Desk(
            rewards=rewards,
            scaling=scaling,
            folder=question.folder,
            drawn=progress.drawn,
            timing_s=question.plan.timing_s,
        )
        size = load_backbone(base.base_model, base.revision, base.sampler).image_size()
        return cls(
            question=question,
            config=config,
            base=base,
            desk=desk,
            target=Target(
                pool=pool,
                classes=classes,
                controls=config.controls,
                exponents=exponents,
                **judges_of(config.evaluation, base.prompts, size)._asdict(),
                seed=question.seed,
            ),
            progress=progress,
            say=say,
            at_a_time=runs_at_a_time(config),
        )

    @property
    def exponents(self) -> dict[str, float]:
        """λ of each control."""
        return dict(self.target.exponents)

    def method_row(self, plan: MethodPlan, train: Train) -> dict[str, Any]:
        """Train it, choose its knob's value, judge it, time it: a row of results.json."""
        runs = [self.trained(plan, seed, train) for seed in plan.seeds]
        sources = self.sources(plan, [*plan.adapters, *(run.adapter for run in runs)])
        runs += self._noised().values() if plan.method.noised else ()
        value, validation = self.choose(plan, sources)
        seeds, self.shown[plan.method.title] = self.test(plan, value, sources)
        trains = bool(plan.adapters or runs)
        has_adapter = sources[0].adapter is not None
        timed = functools.partial(self._timed, plan, value, sources[0])
        note = adapter_note(plan.adapters[0], self.config, plan.method.title) if plan.adapters else None
        return {
            "name": plan.name,
            "title": plan.method.title,
            "knob": plan.method.knob,
            "chosen": value,
            "trained": trains,
            "validation": validation,
            "test": over_seeds(seeds),
            "seeds": seeds,
            # an adapter as `sample` draws, for one class; rejection needs other tries in each, so it has all of them
            "cost": dataclasses.asdict(timed(of_one_class=has_adapter)),
            "cost_mixed": dataclasses.asdict(timed(of_one_class=False)) if has_adapter else None,
            "training": [dataclasses.asdict(run) for run in runs] if trains else None,
            "note": note,
        }

    def sources(self, plan: MethodPlan, adapters: Sequence[str]) -> list[Source]:
        """What each policy of a method draws with; one, the pre-trained model's, where there is no adapter."""
        noised = self._noised() if plan.method.noised else {}
        return [Source.of(noised, adapter) for adapter in adapters] or [Source.of(noised)]

    def choose(self, plan: MethodPlan, sources: Sequence[Source]) -> tuple[float, list[dict[str, Any]]]:
        """The value of the knob that is best on the validation images, and what each value came to."""
        if not plan.chooses:
            return plan.values[0], []
        validation = [self._validated(plan, value, sources) for value in plan.values]
        return plan.values[choose(validation)], validation

    def test(
        self, plan: MethodPlan, value: float, sources: Sequence[Source]
    ) -> tuple[list[dict[str, Any]], EvaluationSamples]:
        """The numbers of each source on the test images, and the first one's images."""
        self.progress.what = f"{plan.method.title}, test"
        ids = range(FIRST_TEST, FIRST_TEST + plan.counts.test)
        drawn = [self._draw(plan, value, source, ids, _TEST_SEED) for source in sources]
        common, pre_trained = self.question.plan.common_test, plan.name == PLAIN
        numbers = [numbers_of(self.target, part, pre_trained=pre_trained, common=common) for part in drawn]
        return numbers, drawn[0]

    def all_runs(self) -> list[TrainConfig]:
        """Of all methods and seeds, and the one without some of the prompts."""
        runs = [self.run_of(plan, seed) for plan in self.question.plan.methods for seed in plan.seeds]
        return [*runs, *([self._held_out_run()] if self.question.plan.held_out else [])]

    def run_of(self, plan: MethodPlan, seed: int) -> TrainConfig:
        """The method's run of this seed."""
        assert plan.method.training is not None
        folder = self.question.folder / "runs" / f"{plan.name}-{seed}"
        return sharing(run_config(self.config, plan.method.training, folder, seed), self.at_a_time)

    def trained(self, plan: MethodPlan, seed: int, train: Train) -> TrainedRun:
        """The method's run of this seed, finished."""
        config = self.run_of(plan, seed)
        if not is_finished(Path(config.output_dir)):
            self.say(f"{plan.method.title}: training with seed {seed}, in {config.output_dir}")
        return trained_run(config, train)

    def _prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those that one run is not given, and the others."""
        held = held_out_prompts(self.base.prompts)
        return held, tuple(prompt for prompt in self.base.prompts if prompt not in held)

    def _held_out_run(self) -> TrainConfig:
        folder = self.question.folder / "runs" / HELD_OUT
        return sharing(held_out_config(self.config, folder, self._prompts()[1]), self.at_a_time)

    def _noised(self) -> dict[str, TrainedRun]:
        """Each control's classifier of noised latents."""
        return noised_runs(self.config, self.question.folder / "noised", self.say)

    def held_out(self, rows: Sequence[Mapping[str, Any]], train: Train) -> dict[str, Any]:
        """Train CTRL without a quarter of the prompts; what it reaches on those and on the others, at CTRL's chosen value."""
        held, kept = self._prompts()
        config = self._held_out_run()
        if not is_finished(Path(config.output_dir)):
            self.say(f"CTRL: training without {len(held)} of {len(held) + len(kept)} prompts")
        source = Source(trained_run(config, train).adapter)
        plan = next(plan for plan in self.question.plan.methods if plan.name == "ctrl")
        value = next(row["chosen"] for row in rows if row["name"] == "ctrl")
        self.progress.what = "CTRL, prompts held back"
        found: dict[str, Any] = {"prompts": list(held)}
        for side, prompts in (("held_out", held), ("trained", kept)):
            ids = range(FIRST_TEST, FIRST_TEST + plan.counts.test)
            drawn = self._draw(plan, value, source, ids, _TEST_SEED, prompts)
            found[side] = numbers_of(self.target, drawn, pre_trained=False, common=len(drawn))
        return found

    def shipped_difference(self) -> dict[str, Any]:
        """Of each control how far the preset's own classifier differs on the pre-trained test images; {} where the preset names
        none, or the comparison was given it."""
        shipped = shipped_classifiers(self.question.config)
        own = self.shown.get(METHODS[PLAIN].title)
        if own is None or not shipped or shipped == dict(self.desk.rewards.classifiers):
            return {}
        desk = dataclasses.replace(
            self.desk, rewards=dataclasses.replace(self.desk.rewards, classifiers=shipped), drawn=lambda *_: None
        )
        ids = tuple(own.sample_ids.tolist())
        theirs = desk.draw(dataclasses.replace(self.base, seed=self.question.seed + _TEST_SEED, sample_ids=ids), 1.0)
        found = {}
        for name, control in self.config.controls.items():
            truth = oracle_labels(name, control, own.images, own.prompts).classes if control.oracle else None
            beliefs = own.class_log_probs[name], theirs.class_log_probs[name]
            found[name] = classifier_difference(*beliefs, truth, control, self.exponents[name])
        return found

    def _validated(self, plan: MethodPlan, value: float, sources: Sequence[Source]) -> dict[str, Any]:
        """The mean over sources of the worst class's distance at one value of the knob."""
        self.progress.what = f"{plan.method.title}, {plan.method.knob} {value:g}"
        ids = range(FIRST_VALIDATION, FIRST_VALIDATION + plan.counts.validation)
        worst = []
        for source in sources:
            drawn = self._draw(plan, value, source, ids, _VALIDATION_SEED)
            worst.append(distance_of(self.target, measure_samples(drawn, self.config.controls))["worst"])
        known = [each for each in worst if each is not None]
        mean = sum(known) / len(known) if len(known) == len(worst) else None
        return {"value": value, "worst": mean, "each": worst, "cost": plan.cost(value)}

    def _draw(
        self,
        plan: MethodPlan,
        value: float,
        source: Source,
        ids: range,
        seed: int,
        prompts: tuple[str, ...] | None = None,
    ) -> EvaluationSamples:
        base = dataclasses.replace(
            self.base, seed=self.question.seed + seed, sample_ids=tuple(ids), prompts=prompts or self.base.prompts
        )
        return self.desk.draw(self._job(base, plan, value, source), plan.cost(value))

    def _timed(self, plan: MethodPlan, value: float, source: Source, *, of_one_class: bool) -> Cost:
        step = len(self.target.classes) if of_one_class else 1
        ids = tuple(range(FIRST_VALIDATION, FIRST_VALIDATION + step * TIMED_IMAGES, step))
        plain = dataclasses.replace(self.base, seed=self.question.seed + _VALIDATION_SEED, sample_ids=ids)
        return self.desk.time(self._job(plain, plan, value, source), plain)

    def _job(self, base: SamplingJob, plan: MethodPlan, value: float, source: Source) -> SamplingJob:
        return job_of(base, plan.method.at(value, source.noised), source.adapter, tuple(self.target.exponents.values()))


def _base_job(config: TrainConfig) -> SamplingJob:
    size = config.evaluation.batch_size
    return SamplingJob(
        adapter=None,
        base_model=config.base_model,
        revision=config.base_revision,
        controls=config.controls,
        sampler=config.sampler,
        prompts=tuple(dict.fromkeys(training_prompts(config))),
        sample_ids=(),
        seed=0,
        batch_size=size if isinstance(size, int) else 16,
        reference=True,
        precision=config.scaling.precision if torch.cuda.is_available() else "fp32",
    )


def _rewards(config: TrainConfig, folders: Mapping[str, str]) -> RewardModelSpec:
    chunk = config.rewards.decode_chunk_size
    return RewardModelSpec(
        base_model=config.base_model,
        revision=config.base_revision,
        precision=config.scaling.precision,
        classifiers=folders,
        decode_chunk_size=chunk if isinstance(chunk, int) else 8,
    )


def _scaling(config: TrainConfig) -> ScalingConfig:
    """A worker on each card, else on each core."""
    limit = config.scaling.placement_timeout_s
    if torch.cuda.is_available():
        return ScalingConfig(use_gpu=True, num_workers=torch.cuda.device_count(), placement_timeout_s=limit)
    return ScalingConfig(num_workers=len(os.sched_getaffinity(0)), threads_per_worker=1, placement_timeout_s=limit)
