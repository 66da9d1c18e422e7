"""Machines that are stated, and the plans that Stable Diffusion's preset makes for them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError, ResourceError
from ctrl_ray.planning.choose import decide
from ctrl_ray.planning.counts import PolicyCounter, StepBytes
from ctrl_ray.planning.fits import memory_fit
from ctrl_ray.planning.machines import CARDS, describe, stated_machines
from ctrl_ray.planning.planner import Planner
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.train import fit, parse

GB = 10**9
CARDS_OF = {"1x1x24GB": 1, "1x1x80GB": 1, "1x8x80GB": 8, "4x8x80GB": 32, "3x8x80GB,1x4x80GB": 28}


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("1x1x24GB", [(1, 24 * GB)]),
        ("4x8x80GB", [(8, 80 * GB)] * 4),
        ("2 × 4 × 40GiB", [(4, 40 * 2**30)] * 2),
        ("1x1xL40S", [(1, CARDS["L40S"])]),
        ("3x8xh100, 1x4xA100-80GB", [(8, CARDS["H100"])] * 3 + [(4, CARDS["A100-80GB"])]),
    ],
)
def test_machines_are_read(text: str, nodes: list[tuple[int, int]]) -> None:
    stated = stated_machines(text)
    assert [(node.gpus, node.gpu_memory_bytes) for node in stated.nodes] == nodes
    assert [node.cpus for node in stated.nodes] == [8 * gpus for gpus, _ in nodes]


def test_what_was_stated_is_said() -> None:
    assert describe(stated_machines("3x8x80GB,1x4x24GB")) == (
        "4 nodes, 224 CPUs, 28 GPUs of 22.4 GiB and 74.5 GiB, stated and not looked for; 8 CPUs for each GPU are taken for "
        "granted"
    )


@pytest.mark.parametrize(
    "text", ["", "8", "4x8", "4x8x80", "0x8x80GB", "4x0x80GB", "4x8xB9000", "4x8x80GB,", "x8x80GB"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not MACHINESxGPUSxMEMORY; expected such as 4x8x80GB, 1x1xL40S"):
        stated_machines(text)


def test_machines_are_for_a_dry_run_alone(tmp_path: Path) -> None:
    assert parse(["--machines", "4x8x80GB", "--dry-run"]).machines == "4x8x80GB"
    config = dataclasses.replace(preset("shapes"), output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"--machines 1x1x24GB states machines .*with --dry-run only"):
        fit(config, machines="1x1x24GB")
    assert not (tmp_path / "run").exists()


def _config(base_model: Path, **changes: object) -> TrainConfig:
    """The preset, on a pipeline that needs no download, with a control whose classifier would be fitted."""
    config = dataclasses.replace(
        preset("stable-diffusion"),
        base_model=str(base_model),
        data="shapes",
        controls={"jpeg_size": ControlConfig(oracle="jpeg_size", thresholds=(900.0, 1000.0))},
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.full
def test_a_stated_machine_needs_neither_ray_nor_a_card(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few cards for the workers asked for, by the stated machines' number."""
    step = StepBytes(policy_kept=1, reference_kept=1, backward_peak=1, rollout_peak=1)
    monkeypatch.setattr(PolicyCounter, "step", lambda counter, batch: step)  # what memory decides is not tested here
    monkeypatch.setattr(PolicyCounter, "evaluation", lambda counter, batch: 1)
    checked = preflight(_config(tiny_pipeline), stated=stated_machines("1x4x24GB"))
    assert checked.config.scaling.num_workers == 4 and checked.asked.scaling.num_workers == "auto"
    assert checked.config.evaluation.batch_size == 16, "128 with guidance would take 25 GiB"
    assert "machines   1 node, 32 CPUs, 4 GPUs of 22.4 GiB" in checked.summary
    assert "flags      to start it" in checked.summary and "--scaling.num-workers 4" in checked.summary
    fixed = dataclasses.replace(checked.config.scaling, num_workers=8)
    with pytest.raises(ResourceError, match=r"needs 8 GPUs \(8 workers.*but the stated machines has 4"):
        preflight(dataclasses.replace(checked.config, scaling=fixed), stated=stated_machines("1x4x24GB"))


@pytest.mark.full
def test_stable_diffusion_has_a_plan_for_every_machine(stable_diffusion: Path) -> None:
    """One card of 24 GB to four machines of eight of 80 GB, with local rewards and with a pool on the workers' cards: it
    fits, every card has a worker, sizes are chosen, and what is chosen is what was counted."""
    config = _config(stable_diffusion)
    planner = Planner(config.controls, load_backbone(str(stable_diffusion)).make_kernel(config.sampler))
    sizes: dict[tuple[str, int], int] = {}
    with_a_pool = ("1x1x24GB", "4x8x80GB")
    for num_actors, asked in ((0, tuple(CARDS_OF)), (1, with_a_pool)):
        rewards = dataclasses.replace(config.rewards, num_actors=num_actors)
        for machines in asked:
            cards = CARDS_OF[machines]
            facts = stated_machines(machines)
            decided = decide(dataclasses.replace(config, rewards=rewards), facts, planner.plan, planner.estimate).config
            assert decided.scaling.num_workers == cards
            assert memory_fit(planner.plan(decided), decided, facts).answer == "yes"
            sizes[machines, num_actors] = decided.fixed_micro_batch_size
    assert sizes["1x1x24GB", 0] < sizes["1x1x80GB", 0] and sizes["1x1x24GB", 1] <= sizes["1x1x24GB", 0]
    assert (sizes["1x8x80GB", 0], sizes["4x8x80GB", 0], sizes["3x8x80GB,1x4x80GB", 0]) == (32, 8, 10)
    assert sizes["4x8x80GB", 1] == 4, "two rounds, of which one is scored"


@pytest.mark.full
def test_the_plan_of_stated_machines_is_told(stable_diffusion: Path) -> None:
    checked = preflight(_config(stable_diffusion), stated=stated_machines("3x8x80GB,1x4x80GB"), with_estimate=True)
    assert (
        "256 trajectories per update = 28 workers × 9 or 10, in 1 micro-batch of at most 10 (9% of" in checked.summary
    )
    assert re.search(r"^fits       yes: a worker: ", checked.summary, re.MULTILINE)
    assert "each worker scores its own samples" in checked.summary
    for card in ("A10G", "L40S", "A100", "H100", "H200"):
        assert f" × {card}, " in checked.summary
