"""Giving back what ended trials, and runs that were given up, still reserve."""

from __future__ import annotations

from ray.util import remove_placement_group

from ctrl_ray.ray_internals import actor_groups


def give_back_abandoned_groups() -> int:
    """Remove this job's placement groups whose creator is dead; returns how many groups of living actors there are.

    When Ray Tune ends a trial early, its Ray Train controller dies with it. Ray then keeps the workers' placement group until
    the whole job ends (Ray Train's own cleaner needs a dashboard), and the next trial would wait for it. A group that is
    taken from a controller that still lives would be made anew, so only the dead ones' are removed. A controller that sees
    its workers die before itself asks for another group while it ends, so this is to be called more than once.
    """
    living = 0
    for group in actor_groups():
        if group.creator_is_dead:
            remove_placement_group(group.group)
        else:
            living += 1
    return living
