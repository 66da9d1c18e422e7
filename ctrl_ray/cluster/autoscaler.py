"""What Ray's autoscaler may add to the connected cluster, and what it is doing about it now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.ray_internals import autoscaler_file, autoscaler_launches, head_nodes

_ANSWER_TIMEOUT_S = 20.0
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
    try:
        return Activity(*autoscaler_launches(_RECENT_FAILURE_S))
    except Exception:  # a status line is no reason to end a run
        return Activity()


def _on_head(function: Any, *arguments: Any) -> Any:
    """`function`'s answer on the head's machine; None where it does not come in time."""
    heads = head_nodes()
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
    """On the head: what its autoscaler was started with; None without one, or where the file cannot be read."""
    file = autoscaler_file(gcs_address)
    if file is None:
        return None
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None
