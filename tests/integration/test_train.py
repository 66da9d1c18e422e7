"""The main job on the tiny pipeline: real classifier, pool, DeepSpeed engine, checkpoints, report."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

import ctrl_ray
from ctrl_ray.config import ControlConfig, EstimatorConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed import sampling
from ctrl_ray.distributed.launch import run_training
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.distributed.method import make_method
from ctrl_ray.driver.pre_trained import PRE_TRAINED_FILE, reference_job
from ctrl_ray.driver.stages import fine_tune, prepare_classifiers, rewards_of, train_job
from ctrl_ray.errors import InterruptedRunError, ResourceError
from ctrl_ray.evaluation.samples import load_samples
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from ctrl_ray.reporting.tracking import read_metrics
from ctrl_ray.rewards.protocol import PendingRewards
from ctrl_ray.runs.folder import ADAPTER, RunFolder
from tests.classifiers import save_classifier
from tests.integration.faulty import Faulty

pytestmark = pytest.mark.usefixtures("ray_session")


def _adapter(run: ctrl_ray.Run) -> dict[str, torch.Tensor]:
    assert run.adapter is not None
    return load_file(run.adapter / "pytorch_lora_weights.safetensors") | load_file(
        run.adapter / "control_embeddings.safetensors"
    )


def _one_update(config: TrainConfig) -> TrainConfig:
    """A short run: no evaluation, rewards inside the workers."""
    return dataclasses.replace(
        config,
        num_updates=1,
        evaluation=dataclasses.replace(config.evaluation, every_updates=0),
        rewards=dataclasses.replace(config.rewards, num_actors=0),
    )


def _fine_tuned(config: TrainConfig, *, resume: bool = False) -> ctrl_ray.Run:
    """`ctrl_ray.fit` as far as the adapter: the final evaluation and its report take as long again."""
    folder, checked = RunFolder(config.output_dir), preflight(config)
    folder.prepare(checked.asked, resume=resume)
    checked = prepare_classifiers(checked, folder, None)
    with rewards_of(checked.config) as rewards:
        trained = fine_tune(checked, folder, rewards, resume=resume)
    assert (trained.updates_done, trained.stopped) == (config.num_updates, None)
    return ctrl_ray.Run(folder=folder.local, adapter=folder / ADAPTER, summary={})


def _latest_state(run_folder: Path) -> dict[str, torch.Tensor]:
    checkpoints = sorted(path for path in (run_folder / "checkpoints").glob("*/checkpoint_*") if path.is_dir())
    return load_file(checkpoints[-1] / "training_state.safetensors")


@pytest.fixture(scope="module")
def finished(base_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> ctrl_ray.Run:
    """Six updates and their evaluations, from end to end, with Aim."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return ctrl_ray.fit(dataclasses.replace(base_config, output_dir=str(folder), tracker="aim"))


