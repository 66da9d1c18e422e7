"""The cluster files pass Ray's own validation, and keep to what the comments in them promise. Nothing is contacted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture
def aws() -> dict[str, Any]:
    return _read(ROOT / "cluster" / "aws.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_accepts_the_file_as_it_is(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(_read(file))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_workers_are_spot_gpu_instances_that_start_on_demand_only(aws: dict[str, Any]) -> None:
    assert aws["available_node_types"].keys() == {"head", "gpu_worker"}
    worker = aws["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] <= aws["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert re.match(r"[gp]\d", worker["node_config"]["InstanceType"])
    head = aws["available_node_types"]["head"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"]["GPU"] == 0


def test_nothing_that_ray_would_choose_too_openly_is_left_to_it(aws: dict[str, Any]) -> None:
    for name, node in aws["available_node_types"].items():
        settings = node["node_config"]
        assert settings["ImageId"].startswith("ami-"), name
        assert settings["SecurityGroupIds"], name
        assert settings["IamInstanceProfile"]["Name"], name
    profiles = {node["node_config"]["IamInstanceProfile"]["Name"] for node in aws["available_node_types"].values()}
    assert len(profiles) == 2  # a worker must not be able to start instances
    assert not any("0.0.0.0" in line for line in aws["head_start_ray_commands"])


def test_the_token_is_mounted_and_switched_on_everywhere(aws: dict[str, Any]) -> None:
    assert aws["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in line and ".bashrc" in line for line in aws["setup_commands"])


def test_every_node_installs_this_project_from_the_synced_tree(aws: dict[str, Any]) -> None:
    (remote,) = [there for there, here in aws["file_mounts"].items() if here == "."]
    installs = [shlex.split(line) for line in aws["setup_commands"] if "pip install" in line]
    assert [words[-1] for words in installs] == [remote]
    assert (ROOT / "pyproject.toml").is_file()
