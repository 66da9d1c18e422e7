"""Several hosts, one run: what each of them must see is checked before anything starts."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.cluster.autoscaler import growth
from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.runs.copies import FolderCopy
from ctrl_ray.runs.folder import RunFolder

_ANSWER_TIMEOUT_S = 60.0
_NETWORK_DELAY_S = 3.0


def check_shared(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse what cannot work on the connected cluster's hosts, before anything is written or paid for.

    Raises RunFolderError for a local output folder that some host of the training workers does not share, ConfigError for
    a local input that some host does not have.
    """
    here = ray.get_runtime_context().get_node_id()
    hosts = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    elsewhere = [number for number, node in hosts.items() if number != here and _may_train(config, node["Resources"])]
    if elsewhere:
        _check_inputs(config, elsewhere, hosts)
    if not folder.is_local:
        return
    strangers = _not_sharing(folder, elsewhere)
    if strangers:
        names = ", ".join(sorted({hosts[number]["NodeManagerAddress"] for number in strangers}))
        raise _refusal(folder, f"its workers may be placed on {names}, where this folder is another one or is missing")
    if (
        not elsewhere
        and not _fits(config, hosts[here]["Resources"])
        and growth().holds(config.scaling.worker_resources)
    ):
        raise _refusal(folder, "its workers will be placed on machines that the autoscaler has yet to start")


def several_hosts() -> bool:
    """Whether processes of this run may be placed on another host than the driver's."""
    return sum(bool(node["Alive"]) for node in ray.nodes()) > 1 or bool(growth().node_types)


def copies_of(paths: Sequence[str]) -> dict[str, FolderCopy]:
    """The folders among `paths`, by value, for hosts that do not have them; none where there is one host only."""
    if not several_hosts():
        return {}
    return {path: FolderCopy.read(path) for path in paths if Path(path).is_dir()}


def _refusal(folder: RunFolder, why: str) -> RunFolderError:
    return RunFolderError(
        f"the output folder {folder.output_dir} is on this machine alone, but the run uses several: {why}, and checkpoints "
        "written there would be lost to the others. Give an --output-dir that all of them reach: s3://BUCKET/runs/NAME (or "
        "gs://, hdfs://), or a folder that is mounted on every machine at the same path"
    )


def _may_train(config: TrainConfig, resources: Mapping[str, float]) -> bool:
    return all(resources.get(kind, 0.0) + 1e-9 >= amount for kind, amount in config.scaling.worker_resources.items())


def _fits(config: TrainConfig, resources: Mapping[str, float]) -> bool:
    """Whether the whole (smallest) worker group has room on one host."""
    workers, worker = config.scaling.min_workers or config.scaling.fixed_num_workers, config.scaling.worker_resources
    return all(resources.get(kind, 0.0) + 1e-9 >= workers * amount for kind, amount in worker.items())


def _not_sharing(folder: RunFolder, hosts: Sequence[str]) -> list[str]:
    """Hosts that do not see a file which this process writes into the output folder."""
    if not hosts:
        return []
    made = not folder.local.exists()
    folder.local.mkdir(parents=True, exist_ok=True)
    marker = folder.local / f".shared-{uuid.uuid4().hex}"
    marker.touch()
    try:
        missing = _missing_on(hosts, [str(marker)], patience_s=_NETWORK_DELAY_S)
    finally:
        marker.unlink(missing_ok=True)
        if made and not any(folder.local.iterdir()):
            folder.local.rmdir()
    return list(missing)


def _check_inputs(config: TrainConfig, elsewhere: Sequence[str], hosts: Mapping[str, Mapping[str, Any]]) -> None:
    """Local files that workers read themselves; classifiers and adapters travel with the run."""
    inputs = {"base_model": config.base_model}
    if any(control.classifier is None for control in config.controls.values()) and config.data:
        inputs["data"] = config.data
    local = {name: path for name, path in inputs.items() if os.path.isabs(path) and Path(path).exists()}
    if not local:
        return
    for number, paths in _missing_on(elsewhere, list(local.values())).items():
        name = next(name for name, path in local.items() if path in paths)
        raise ConfigError(
            f"{name} is {local[name]}, which the machine {hosts[number]['NodeManagerAddress']} does not have; put it there at "
            "the same path, on storage that every machine mounts, or give "
            + ("a hub id" if name == "base_model" else "a path such as s3://BUCKET/data.parquet")
        )


def _missing_on(hosts: Sequence[str], paths: list[str], patience_s: float = 0.0) -> dict[str, list[str]]:
    """Paths that do not exist, by host; hosts that have all of them, or do not answer, are left out."""
    remote: Any = ray.remote(_missing)
    asked = {
        remote.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)
        ).remote(paths, patience_s): host
        for host in hosts
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
    for reference in late:
        ray.cancel(reference, force=True)
    missing = {}
    for reference in done:
        try:
            missing[asked[reference]] = ray.get(reference)
        except RayError:
            continue  # the host was lost meanwhile
    return {host: found for host, found in missing.items() if found}


def _missing(paths: list[str], patience_s: float) -> list[str]:
    """On a host: which paths are not there, also after `patience_s` (network filesystems are late)."""
    deadline = time.monotonic() + patience_s
    while True:
        missing = [path for path in paths if not os.path.exists(path)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)
