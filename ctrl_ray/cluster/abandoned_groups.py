"""Giving back what ended trials, and runs that were given up, still reserve."""

from __future__ import annotations

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup, PlacementGroupID


def give_back_abandoned_groups() -> int:
    """Remove this job's placement groups whose creator is dead; returns how many groups of living actors there are.

    When Ray Tune ends a trial early, its Ray Train controller dies with it. Ray then keeps the workers' placement group until
    the whole job ends (Ray Train's own cleaner needs a dashboard), and the next trial would wait for it. A group that is
    taken from a controller that still lives would be made anew, so only the dead ones' are removed. The group's own mark of
    a dead creator is not enough: a controller that sees its workers die before itself asks for another group, and one that
    is registered after the controller was struck off is never marked.
    """
    job = ray.get_runtime_context().get_job_id()
    living = 0
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        ours = group.creator_job_id.hex() == job and group.creator_actor_id.strip(b"\xff") and not group.is_detached
        if not ours or group.state == PlacementGroupTableData.REMOVED:
            continue
        if group.creator_actor_dead or _is_dead(group.creator_actor_id.hex()):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
        else:
            living += 1
    return living


def _is_dead(actor_id: str) -> bool:
    return bool(state.actor_table(actor_id).get("State", "DEAD") == "DEAD")
