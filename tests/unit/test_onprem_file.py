"""`cluster/onprem.yaml` passes Ray's own validation and keeps to what the comments in it promise. Nothing is contacted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "onprem.yaml"


@pytest.fixture
def onprem() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def test_ray_accepts_it_as_a_cluster_of_all_named_machines(onprem: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(onprem)
    validate_config(prepared)
    (node_type,) = prepared["available_node_types"].values()
    assert prepared["provider"]["type"] == "local"
    assert node_type["min_workers"] == node_type["max_workers"] == len(onprem["provider"]["worker_ips"]) == 3


def test_the_token_is_mounted_and_switched_on_on_every_machine(onprem: dict[str, Any]) -> None:
    assert onprem["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (line,) = [line for line in onprem["setup_commands"] if ".bashrc" in line]
    assert re.search(r"\|\| echo '.*\bRAY_AUTH_MODE=token\b.*' >> ~/\.bashrc$", line)


def test_every_machine_installs_this_project_from_the_synced_tree(onprem: dict[str, Any]) -> None:
    (remote,) = [there for there, here in onprem["file_mounts"].items() if here == "."]
    installs = [shlex.split(line) for line in onprem["setup_commands"] if "pip install" in line]
    assert [words[-1] for words in installs] == [remote]


def test_the_dashboard_stays_on_the_head_and_a_lost_machine_is_noticed_soon(onprem: dict[str, Any]) -> None:
    start = onprem["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    health = {name: int(value) for name, value in re.findall(r"RAY_health_check_(\w+)=(\d+)", start)}
    seconds = health["failure_threshold"] * (health["period_ms"] + health["timeout_ms"]) / 1000
    assert health["initial_delay_ms"] / 1000 + seconds <= 12


def test_what_must_be_filled_in_says_so(onprem: dict[str, Any]) -> None:
    provider = onprem["provider"]
    places = [provider["head_ip"], *provider["worker_ips"], onprem["auth"]["ssh_user"]]
    assert all(place.startswith("REPLACE-ME") for place in places) and len(set(places)) == len(places)
