"""What Ray's autoscaler may add to the connected cluster, and what it is doing about it now."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_ANSWER_TIMEOUT_S = 20.0
_HEAD = "node:__internal_head__"
_RECENT_FAILURE_S = 600.0


@dataclass(frozen=True)
class NodeType:
    """One entry of `available_node_types` that workers are made of."""

    name: str
    resources: Mapping[str, float] | None
    """What one node has; None: the cluster file does not say (it is known once a node is up)."""
    max_workers: int


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may add to a cluster."""

    node_types: tuple[NodeType, ...] = ()

    def most(self, kind: str) -> float:
        """Most of a resource that all its nodes together may have; infinite where a node type does not tell."""
        return sum(
            node.max_workers * (float("inf") if node.resources is None else float(node.resources.get(kind, 0.0)))
            for node in self.node_types
            if node.max_workers > 0
        )

    def holds(self, resources: Mapping[str, float]) -> bool:
        """Whether one node of some type has all of `resources`."""
        return any(
            node.resources is None
            or all(node.resources.get(kind, 0.0) + 1e-9 >= amount for kind, amount in resources.items())
            for node in self.node_types
            if node.max_workers > 0
        )


@dataclass(frozen=True)
class Activity:
    """What the autoscaler is doing."""

    starting: Mapping[str, int] = field(default_factory=dict)
    """Nodes that were asked for and are not yet part of the cluster, by node type."""
    failed: tuple[str, ...] = ()
    """Lately failed launches: node type and reason."""


def growth() -> Growth:
    """Of the connected cluster, read from the file that its autoscaler was started with; empty without an autoscaler."""
    config = _on_head(_read_autoscaler_config, ray.get_runtime_context().gcs_address)
    return growth_of(config or {})


def growth_of(config: Mapping[str, Any]) -> Growth:
    """What a cluster file (as Ray keeps it on the head, filled in) allows."""
    head, total = config.get("head_node_type"), config.get("max_workers")
    types = []
    for name, node_type in (config.get("available_node_types") or {}).items():
        if name == head:
            continue
        most = int(node_type.get("max_workers", total if total is not None else 0))
        resources = node_type.get("resources") or None
        if config.get("provider", {}).get("type") == "local":
            resources = None  # the local provider's nodes find out themselves what they have
        types.append(NodeType(str(name), resources, most if total is None else min(most, int(total))))
    return Growth(tuple(types))


def activity() -> Activity:
    """Of the connected cluster's autoscaler, whichever version it is; empty where nothing is known."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    try:
        return _activity_v2() if is_autoscaler_v2() else _activity_v1()
    except Exception:  # a status line is no reason to end a run
        return Activity()


def _activity_v2() -> Activity:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    starting: Counter[str] = Counter()
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    for node in status.pending_nodes:
        starting[node.ray_node_type_name] += 1
    recent = [
        launch
        for launch in status.failed_launches
        if time.time() - (launch.failed_ts_s or launch.request_ts_s) < _RECENT_FAILURE_S
    ]
    return Activity(starting, tuple(f"{f.ray_node_type_name} ({f.details or 'no reason given'})" for f in recent))


def _activity_v1() -> Activity:
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    text = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(text).get("autoscaler_report") or {} if text else {}
    starting: Counter[str] = Counter(report.get("pending_launches") or {})
    for _, node_type, _ in report.get("pending_nodes") or []:
        starting[node_type] += 1
    availability = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    failed = []
    for name, record in availability.items():
        reason = record.get("unavailable_node_information")
        if not record.get("is_available", True) and time.time() - record.get("last_checked_timestamp", 0) < 600:
            failed.append(f"{name} ({(reason or {}).get('description', 'no reason given')})")
    return Activity(starting, tuple(failed))


def _on_head(function: Any, *arguments: Any) -> Any:
    """`function`'s answer on the head's machine; None where it does not come in time."""
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    if not heads:
        return None
    strategy = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    remote: Any = ray.remote(function)
    reference = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(*arguments)
    if not ray.wait([reference], timeout=_ANSWER_TIMEOUT_S)[0]:
        ray.cancel(reference, force=True)
        return None
    return ray.get(reference)


def _read_autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """The file named on the command line of the head's autoscaler process (Ray's `monitor.py`)."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        is_monitor = any(word.endswith("monitor.py") for word in words)
        if not is_monitor or flags.get("gcs-address") != gcs_address:
            continue
        try:
            text = Path(flags["autoscaling-config"]).expanduser().read_text(encoding="utf-8")
            config = yaml.safe_load(text)  # JSON is YAML
        except (KeyError, OSError, yaml.YAMLError):
            continue
        return config if isinstance(config, dict) else None
    return None
