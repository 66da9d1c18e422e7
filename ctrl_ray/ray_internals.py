"""What we need of Ray that has no public interface, one function each, said in our terms.

Nothing else here imports Ray's private modules (ruff holds that). Every docstring names what of Ray it leans on, and
tests/integration/test_ray_internals.py runs all of it against the installed Ray: the upper bound of `ray` in
pyproject.toml moves when that test passes. Imports stand in the functions, because most callers need one of them.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray import data, tune
    from ray.tune.experiment import Trial
    from ray.util.placement_group import PlacementGroup

# --- reaching a cluster


@dataclass(frozen=True)
class HeadAnswer:
    """What the head of a cluster said to the question whether it is there."""

    alive: bool
    token_refused: bool = False
    reason: str = ""
    """Why there was no answer, as gRPC tells it; '' when it is alive."""


def head_address(address: str) -> str | None:
    """HOST:PORT that an address means; 'auto' is the Ray of this machine, and None when none runs here.

    Leans on `ray._private.services.canonicalize_bootstrap_address`, which `ray.init` calls too.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address(address)


def ask_head(address: str, timeout_s: float) -> HeadAnswer:
    """Ask the head at HOST:PORT whether it is there and takes our token (from RAY_AUTH_MODE and its kin).

    Leans on `ray._private.grpc_utils.init_grpc_channel`, which sends the token, and on the message CheckAlive of
    `ray.core.generated.gcs_service_pb2`.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(address)
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=timeout_s)  # type: ignore[attr-defined]
    except grpc.RpcError as error:
        refused = error.code() == grpc.StatusCode.UNAUTHENTICATED
        return HeadAnswer(False, refused, f"{error.code().name}: {error.details()}")
    finally:
        channel.close()
    return HeadAnswer(True)


# --- starting one here


@contextmanager
def silent_token_notice() -> Iterator[None]:
    """Inside, a Ray that starts does not tell that its token authentication is on, which stays on.

    Leans on the name of the logger of `ray._private.authentication.authentication_token_setup`.
    """
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def socket_path(temporary_folder: str) -> str:
    """Where a Ray that this process starts would keep its longest socket, below the folder that TMPDIR names.

    Leans on the names in `ray._private.node.Node`: TMPDIR/ray/session_TIME_PID/sockets/plasma_store.
    """
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    return os.path.join(temporary_folder, "ray", session, "sockets", "plasma_store")


def start_tells(error: Exception) -> str:
    """Why `ray.init` failed, in one line, with the folder of the logs of the Ray that did not come up, if there is one.

    Leans on `ray._private.worker._global_node` and its `get_logs_dir_path`.
    """
    import ray._private.worker as worker

    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    node = worker._global_node
    return text if node is None else f"{text} (logs: {node.get_logs_dir_path()})"


# --- jobs

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_JOB_FILES = "runtime_resources"


def submitted_job() -> str | None:
    """Submission id of the Ray job that this process is the driver of; None outside of one.

    Leans on the environment variable RAY_JOB_CONFIG_JSON_ENV_VAR, which Ray's job supervisor gives a driver.
    """
    metadata = json.loads(os.environ.get(_JOB_CONFIG) or "{}").get("metadata") or {}
    return str(metadata.get("job_submission_id") or "") or None


def is_copy_of_job(folder: Path) -> bool:
    """Whether this process belongs to a Ray job and `folder` lies in the files that Ray copied for it and will remove.

    Leans on the same variable, and on Ray's folder `runtime_resources` for such copies.
    """
    return _JOB_FILES in folder.parts and bool(os.environ.get(_JOB_CONFIG))


# --- nodes and the autoscaler


def head_nodes() -> list[str]:
    """Ids of the connected cluster's living heads (usually one).

    Leans on the resource `node:__internal_head__`.
    """
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]


def free_resources_by_node() -> list[dict[str, float]]:
    """Free resources of each living node of the connected cluster.

    Leans on `ray._private.state.available_resources_per_node`.
    """
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def autoscaler_file(gcs_address: str) -> Path | None:
    """On the head's machine: the cluster file of the autoscaler that serves `gcs_address`; None without an autoscaler.

    Leans on the command line of Ray's `monitor.py`: --gcs-address=…, --autoscaling-config=….
    """
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # the process has ended, or is another user's
        flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        is_monitor = any(word.endswith("monitor.py") for word in words)
        if is_monitor and flags.get("gcs-address") == gcs_address and "autoscaling-config" in flags:
            return Path(flags["autoscaling-config"]).expanduser()
    return None


def autoscaler_launches(recent_s: float) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """Nodes that the connected cluster's autoscaler has asked for and that are not there yet, by node type; and its
    failed launches of the last `recent_s` seconds, as 'TYPE (reason)'.

    Leans on `ray.autoscaler.v2.sdk.get_cluster_status`; for autoscaler version 1 on the report that it leaves under
    DEBUG_AUTOSCALING_STATUS in Ray's internal key-value store. Raises whatever these raise.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return _launches_v2(recent_s) if is_autoscaler_v2() else _launches_v1(recent_s)


