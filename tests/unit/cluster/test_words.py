"""Addresses, growth, waiting, cost: decisions and sentences that need no cluster."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
from pathlib import Path

import pytest

from ctrl_ray.cluster.autoscaler import Activity, growth_of
from ctrl_ray.cluster.connection import check_address, ray_job
from ctrl_ray.cluster.resources import check_resources
from ctrl_ray.cluster.waiting import waiting_line
from ctrl_ray.config import RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.errors import ConfigError, ResourceError
from ctrl_ray.planning.cost import AWS_MACHINES, HEAD_DOLLARS_PER_HOUR, Work, estimate
from ctrl_ray.runs.copies import FolderCopy, folder_here
from ctrl_ray.runs.folder import RunFolder, below

_AWS = {
    "provider": {"type": "aws"},
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 8}, "max_workers": 0},
        "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 8},
        "never": {"resources": {"CPU": 96, "GPU": 8}, "max_workers": 0},
    },
}


def test_growth_is_what_the_cluster_file_allows() -> None:
    may_grow = growth_of(_AWS)
    assert (may_grow.most("GPU"), may_grow.most("CPU")) == (3, 24), "max_workers of the whole cluster bounds a type"
    assert may_grow.holds({"CPU": 8, "GPU": 1}) and not may_grow.holds({"GPU": 2})
    assert growth_of({}).most("CPU") == 0
    local = growth_of({**_AWS, "provider": {"type": "local"}})
    assert local.most("GPU") == math.inf, "machines of one's own tell what they have once they are up"


def test_room_that_may_come_counts() -> None:
    config = TrainConfig(
        global_batch_size=64,
        scaling=ScalingConfig(num_workers=2, use_gpu=True),
        rewards=RewardPoolConfig(num_actors=1, gpus_per_actor=1.0),
    )
    check_resources(config, {"CPU": 8.0}, "the Ray cluster", growth_of(_AWS))
    larger = dataclasses.replace(config, rewards=RewardPoolConfig(num_actors=2, gpus_per_actor=1.0))
    with pytest.raises(ResourceError, match=r"needs 4 GPUs .* has 0, and its autoscaler may add 3"):
        check_resources(larger, {"CPU": 8.0}, "the Ray cluster", growth_of(_AWS))


def test_waiting_says_what_is_asked_there_missing_and_coming() -> None:
    line = waiting_line(
        "1 m 10 s",
        {"CPU": 5.0, "GPU": 2.0},
        1,
        {"CPU": 8.0},
        {"CPU": 7.0},
        Activity({"spot": 2}, ("never (InsufficientInstanceCapacity)",)),
    )
    assert line == (
        "waiting for machines (1 m 10 s): the run asks for 5 CPUs, 2 GPUs; there: 1 node with 8 CPUs (7 free), 0 GPUs (0 "
        "free); missing: 2 GPUs; starting: 2 × spot; could not be started: never (InsufficientInstanceCapacity)"
    )
    enough = waiting_line("9 s", {"CPU": 5.0, "GPU": 0.0}, 2, {"CPU": 8.0}, {"CPU": 1.0}, Activity())
    assert "GPU" not in enough and "nothing in sum" in enough


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_addresses_of_other_services_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="ray job submit"):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["nonsense", "localhost", ":6379", "head:", "head:x", "head:0", "head:70000", "a/b:6379"]
)
def test_what_is_no_address_is_refused_with_the_forms_there_are(address: str) -> None:
    with pytest.raises(ConfigError, match=f"^RAY_ADDRESS is '{address}'; expected HOST:PORT .*'auto' .*unset"):
        check_address(address)


def test_a_token_file_that_is_missing_or_empty_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would end the process with a C++ stack."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="cannot be read"):
        check_address("127.0.0.1:1")
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        check_address("127.0.0.1:1")


def test_the_job_is_known_from_what_ray_gives_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert ray_job() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "sweet"}}))
    job = ray_job()
    assert job is not None and "ray job stop sweet" in job.hint and "leaves 3 s" in job.hint
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    longer = ray_job()
    assert longer is not None and "cluster/job.yaml" not in longer.hint


def test_a_relative_output_folder_of_a_job_is_kept_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's working directory is a copy that Ray removes."""
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunFolder("runs/a").local == copy / "runs" / "a"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    folder = RunFolder("runs/a")
    assert folder.local == tmp_path / "home" / "runs" / "a" and folder.name == "a" and folder.is_local
    assert RunFolder(str(tmp_path / "b")).local == tmp_path / "b"