@pytest.fixture(scope="module")
def one_update(base_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> ctrl_ray.Run:
    """`_one_update` of one worker."""
    folder = tmp_path_factory.mktemp("one_update") / "run"
    return _fine_tuned(dataclasses.replace(_one_update(base_config), output_dir=str(folder)))


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch arithmetic, trainable parameters, UNet calls, the memory plan's table; the numbers are right, and no Ray is
    started."""
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        base_model=str(tiny_pipeline),
        data="shapes",
        controls={"jpeg_size": ControlConfig(oracle="jpeg_size", thresholds=(900.0, 1000.0))},
        global_batch_size=8,
        micro_batch_size_per_worker=4,
    )
    monkeypatch.delattr(ray, "init")
    run = ctrl_ray.fit(config, dry_run=True)
    text = capsys.readouterr().out
    assert "8 trajectories per update = 1 worker × 2 micro-batches × 4; 24 prompts" in text
    assert "30 forwards and 20 backwards; 240 and 160 an update" in text
    assert "3 classes, guidance_strength 1 / kl_coef 1" in text
    for part in ("weights, frozen", "weights, trainable", "gradients", "optimizer moments", "activations of one step",
                 "latents kept", "peak of the adjoint pass", "traffic", "fits       "):  # fmt: skip
        assert part in text, part
    assert "2 micro-batches × 11 latents" in text
    assert "an update and worker (counted)" in text
    assert not run.folder.exists()


def test_the_whole_run_and_its_files(finished: ctrl_ray.Run) -> None:
    """config → fine-tuning → adapter → report, with metrics for every update and Aim beside them."""
    assert {p.name for p in finished.folder.iterdir()} >= {
        "config.json",
        "classifier",
        "checkpoints",
        "adapter",
        "metrics.jsonl",
        "report",
        "aim",
    }
    summary = json.loads((finished.folder / "report" / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"accuracy", "macro_f1", "prompt_fidelity", "kl", "diversity", "num_samples"} <= summary[when].keys()
        assert summary[when]["num_samples"] == 8
    assert summary["before"]["kl"] == 0
    assert summary["after"]["kl"] > summary["kl_noise_floor"] > 0
    after = summary["after"]
    assert after["gap"] == pytest.approx(after["log_z"] - after["objective"]) and after["gap_standard_error"] > 0
    assert 0 < after["ess"] <= 1 and after["bounds"][0] >= after["objective"] - 1e-9
    assert 0 <= after["structural"]["initial_noise"]["standard_error"] < 1
    assert 0 < after["structural"]["fixed_variances"]["standard_error"] < 1
    rows = read_metrics(finished.folder)
    assert [row["update"] for row in rows if row["kind"] == "update"] == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["update"] for row in evaluations] == [0, 3, 6, 6]
    assert (
        evaluations[-1]["gap"] == after["gap"] and sum(key.startswith("gap/jpeg_size/") for key in evaluations[1]) == 4
    )
    assert all(row["gap"] == pytest.approx(row["log_z"] - row["objective"]) for row in evaluations)
    assert len({round(row["log_z"], 9) for row in evaluations}) == 1  # of one set of samples, kept with the run
    assert len(load_samples(finished.folder / PRE_TRAINED_FILE)) == 8
    assert evaluations[0]["kl"] == 0  # policy = reference before the first update
    moved = _adapter(finished)["jpeg_size"]
    assert moved[:-1].abs().max() > 0
    assert moved[-1].abs().max() == 0  # the null row


def test_sampling_without_room_ends_and_says_what_is_missing(
    base_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_IMPORT_S", 1.0)
    job = dataclasses.replace(reference_job(preflight(base_config)), sample_ids=(0, 1))
    scaling = ScalingConfig(cpus_per_worker=64, placement_timeout_s=2.0)
    with (
        rewards_of(_one_update(base_config)) as rewards,
        pytest.raises(ResourceError, match="asks for 64 CPUs; there: 1"),
    ):
        sampling.sample_policy(job, rewards, scaling)


def test_six_updates_equal_some_a_stop_and_the_rest_bitwise(
    finished: ctrl_ray.Run, base_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, moments and step count, with the pool in deterministic mode."""
    parts = dataclasses.replace(base_config, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        _interrupt_in_the_second_update(tmp_path, patch)
        with pytest.raises(InterruptedRunError, match=r"after update \d of 6.*--resume"):
            ctrl_ray.fit(parts)
    done = sorted(row["update"] for row in read_metrics(tmp_path / "parts") if row["kind"] == "update")
    assert 2 <= done[-1] < 6
    resumed = _fine_tuned(parts, resume=True)
    first, second = _latest_state(finished.folder), _latest_state(resumed.folder)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert [row["update"] for row in read_metrics(tmp_path / "parts") if row["kind"] == "update"] == [1, 2, 3, 4, 5, 6]


def _interrupt_in_the_second_update(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """This process gets SIGINT, as by Ctrl-C, while the worker waits in its second update, where nothing is due. Request 0 is
    the evaluation before the first update; an update has two."""
    from ctrl_ray.driver import stages

    waits, interrupted = folder / "waits", folder / "interrupted"
    own = stages.rewards_of

    @contextmanager
    def rewards_that_wait(config: TrainConfig) -> Iterator[Faulty]:
        with own(config) as rewards:
            yield Faulty(rewards, rank=0, request=4, fault=functools.partial(_wait_until, waits, interrupted))

    def interrupt() -> None:
        deadline = time.monotonic() + 300
        while not waits.exists():
            if time.monotonic() > deadline:
                return  # the test then says that nothing was interrupted
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.touch()

    patch.setattr(stages, "rewards_of", rewards_that_wait)
    threading.Thread(target=interrupt, daemon=True).start()


def _wait_until(waits: Path, interrupted: Path, pending: PendingRewards) -> PendingRewards:
    waits.touch()
    deadline = time.monotonic() + 120
    while not interrupted.exists():
        assert time.monotonic() < deadline, "nobody interrupted the run"
        time.sleep(0.05)
    time.sleep(2)  # until the driver's wish to stop has reached the channel; the run has four updates more
    return pending


def test_four_workers_have_the_gradient_of_one(
    one_update: ctrl_ray.Run, base_config: TrainConfig, tmp_path: Path
) -> None:
    """One update on 1 × 8 (two micro-batches) and 4 × 2 (gloo, ZeRO-1): 1e-4 relative L2 over all parameters, 1e-2 for
    every one.

    test_sharding.py has two workers. One update, because Adam makes the rounding of tiny gradients into steps of full size.
    """
    short = _one_update(base_config)
    config = dataclasses.replace(
        short,
        output_dir=str(tmp_path / "four"),
        micro_batch_size_per_worker=2,
        scaling=dataclasses.replace(short.scaling, num_workers=4),
    )
    states = [_latest_state(one_update.folder), _latest_state(_fine_tuned(config).folder)]
    # after one update the first moment is (1 - beta1) times the gradient
    names = [name for name in states[0] if name.startswith("exp_avg/")]
    one, several = (torch.cat([state[name].flatten() for name in names]) for state in states)
    assert float((one - several).norm() / one.norm()) < 1e-4
    for name in names:
        difference = float((states[0][name] - states[1][name]).norm())
        assert difference < 1e-2 * float(states[0][name].norm()) + 1e-6 * float(one.norm()), name


def test_evaluations_beside_training_are_those_between_updates(
    finished: ctrl_ray.Run, base_config: TrainConfig, tmp_path: Path
) -> None:
    """Ray Train's asynchronous validation: the same results at the same updates, their samples in Aim."""
    evaluation = dataclasses.replace(base_config.evaluation, asynchronous=True)
    config = dataclasses.replace(base_config, evaluation=evaluation, tracker="aim", output_dir=str(tmp_path / "beside"))
    evaluations = []
    for run in (finished, ctrl_ray.fit(config)):
        rows = [row for row in read_metrics(run.folder) if row["kind"] == "evaluation"]
        evaluations.append({row["update"]: row for row in rows[:-1]})  # the last one is the report's
    between, beside = evaluations
    assert list(between) == list(beside) == [0, 3, 6]
    for update, row in between.items():
        assert row.keys() == beside[update].keys()
        for name in row.keys() - {"kind", "update", "time", "kl_noise_floor"}:
            assert beside[update][name] == pytest.approx(row[name], abs=1e-5, rel=1e-5), (update, name)
    import aim
    from aim.storage.context import Context

    repo = aim.Repo.from_path(str(tmp_path / "beside" / "aim"))
    logged = repo.get_run(repo.list_all_runs()[0])
    names = {images["name"] for images in logged.collect_sequence_info("images")["images"]}
    assert names >= {"before", "after", "during", "curves", "samples_jpeg_size"}  # samples, and the report's pictures
    images = logged.get_image_sequence("during", Context({}))
    updates, samples = images.values.sparse_list()
    assert list(updates) == [0, 3, 6]
    assert [len(at) for at in samples] == [8, 8, 8]  # two of each class, all eight samples


class _EveryEstimator:
    """Each update by another estimator, each chosen by configuration alone."""

    needs_cotangent = True

    def __init__(self, config: TrainConfig) -> None:
        names = ("adjoint_matching", "reinforce", "last_k", "random_suffix", "sticking_the_landing")
        steps = {"adjoint_matching": 2, "last_k": 2}
        estimators = [EstimatorConfig(name=name, steps=steps.get(name, 0)) for name in names]  # type: ignore[arg-type]
        self.methods = [make_method(dataclasses.replace(config, estimator=estimator)) for estimator in estimators]

    def update(self, learner: Learner, update: int) -> dict[str, float]:
        return self.methods[update].update(learner, update)


@pytest.mark.full
def test_an_image_pipeline_trains_with_every_estimator(base_config: TrainConfig, tmp_path: Path) -> None:
    """The control table has a gradient in each update, its null row has none."""
    config = dataclasses.replace(
        _one_update(base_config),
        num_updates=5,
        checkpoint_every_updates=1,
        num_checkpoints_to_keep=6,
        group_size=4,
        optimizer=dataclasses.replace(base_config.optimizer, beta1=0.0),  # the first moment is the update's gradient
        output_dir=str(tmp_path / "run"),
    )
    with rewards_of(config) as rewards:
        job = dataclasses.replace(train_job(preflight(config), rewards), make_method=_EveryEstimator)
        run_training(job, config.output_dir, "run", lambda row: None)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("*/checkpoint_*/training_state.safetensors"))
    assert len(checkpoints) == 5
    for file in checkpoints:
        gradient = load_file(file)["exp_avg/controls.tables.jpeg_size.weight"]
        assert bool(torch.isfinite(gradient).all()) and float(gradient[:-1].norm()) > 0
        assert float(gradient[-1].norm()) == 0


@pytest.mark.full
def test_cfg_finetuning_is_a_whole_run(base_config: TrainConfig, tmp_path: Path) -> None:
    """Two workers, the scale of the label, evaluations with their certificate: on the data set's images, by one flag."""
    config = dataclasses.replace(
        base_config,
        training_method="cfg",
        num_updates=2,
        sampler=dataclasses.replace(base_config.sampler, control_scale=2.0),
        scaling=dataclasses.replace(base_config.scaling, num_workers=2),
        evaluation=dataclasses.replace(base_config.evaluation, every_updates=0),
        rewards=dataclasses.replace(base_config.rewards, num_actors=0),
        output_dir=str(tmp_path / "run"),
    )
    run = ctrl_ray.fit(config)
    rows = read_metrics(run.folder)
    losses = [row["denoising_loss"] for row in rows if row["kind"] == "update"]
    assert len(losses) == 2 and all(0.1 < loss < 10 for loss in losses)
    assert not any("reward" in row for row in rows)
    after = run.summary["after"]
    assert after["gap"] == pytest.approx(after["log_z"] - after["objective"]) and after["kl"] > 0
    assert run.adapter is not None
    described = json.loads((run.adapter / "adapter.json").read_text())
    assert described["control_scale"] == 2.0 and described["training"]["method"] == "cfg"
    table = _adapter(run)["jpeg_size"]
    assert table[:-1].abs().max() > 0 and table[-1].abs().max() == 0


def test_init_adapter_adds_a_second_control(one_update: ctrl_ray.Run, base_config: TrainConfig, tmp_path: Path) -> None:
    """The first control's table is where the adapter left it; the new control's rows have moved."""
    short = _one_update(base_config)
    second_control = ControlConfig(oracle="colourfulness", thresholds=(30.0,), guidance_strength=1.0)
    config = dataclasses.replace(
        short,
        output_dir=str(tmp_path / "second"),
        init_adapter=str(one_update.adapter),
        controls={"colourfulness": second_control},
    )
    save_classifier(tmp_path / "colour", "colourfulness", second_control)
    config = dataclasses.replace(
        config, controls={"colourfulness": dataclasses.replace(second_control, classifier=str(tmp_path / "colour"))}
    )
    second = _fine_tuned(config)
    before, after = _adapter(one_update), _adapter(second)
    assert torch.equal(before["jpeg_size"], after["jpeg_size"])
    assert after["colourfulness"][:-1].abs().max() > 0
    assert json.loads((tmp_path / "second" / "adapter" / "adapter.json").read_text())["controls"].keys() == {
        "jpeg_size",
        "colourfulness",
    }


@pytest.mark.full
def test_full_finetuning_exports_the_denoiser_that_was_trained(base_config: TrainConfig, tmp_path: Path) -> None:
    """AdamW's first step of every weight by hand, and the pipeline draws with the weights that it led to."""
    config = dataclasses.replace(_one_update(base_config), output_dir=str(tmp_path / "full"), full_finetune=True)
    run = _fine_tuned(config)
    start = build_policy(config).trainable_parameters()
    exported = build_policy(dataclasses.replace(config, init_adapter=str(run.adapter))).trainable_parameters()
    state, optimizer = _latest_state(run.folder), config.optimizer
    assert exported.keys() == start.keys() and len(start) > 100
    for name, weight in start.items():
        rate = optimizer.embedding_learning_rate if name.startswith("controls.") else optimizer.learning_rate
        gradient = state[f"exp_avg/{name}"] / (1 - optimizer.beta1)  # clipped
        step = rate / (1 + optimizer.warmup_updates) * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(exported[name].detach(), weight.detach() - step, atol=1e-6, rtol=1e-5)

    def draw(pipe: Any, **options: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", generator=generator, output_type="np", **options).images

    image = draw(ctrl_ray.ControlledPipeline.from_pretrained(str(run.adapter)), controls={"jpeg_size": 1})
    before = draw(load_backbone(config.base_model).load_pipeline(), num_inference_steps=3, eta=1.0, guidance_scale=1.0)
    assert image.shape == before.shape == (1, 32, 32, 3)
    assert 1e-3 < np.abs(image - before).max() < 0.5  # another image, but the same noise
