"""The main job on the tiny pipeline: real classifier, pool, DeepSpeed engine, checkpoints, report."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ctrl_ray
from ctrl_ray.config import (
    ClassifierConfig,
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.errors import InterruptedRunError
from ctrl_ray.reporting.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="session")
def base_config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> TrainConfig:
    """Six updates of eight trajectories, with a classifier fitted once for all tests."""
    from ctrl_ray.driver.classifier import fit_classifier

    config = TrainConfig(
        base_model=str(tiny_pipeline),
        data="shapes",
        num_drawn_images=160,
        num_updates=6,
        global_batch_size=8,
        micro_batch_size_per_worker=4,
        checkpoint_every_updates=3,
        controls={
            "jpeg_size": ControlConfig(
                oracle="jpeg_size", thresholds=(1000.0, 1200.0, 1400.0), unit="bytes", guidance_strength=2.0
            )
        },
        classifier=ClassifierConfig(epochs=1, batch_size=32),
        sampler=SamplerConfig(num_steps=3),
        lora=LoraConfig(rank=2, alpha=2.0),
        scaling=ScalingConfig(max_failures=0),
        evaluation=EvaluationConfig(every_updates=3, num_samples=8, final_num_samples=8, batch_size=8),
        aim=False,
    )
    folder = tmp_path_factory.mktemp("classifier") / "jpeg_size"
    fit_classifier(config, "jpeg_size", output_dir=folder, quiet=True)
    control = dataclasses.replace(config.controls["jpeg_size"], classifier=str(folder))
    return dataclasses.replace(config, controls={"jpeg_size": control})


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


def _latest_state(run_folder: Path) -> dict[str, torch.Tensor]:
    checkpoints = sorted(path for path in (run_folder / "checkpoints").glob("*/checkpoint_*") if path.is_dir())
    return load_file(checkpoints[-1] / "training_state.safetensors")


def test_the_whole_run_and_its_files(base_config: TrainConfig, tmp_path: Path) -> None:
    """config → fine-tuning → adapter → report, with metrics for every update and Aim beside them."""
    run = ctrl_ray.fit(dataclasses.replace(base_config, output_dir=str(tmp_path / "run"), aim=True))
    assert {p.name for p in run.folder.iterdir()} >= {
        "config.json",
        "classifier",
        "checkpoints",
        "adapter",
        "metrics.jsonl",
        "report",
        "aim",
    }
    summary = json.loads((run.folder / "report" / "summary.json").read_text())
    for when in ("before", "after"):
        assert {"accuracy", "macro_f1", "prompt_fidelity", "kl", "diversity", "num_samples"} <= summary[when].keys()
        assert summary[when]["num_samples"] == 8
    assert summary["before"]["kl"] == 0
    assert summary["after"]["kl"] > 0
    rows = read_metrics(run.folder)
    assert [row["update"] for row in rows if row["kind"] == "update"] == [1, 2, 3, 4, 5, 6]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["update"] for row in evaluations] == [0, 3, 6, 6]
    assert evaluations[0]["kl"] == 0  # policy = reference before the first update
    moved = _adapter(run)["jpeg_size"]
    assert moved[:-1].abs().max() > 0
    assert moved[-1].abs().max() == 0  # the null row


def test_six_updates_equal_three_a_stop_and_three_more_bitwise(base_config: TrainConfig, tmp_path: Path) -> None:
    """Parameters, moments and step count, with the pool in deterministic mode."""
    whole = ctrl_ray.fit(dataclasses.replace(base_config, output_dir=str(tmp_path / "whole")))
    parts = dataclasses.replace(base_config, output_dir=str(tmp_path / "parts"))
    _interrupt_after(tmp_path / "parts", update=2)
    with pytest.raises(InterruptedRunError, match=r"after update \d of 6.*--resume"):
        ctrl_ray.fit(parts)
    done = sorted(row["update"] for row in read_metrics(tmp_path / "parts") if row["kind"] == "update")
    assert done[-1] < 6
    resumed = ctrl_ray.fit(parts, resume=True)
    first, second = _latest_state(whole.folder), _latest_state(resumed.folder)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert [row["update"] for row in read_metrics(tmp_path / "parts") if row["kind"] == "update"] == [1, 2, 3, 4, 5, 6]


def _interrupt_after(folder: Path, update: int) -> None:
    """Send this process SIGINT, as Ctrl-C does, once the run has logged an update."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and f'"update", "update": {update},' in metrics.read_text():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()


