"""Everything that `ctrl_ray.ray_internals` takes from Ray, against the Ray that is installed."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.util import placement_group
from ray.util.placement_group import PlacementGroup

from ctrl_ray import ray_internals

_PATIENCE_S = 30.0


def _soon(condition: Callable[[], Any]) -> Any:
    """What Ray shows a moment late."""
    limit = time.monotonic() + _PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < limit, "it did not come true in time"
        time.sleep(0.05)
    return found


@pytest.mark.usefixtures("ray_session")
def test_a_head_is_found_and_answers() -> None:
    address = ray.get_runtime_context().gcs_address
    assert ray_internals.head_address(address) == address
    assert ray_internals.head_address("auto"), "a Ray runs on this machine"
    assert ray_internals.ask_head(address, 10.0) == ray_internals.HeadAnswer(alive=True)
    nobody = ray_internals.ask_head("127.0.0.1:1", 10.0)
    assert (nobody.alive, nobody.token_refused) == (False, False) and nobody.reason.startswith("UNAVAILABLE: ")


@pytest.mark.usefixtures("ray_session")
def test_a_process_that_ray_starts_collects_seldom_once_it_has_something_of_ours_to_load() -> None:
    """Whoever imports the same elsewhere keeps the thresholds that they have."""

    def after_import() -> int:
        package = importlib.import_module("ctrl_ray.distributed")
        before = gc.get_threshold()
        try:
            gc.set_threshold(600)
            importlib.reload(package)
            return gc.get_threshold()[0]
        finally:
            gc.set_threshold(*before)

    task: Any = ray.remote(after_import).options(num_cpus=0)
    assert ray.get(task.remote()) == 50_000
    assert after_import() == 600


@pytest.mark.usefixtures("ray_session")
def test_a_job_knows_its_name_and_the_copies_that_ray_made_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    (tmp_path / "file.txt").write_text("x")
    archive = shutil.make_archive(str(tmp_path.parent / f"{tmp_path.name}-files"), "zip", tmp_path)
    task: Any = ray.remote(lambda: os.getcwd()).options(num_cpus=0, runtime_env={"working_dir": f"file://{archive}"})
    copy = Path(ray.get(task.remote()))
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    assert ray_internals.submitted_job() is None and not ray_internals.is_copy_of_job(copy)
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"metadata": {"job_submission_id": "sweet"}}))
    assert ray_internals.submitted_job() == "sweet"
    assert ray_internals.is_copy_of_job(copy) and not ray_internals.is_copy_of_job(tmp_path)


@pytest.mark.usefixtures("ray_session")
def test_what_is_free_on_the_only_node() -> None:
    assert ray_internals.head_nodes() == [ray.get_runtime_context().get_node_id()]
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    free = _soon(lambda: [node for node in ray_internals.free_resources_by_node() if node.get("CPU", 0.0) <= 3])
    assert len(free) == 1
    ray.util.remove_placement_group(group)
    _soon(lambda: ray_internals.free_resources_by_node()[0].get("CPU", 0.0) == 4)


@ray.remote
class _Owner:
    """Makes a placement group."""

    def make(self) -> None:
        self.group: PlacementGroup = placement_group([{"CPU": 0.01}])
        ray.get(self.group.ready())


@pytest.mark.usefixtures("ray_session")
def test_actors_and_their_groups() -> None:
    waits = _Owner.options(num_cpus=1000).remote()
    _soon(ray_internals.actor_waits_for_process)
    ray.kill(waits)
    _soon(lambda: not ray_internals.actor_waits_for_process())

    others = {group.group.id for group in ray_internals.actor_groups()}
    owner = _Owner.options(num_cpus=0).remote()
    ray.get(owner.make.remote())
    (made,) = (group for group in ray_internals.actor_groups() if group.group.id not in others)
    assert not made.creator_is_dead
    ray.kill(owner)
    _soon(lambda: any(group.creator_is_dead for group in ray_internals.actor_groups() if group.group == made.group))
    ray.util.remove_placement_group(made.group)
    _soon(lambda: all(group.group.id in others for group in ray_internals.actor_groups()))


@pytest.mark.usefixtures("ray_session")
def test_the_coordinator_takes_notes() -> None:
    coordinator = ray_internals.autoscaling_coordinator()

    def noted() -> float:
        return sum(node.get("CPU", 0.0) for node in ray.get(coordinator.get_reserved_resources.remote("pool")).values())

    for spread in (False, True):
        note = {"expire_after_s": 60.0, "spread": spread}
        ray_internals.note_taken(coordinator, "pool", [{"CPU": 0.5}, {"CPU": 0.5}], **note)
        assert noted() == 1.0
        ray_internals.note_taken(coordinator, "pool", [], **note)
        assert noted() == 0.0


@pytest.mark.usefixtures("ray_session")
def test_results_of_tune_show_their_trials(tmp_path: Path) -> None:
    """The failed one too; and which schedulers end a trial by themselves."""

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return {"half": 1 / config["x"]}

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.1}),
        param_space={"x": tune.grid_search([0, 2])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    )
    trials = {found.config["x"]: found for found in ray_internals.trials_of(tuner.fit())}
    assert {x: found.status for x, found in trials.items()} == {0: "ERROR", 2: "TERMINATED"}
    assert trials[2].last_result["half"] == 0.5
    assert ray_internals.longest_time_of(ASHAScheduler(max_t=7)) == 7
    assert ray_internals.longest_time_of(FIFOScheduler()) is None


def test_ray_datas_notes_are_dropped_and_its_warnings_kept() -> None:
    ray_internals.quieten_ray_data()
    for module, level in (("execution.streaming_executor", logging.WARNING), ("progress.tqdm_progress", logging.ERROR)):
        logger: logging.Logger = importlib.import_module(f"ray.data._internal.{module}").logger
        assert logger.isEnabledFor(level) and not logger.isEnabledFor(level - 1), module


@pytest.mark.usefixtures("ray_session")
def test_an_autoscaler_of_version_2_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's own classes; a real one is asked by `test_autoscaling.py`, of the version that `ray start` begins by itself."""
    from ray.autoscaler.v2 import sdk
    from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo

    def launch(state: LaunchRequest.Status, failed_s: float | None = None, details: str | None = None) -> LaunchRequest:
        now = time.time()
        failed = None if failed_s is None else int(now - failed_s)
        return LaunchRequest("m5", "workers", 2, state, int(now), failed_ts_s=failed, details=details)

    pending, failed = LaunchRequest.Status.PENDING, LaunchRequest.Status.FAILED
    status = ClusterStatus(
        pending_launches=[launch(pending)],
        pending_nodes=[NodeInfo("m5", "workers", "i-1", "")],
        failed_launches=[launch(failed, 10, "no quota"), launch(failed, 10), launch(failed, 5000, "long ago")],
    )
    monkeypatch.setattr(sdk, "get_cluster_status", lambda gcs_address: status)
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: True)
    starting, reasons = ray_internals.autoscaler_launches(600.0)
    assert dict(starting) == {"workers": 3}
    assert reasons == ("workers (no quota)", "workers (no reason given)")
