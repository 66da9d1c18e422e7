"""Runs of a comparison: their settings, and each made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctrl_ray.comparison.methods import METHODS
from ctrl_ray.comparison.training import TrainedRun, held_out_config, run_config, trained_run
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.offline.prompts import training_prompts


class Train:
    """In place of `ctrl_ray.train.fit`."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, config: TrainConfig, resume: bool) -> Path:
        self.asked.append((config.seed, resume))
        return Path(config.output_dir) / "adapter"


def run(folder: Path, seed: int = 0) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    training = METHODS["ctrl"].training
    assert training is not None
    return run_config(preset("shapes"), training, folder, seed)


def test_a_run_chooses_its_checkpoint_as_the_preset_does_and_leaves_the_rest_to_the_comparison(tmp_path: Path) -> None:
    own = preset("shapes").evaluation
    for config in (run(tmp_path), held_out_config(preset("shapes"), tmp_path / "held", ["a red circle"])):
        judged = config.evaluation
        assert (judged.every_updates, judged.num_samples) == (own.every_updates, own.num_samples)
        assert (judged.final_num_samples, judged.max_log_z_samples, judged.num_pairs) == (
            own.num_samples,
            own.num_samples,
            0,
        )


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    train = Train()
    first = trained_run(run(tmp_path, 3), train)
    assert trained_run(run(tmp_path, 3), train) == first
    assert train.asked == [(3, False)]
    assert first.adapter == str(tmp_path / "adapter") and first.whole


def test_a_run_that_was_stopped_goes_on_and_its_cost_is_a_part(tmp_path: Path) -> None:
    train = Train()
    (tmp_path / "config.json").write_text("{}")
    assert not trained_run(run(tmp_path), train).whole
    assert train.asked == [(0, True)]


def test_a_run_that_fails_is_not_finished(tmp_path: Path) -> None:
    def fails(config: TrainConfig, resume: bool) -> Path:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_run(run(tmp_path), fails)
    assert not list(tmp_path.iterdir())


def test_what_a_run_cost_is_read_back(tmp_path: Path) -> None:
    known = {"adapter": "/a", "seconds": 4.0, "whole": True}
    (tmp_path / "training.json").write_text(json.dumps({**known, "another": 1}))
    assert trained_run(run(tmp_path), Train()) == TrainedRun(**known)  # type: ignore[arg-type]


def test_the_held_out_run_is_the_presets_on_the_other_prompts(tmp_path: Path) -> None:
    config = held_out_config(preset("shapes"), tmp_path / "runs" / "held", ["a red circle", "a blue square"])
    assert training_prompts(config) == ("a red circle", "a blue square")
    assert config.output_dir == str(tmp_path / "runs" / "held")
