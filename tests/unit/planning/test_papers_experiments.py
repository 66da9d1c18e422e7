"""The paper's presets on a tiny pipeline of the same shape: everything that is checked and counted before a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ctrl_ray.comparison.estimate import STABLE_DIFFUSION, row_flops
from ctrl_ray.config.presets import CLIP_MODEL, preset
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.planning.machines import stated_machines
from ctrl_ray.planning.preflight import preflight
from tests.configs import on_a_cpu, tiny_experiment
from tests.tiny import make_tiny_clip, make_tiny_head


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_compressibility_passes_all_checks(tiny_pipeline: Path, clip: Path) -> None:
    checked = preflight(on_a_cpu(tiny_experiment("paper-compressibility", tiny_pipeline, clip, Path())))
    assert len(checked.prompts) == 45 and len(checked.evaluation_prompts) == 15
    assert checked.controls["jpeg_size"].num_classes == 4
    # 50 steps with guidance: the rollout's forward, and policy and reference in the adjoint pass; the last step is the
    # reference's alone
    assert "denoiser   per sample and update 298 forwards and 198 backwards" in checked.summary
    assert "guidance_strength 0.1 / kl_coef 0.01" in checked.summary


def test_multi_task_passes_all_checks_with_a_head_in_the_working_directory(
    tiny_pipeline: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the preset names it: aesthetic.safetensors."""
    monkeypatch.chdir(tmp_path)
    make_tiny_head(tmp_path / "aesthetic.safetensors")
    config = on_a_cpu(tiny_experiment("paper-multi-task", tiny_pipeline, clip, Path("aesthetic.safetensors")))
    checked = preflight(config)
    control = checked.config.controls["aesthetic"]
    assert control.oracle == f"clip_head:{tmp_path / 'aesthetic.safetensors'}@{clip}"
    assert [c.num_classes for c in checked.controls.values()] == [2, 2]


def test_without_its_head_multi_task_says_what_is_missing(tiny_pipeline: Path, clip: Path) -> None:
    oracle = preset("paper-multi-task").controls["aesthetic"].oracle
    assert oracle == f"clip_head:aesthetic.safetensors@{CLIP_MODEL}"
    with pytest.raises(
        ConfigError, match=r"the head .*nothing\.safetensors does not exist; expected a safetensors file"
    ):
        preflight(on_a_cpu(tiny_experiment("paper-multi-task", tiny_pipeline, clip, Path("nothing.safetensors"))))


def test_what_judges_is_looked_for_before_anything_starts(tiny_pipeline: Path, clip: Path, tmp_path: Path) -> None:
    config = on_a_cpu(tiny_experiment("paper-compressibility", tiny_pipeline, clip, Path()))
    for changes, message in (
        ({"clip_model": str(tmp_path)}, "CLIP model .* cannot be loaded"),
        ({"brisque_model": str(tmp_path)}, "BRISQUE's allmodel cannot be read"),
    ):
        with pytest.raises(ModelError, match=message):
            preflight(dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **changes)))


@pytest.mark.parametrize("name", ["paper-compressibility", "paper-multi-task"])
def test_a_machine_that_is_stated_is_planned_for(name: str, tiny_pipeline: Path, clip: Path, tmp_path: Path) -> None:
    """Four cards: a worker on each, every 'auto' decided, a price."""
    config = tiny_experiment(name, tiny_pipeline, clip, make_tiny_head(tmp_path / "head.safetensors"))
    checked = preflight(config, stated=stated_machines("1x4xA100"), with_estimate=True)
    assert checked.config.scaling.num_workers == 4 and checked.work is not None
    assert f"batch      {config.global_batch_size} trajectories per update = 4 workers ×" in checked.summary
    assert "$" in checked.summary


@pytest.mark.full
def test_what_is_kept_of_stable_diffusion_is_what_is_counted(stable_diffusion: Path) -> None:
    """The operations by which `compare --dry-run` tells hours without the model."""
    config = dataclasses.replace(preset("paper-compressibility"), base_model=str(stable_diffusion))
    counted = row_flops(config)
    assert dataclasses.astuple(counted) == pytest.approx(dataclasses.astuple(STABLE_DIFFUSION), rel=1e-3)