def test_a_folder_travels_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "adapter" / "deep" / "b.json").write_text("{}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    copy = FolderCopy.read(tmp_path / "adapter")
    here = copy.here()
    assert (here / "a.bin").read_bytes() == b"\0\1" and (here / "deep" / "b.json").read_text() == "{}"
    assert here.is_relative_to(tmp_path / "other") and stat.S_IMODE(here.parent.stat().st_mode) == 0o700
    assert copy.here() == here and len(list(here.parent.iterdir())) == 1
    assert FolderCopy({"a.bin": b"\0\2"}).digest != FolderCopy({"a.bin": b"\0\1"}).digest
    assert folder_here("adapter", {"adapter": copy}) == str(here) and folder_here("else", {"adapter": copy}) == "else"


def test_a_price_is_time_on_whole_machines_and_the_head() -> None:
    """Two workers and a pool that takes a GPU of its own, by hand: 100 updates of 36 s, evaluations of 340 s, 60 s start."""
    config = TrainConfig(
        num_updates=100,
        global_batch_size=64,
        scaling=ScalingConfig(num_workers=2, use_gpu=True),
        rewards=RewardPoolConfig(num_actors=1, gpus_per_actor=1.0),
    )
    work = Work(update_flops=36e12, evaluation_flops=340e12)
    small, eight = (next(m for m in AWS_MACHINES if m.gpu == gpu) for gpu in ("A10G", "A100"))
    three = estimate(config, work, 1e12, small)
    assert (three.update_s, three.run_s, three.num_machines) == (36, 4000, 3)
    assert three.dollars == pytest.approx(4000 / 3600 * (3 * small.dollars_per_hour + HEAD_DOLLARS_PER_HOUR))
    assert estimate(config, work, 1e12, eight).num_machines == 1
    assert estimate(config, work, 1e12).dollars is None
    # on shares of the workers' cards the pool takes no card; what the busiest card scores is added, at its own rate
    scaling = dataclasses.replace(config.scaling, gpus_per_worker=0.8)
    shared = dataclasses.replace(config, scaling=scaling, rewards=RewardPoolConfig(gpus_per_actor=0.2))
    scoring = dataclasses.replace(work, scoring_flops=2e12)
    found = estimate(shared, scoring, 1e12, small, scoring_flops_per_s=0.5e12)
    assert (found.num_machines, found.update_s) == (2, 40)


def test_a_card_has_its_rate_by_precision() -> None:
    """By the data sheet, dense; any other half precision counts as bfloat16 does."""
    card = next(machine for machine in AWS_MACHINES if machine.gpu == "H100")
    rates = {precision: card.flops(precision) / 1e12 for precision in ("fp32", "tf32", "bf16", "fp16")}
    assert rates == pytest.approx({"fp32": 66.9, "tf32": 495, "bf16": 989, "fp16": 989})
    assert [machine.gpu for machine in AWS_MACHINES] == ["A10G", "L40S", "A100", "H100", "H200"]


def test_the_options_of_a_uri_stay_at_its_end() -> None:
    uri = "s3://some-bucket/runs/mine/?region=us-west-2&endpoint_override=http://127.0.0.1:1"
    assert RunFolder(uri).name == "mine"
    options = uri.partition("?")[2]
    assert below(uri, "checkpoints") == f"s3://some-bucket/runs/mine/checkpoints?{options}"
    assert below("/runs/what?", "checkpoints") == "/runs/what?/checkpoints"