def _launches_v2(recent_s: float) -> tuple[Mapping[str, int], tuple[str, ...]]:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    starting: Counter[str] = Counter()
    for launch in status.pending_launches:
        starting[launch.ray_node_type_name] += launch.count
    for node in status.pending_nodes:
        starting[node.ray_node_type_name] += 1
    failed = [
        f"{launch.ray_node_type_name} ({launch.details or 'no reason given'})"
        for launch in status.failed_launches
        if time.time() - (launch.failed_ts_s or launch.request_ts_s) < recent_s
    ]
    return starting, tuple(failed)


def _launches_v1(recent_s: float) -> tuple[Mapping[str, int], tuple[str, ...]]:
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
        if not record.get("is_available", True) and time.time() - record.get("last_checked_timestamp", 0) < recent_s:
            failed.append(f"{name} ({(reason or {}).get('description', 'no reason given')})")
    return starting, tuple(failed)


# --- what a job holds and waits for


def actor_waits_for_process() -> bool:
    """Whether an actor of this job has no process yet.

    Leans on `ray._private.state.actors` and its state PENDING_CREATION.
    """
    import ray
    from ray._private.state import actors

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return bool(actors(job_id=job, actor_state_name="PENDING_CREATION"))


@dataclass(frozen=True)
class ActorGroup:
    """A placement group that an actor made."""

    group: PlacementGroup
    creator_is_dead: bool


def actor_groups() -> list[ActorGroup]:
    """The placement groups that actors of this job made and that are still there, detached ones left out.

    A group's own mark of a dead creator is not enough: a group that is registered after its creator was struck off is
    never marked, so the creator is looked up too. Leans on the rows of the GCS (`ray._private.state.state`,
    `ray.core.generated.gcs_pb2.PlacementGroupTableData`), because the public table does not name creators.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    def is_dead(actor_id: str) -> bool:
        return bool(state.actor_table(actor_id).get("State", "DEAD") == "DEAD")

    job, found = ray.get_runtime_context().get_job_id(), []
    for row in state._connect_and_get_accessor().get_placement_group_table():
        data = PlacementGroupTableData.FromString(row)
        ours = data.creator_job_id.hex() == job and data.creator_actor_id.strip(b"\xff") and not data.is_detached
        if ours and data.state != PlacementGroupTableData.REMOVED:
            dead = data.creator_actor_dead or is_dead(data.creator_actor_id.hex())
            found.append(ActorGroup(PlacementGroup(PlacementGroupID(data.placement_group_id)), dead))
    return found


def autoscaling_coordinator() -> Any:
    """Handle on the actor in which Ray Data and Ray Train note what of the cluster each of them takes; made if need be.

    Leans on `ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator`.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()


def note_taken(
    coordinator: Any, name: str, bundles: Sequence[Mapping[str, float]], *, expire_after_s: float, spread: bool
) -> None:
    """Note with the coordinator that `name` takes these bundles, instead of what it noted before; none: nothing.

    The priority is that of Ray Train's worker groups: who came first is served first. Returns before the note is made.
    Leans on the coordinator's `request_resources` and `cancel_request`.
    """
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority

    if not bundles:
        coordinator.cancel_request.remote(requester_id=name)
        return
    coordinator.request_resources.remote(
        requester_id=name,
        resources=[dict(bundle) for bundle in bundles],
        expire_after_s=expire_after_s,
        priority=ResourceRequestPriority.HIGH,
        **({"strategy": "SPREAD"} if spread else {}),
    )


# --- Ray Train, Ray Tune and Ray Data


def controller_callback() -> type:
    """The class whose `after_controller_start` is called in the process of Ray Train's controller, before it asks for workers.

    Leans on `ray.train.v2._internal.execution.callback.ControllerCallback`.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback

    return ControllerCallback


def trials_of(results: tune.ResultGrid) -> list[Trial]:
    """The trials behind the results of `Tuner.fit`, failed ones too.

    Leans on `ResultGrid._experiment_analysis`.
    """
    return list(results._experiment_analysis.trials)


def longest_time_of(scheduler: Any) -> float | None:
    """The time after which a Ray Tune scheduler ends every trial; None where it has no such time.

    Leans on the attribute `_max_t` of ASHA, the one scheduler with such a time.
    """
    return getattr(scheduler, "_max_t", None)


def map_with_few_retries(dataset: data.Dataset, function: Any, max_retries: int) -> data.Dataset:
    """`dataset` mapped block by block; a task whose process dies is started again so often and no more.

    Ray Data's own way is for ever, and its only option for another is on its way out (Ray 2.64).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataset.map_batches(function, batch_size=None, max_retries=max_retries)


def quieten_ray_data() -> None:
    """Keep Ray Data's own warnings and errors; drop its start and end notes, and the one that bars are off.

    Leans on the names of two loggers.
    """
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