def test_four_workers_have_the_gradient_of_one(base_config: TrainConfig, tmp_path: Path) -> None:
    """One update on 1 × 8 and 4 × 2 (gloo, ZeRO-1): 1e-4 relative L2 over all parameters, 1e-2 for every one.

    test_sharding.py has two workers. One update, because Adam makes the rounding of tiny gradients into steps of full size.
    """
    short = _one_update(base_config)
    states = []
    for workers in (1, 4):
        config = dataclasses.replace(
            short,
            output_dir=str(tmp_path / str(workers)),
            micro_batch_size_per_worker=8 // workers,
            scaling=dataclasses.replace(short.scaling, num_workers=workers),
        )
        states.append(_latest_state(ctrl_ray.fit(config).folder))
    # after one update the first moment is (1 - beta1) times the gradient
    names = [name for name in states[0] if name.startswith("exp_avg/")]
    one, several = (torch.cat([state[name].flatten() for name in names]) for state in states)
    assert float((one - several).norm() / one.norm()) < 1e-4
    for name in names:
        difference = float((states[0][name] - states[1][name]).norm())
        assert difference < 1e-2 * float(states[0][name].norm()) + 1e-6 * float(one.norm()), name


def test_evaluations_beside_training_are_those_between_updates(base_config: TrainConfig, tmp_path: Path) -> None:
    """Ray Train's asynchronous validation: the same figures at the same updates, their samples in Aim."""
    evaluations = []
    for asynchronous in (False, True):
        evaluation = dataclasses.replace(base_config.evaluation, asynchronous=asynchronous)
        config = dataclasses.replace(
            base_config, evaluation=evaluation, aim=asynchronous, output_dir=str(tmp_path / str(asynchronous))
        )
        run = ctrl_ray.fit(config)
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

    repo = aim.Repo.from_path(str(tmp_path / "True" / "aim"))
    logged = repo.get_run(repo.list_all_runs()[0])
    names = {images["name"] for images in logged.collect_sequence_info("images")["images"]}
    assert names >= {"before", "after", "during", "curves", "samples_jpeg_size"}  # samples, and the report's pictures
    images = logged.get_image_sequence("during", Context({}))
    updates, samples = images.values.sparse_list()
    assert list(updates) == [0, 3, 6]
    assert [len(at) for at in samples] == [8, 8, 8]  # two of each class, all eight samples


@pytest.mark.parametrize(
    "name",
    [
        "adjoint_matching",
        "reinforce",
        pytest.param("last_k", marks=pytest.mark.slow),  # the sweep of `full` with another plan
        pytest.param("random_suffix", marks=pytest.mark.slow),
    ],
)
def test_an_image_pipeline_trains_with_every_estimator(name: str, base_config: TrainConfig, tmp_path: Path) -> None:
    """Chosen by configuration alone: the control table has a gradient, its null row has none."""
    config = dataclasses.replace(
        _one_update(base_config),
        group_size=4 if name == "reinforce" else 1,
        estimator=EstimatorConfig(name=name, steps=2 if name != "random_suffix" else 0),  # type: ignore[arg-type]
        output_dir=str(tmp_path / "run"),
    )
    moments = _latest_state(ctrl_ray.fit(config).folder)
    gradient = moments["exp_avg/controls.tables.jpeg_size.weight"]
    assert bool(torch.isfinite(gradient).all()) and float(gradient[:-1].norm()) > 0
    assert float(gradient[-1].norm()) == 0


def test_init_adapter_adds_a_second_control(base_config: TrainConfig, tmp_path: Path) -> None:
    """The first control's table is where the adapter left it; the new control's rows have moved."""
    from ctrl_ray.driver.classifier import fit_classifier

    short = _one_update(base_config)
    first = ctrl_ray.fit(dataclasses.replace(short, output_dir=str(tmp_path / "first")))
    second_control = ControlConfig(oracle="colourfulness", thresholds=(30.0,), guidance_strength=1.0)
    config = dataclasses.replace(
        short,
        output_dir=str(tmp_path / "second"),
        init_adapter=str(first.adapter),
        controls={"colourfulness": second_control},
    )
    fit_classifier(config, "colourfulness", output_dir=tmp_path / "colour", quiet=True)
    config = dataclasses.replace(
        config, controls={"colourfulness": dataclasses.replace(second_control, classifier=str(tmp_path / "colour"))}
    )
    second = ctrl_ray.fit(config)
    before, after = _adapter(first), _adapter(second)
    assert torch.equal(before["jpeg_size"], after["jpeg_size"])
    assert after["colourfulness"][:-1].abs().max() > 0
    assert json.loads((tmp_path / "second" / "adapter" / "adapter.json").read_text())["controls"].keys() == {
        "jpeg_size",
        "colourfulness",
    }


def test_full_finetuning_exports_a_denoiser_that_loads(base_config: TrainConfig, tmp_path: Path) -> None:
    """Every weight trained; the adapter holds a whole UNet in the diffusers format."""
    config = dataclasses.replace(_one_update(base_config), output_dir=str(tmp_path / "full"), full_finetune=True)
    run = ctrl_ray.fit(config)
    pipe = ctrl_ray.ControlledPipeline.from_pretrained(str(run.adapter))
    images = pipe(
        "a red circle", controls={"jpeg_size": 1}, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (1, 32, 32, 3)
