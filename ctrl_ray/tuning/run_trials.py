"""Running the trials of a sweep with Ray Tune: from a checked space to what every trial came to."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator

from ctrl_ray.cluster.variables import set_meanwhile
from ctrl_ray.config import TrainConfig
from ctrl_ray.ray_internals import free_resources_by_node, trials_of
from ctrl_ray.tuning.concurrency import concurrent_trials, trial_bundles
from ctrl_ray.tuning.follower import SweepFollower
from ctrl_ray.tuning.interruption import interruptible_tune
from ctrl_ray.tuning.results.trials import SweepTrial
from ctrl_ray.tuning.space import Space
from ctrl_ray.tuning.sweep_folder import TUNE, SweepFolder
from ctrl_ray.tuning.trial import TrialJob, run_trial

_SEED = 0


def room_for_trials(config: TrainConfig, asked: int | Literal["auto"]) -> int:
    """Trials at a time: as many as have room beside the reward pool (which must be running), at most `asked`.

    At least 1: where nothing is free now the first trial waits for machines and says so.
    """
    room = concurrent_trials(free_resources_by_node(), trial_bundles(config))
    return max(1, room if asked == "auto" else min(room, asked))


def run_trials(
    space: Space, job: TrialJob, folder: SweepFolder, follower: SweepFollower, *, num_samples: int, num_concurrent: int
) -> list[SweepTrial]:
    """Run what is left of the sweep and return all its trials; a failed trial ends none of the others.

    KeyboardInterrupt when it was interrupted; Ray Tune's state then lies in the sweep's folder, and the next call goes on.
    """
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, job=job),
        {"CPU": 0, _this_node(): _share(num_concurrent)},
    )
    callback = follower.callback
    with _quiet_tune():
        if tune.Tuner.can_restore(str(folder.tune)):
            tuner = tune.Tuner.restore(
                str(folder.tune), trainable=trainable, resume_unfinished=True, resume_errored=True
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=dict(space.knobs),
                tune_config=_tune_config(space, num_samples, num_concurrent),
                run_config=tune.RunConfig(name=TUNE, storage_path=str(folder.path), callbacks=[callback], verbose=0),
            )
        try:
            with interruptible_tune():
                results = tuner.fit()
            follower.look(trials_of(results), now=True)
        finally:
            follower.close()
    return follower.trials


def _tune_config(space: Space, num_samples: int, num_concurrent: int) -> tune.TuneConfig:
    points = [dict(point) for point in space.points]
    scheduler = space.scheduler() if space.scheduler is not None else None
    if space.search is not None:
        search = space.search(space.metric, space.mode, points)
        passes = num_samples
    else:
        search = BasicVariantGenerator(points_to_evaluate=points or None, random_state=_SEED)
        passes = max(1, num_samples // space.grid_size)
        if not any(not isinstance(value, Mapping) for value in space.knobs.values()):
            passes = 1  # a grid alone: once is enough, the draws are keyed by the seed
    judged: dict[str, Any] = {}
    if len(space.metric) == 1 and (scheduler is not None or space.search is not None):
        judged = {"metric": space.metric[0], "mode": space.mode[0]}
    return tune.TuneConfig(
        num_samples=passes,
        max_concurrent_trials=None if space.search is None else num_concurrent,  # a searcher waits for results
        search_alg=search,
        scheduler=scheduler,
        reuse_actors=False,
        **judged,
    )


def _share(num_concurrent: int) -> float:
    """What a trial's driver takes of the resource that this process's node alone has, 1 in all: so the drivers stay where
    the sweep's folder is, and no more than so many run. Ray counts in steps of 0.0001."""
    return math.floor(9_900 / num_concurrent) / 10_000


def _this_node() -> str:
    """The name of that resource."""
    here = ray.get_runtime_context().get_node_id()
    [node] = [node for node in ray.nodes() if node["NodeID"] == here]
    return f"node:{node['NodeManagerAddress']}"


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Our table instead of Ray Tune's reports; its state is written often enough that little is asked again."""
    settings = {
        "TUNE_GLOBAL_CHECKPOINT_S": "5",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_RESULT_BUFFER_LENGTH": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",
    }
    logger = logging.getLogger("ray.tune")
    level = logger.level
    if not os.environ.get("CTRL_RAY_VERBOSE"):
        logger.setLevel(logging.CRITICAL)
    try:
        with set_meanwhile(settings):
            yield
    finally:
        logger.setLevel(level)
