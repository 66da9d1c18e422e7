"""What the driver does between the stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ctrl_ray.config import ControlConfig, RewardPoolConfig, TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.driver import stages
from ctrl_ray.driver.classifier import FitResult
from ctrl_ray.driver.pre_trained import reference_job
from ctrl_ray.driver.stages import prepare_classifiers, rewards_of, train_job
from ctrl_ray.planning.counts import PolicyCounter, StepBytes
from ctrl_ray.planning.preflight import CheckedRun, preflight
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.folder import RunFolder


@pytest.fixture(scope="module")
def checked(tiny_pipeline: Path) -> CheckedRun:
    """jpeg_size with the shipped classifier, colourfulness without one, and a control that only the adapter has."""
    config = dataclasses.replace(
        preset("shapes-two-controls"),
        base_model=str(tiny_pipeline),
        global_batch_size=8,
        micro_batch_size_per_worker=4,
    )
    with pytest.MonkeyPatch.context() as patch:  # what memory decides is not tested here
        patch.setattr(
            PolicyCounter,
            "step",
            lambda counter, batch: StepBytes(policy_kept=1, reference_kept=1, backward_peak=1, rollout_peak=1),
        )
        patch.setattr(PolicyCounter, "evaluation", lambda counter, batch: 1)
        checked = preflight(config)
    earlier = ControlConfig(classes=("sharp", "blurred"))
    return dataclasses.replace(checked, controls={**checked.controls, "blur": earlier})


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Controls that were fitted, in order, by a stand-in."""
    names: list[str] = []

    def fit(config: TrainConfig, control: str, *, output_dir: Path, **_: Any) -> FitResult:
        names.append(control)
        output_dir.mkdir(parents=True)
        (output_dir / "classifier.json").touch()
        metrics = {"accuracy": 1.0, "ece": 0.0}
        return FitResult(
            folder=output_dir,
            before=metrics,
            after=metrics,
            temperature=1.0,
            best_epoch=1,
            num_rows={"judged": 1},
            doubts=("one image judged it",),
        )

    monkeypatch.setattr(stages, "fit_classifier", fit)
    return names


def test_config_and_policy_agree_about_the_classifiers(
    checked: CheckedRun, fitted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted or copied, the folder is the run's own; workers and rewards read the same one."""
    folder = RunFolder(str(tmp_path / "run"))
    prepared = prepare_classifiers(checked, folder, None)
    assert fitted == ["colourfulness"]
    assert list(prepared.config.controls) == ["jpeg_size", "colourfulness"]
    assert list(prepared.controls) == ["jpeg_size", "colourfulness", "blur"], "the columns stay in their order"
    for name, control in prepared.config.controls.items():
        own = folder / "classifier" / name
        assert control == dataclasses.replace(checked.config.controls[name], classifier=str(own))
        assert prepared.controls[name] == control and (own / "classifier.json").is_file()
    assert prepared.controls["blur"] == checked.controls["blur"]
    assert (folder / "classifier" / "jpeg_size" / "model.safetensors").is_file()
    assert prepared.asked == checked.asked, "config.json tells what the user gave"

    monkeypatch.setattr(stages, "new_channel", lambda: None)
    monkeypatch.setattr(stages, "copies_of", lambda paths: {})
    job = train_job(prepared, rewards=None, on_bad_row="skip")  # type: ignore[arg-type]
    assert job.make_method.keywords == {"on_bad_row": "skip"}  # type: ignore[attr-defined]
    assert {name: job.controls[name] for name in job.config.controls} == job.config.controls


def test_what_a_fit_gives_to_doubt_is_printed(
    checked: CheckedRun, fitted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_classifiers(checked, RunFolder(str(tmp_path / "run")), None)
    assert capsys.readouterr().out.splitlines()[-1] == "warning: classifier of colourfulness: one image judged it"


def test_a_resumed_run_takes_the_classifiers_that_are_there(
    checked: CheckedRun, fitted: list[str], tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    first = prepare_classifiers(checked, folder, None)
    again = prepare_classifiers(checked, folder, None)
    assert fitted == ["colourfulness"]
    assert again.config == first.config and again.controls == first.controls


def test_samples_and_rewards_are_made_in_the_runs_precision_and_sizes(
    checked: CheckedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fitted the machines while training fits them before and after it too."""
    monkeypatch.setattr(stages, "copies_of", lambda paths: {})
    config = dataclasses.replace(
        checked.config,
        scaling=dataclasses.replace(checked.config.scaling, precision="bf16"),
        evaluation=dataclasses.replace(checked.config.evaluation, batch_size=16),
        rewards=RewardPoolConfig(num_actors=0, decode_chunk_size=2),
    )
    job = reference_job(dataclasses.replace(checked, config=config))
    assert (job.precision, job.batch_size) == ("bf16", 16)
    with rewards_of(config) as spec:
        assert isinstance(spec, RewardModelSpec)
        assert (spec.precision, spec.decode_chunk_size) == ("bf16", 2)
