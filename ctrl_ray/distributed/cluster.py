"""Connecting to Ray, and asking whether a run fits the cluster before it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ResourceError

_LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """Use the Ray that is there (initialised, or named by RAY_ADDRESS), else start a local one and end it after.

    num_cpus: CPUs of a local Ray; None: this machine's, at least 2.
    """
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=True)
        except ConnectionError as error:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({error}); if the cluster uses token "
                "authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            ) from error
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus or max(2, os.cpu_count() or 2),
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=bool(os.environ.get("CTRL_RAY_VERBOSE")),
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def needed_resources(config: TrainConfig) -> dict[str, float]:
    """CPUs and GPUs that training workers (an elastic group: the fewest), reward pool and asynchronous evaluation reserve
    together."""
    workers, actors = config.scaling.min_workers or config.scaling.num_workers, config.rewards.num_actors
    beside = config.evaluation
    return {
        "CPU": workers * config.scaling.cpus_per_worker
        + actors * config.rewards.cpus_per_actor
        + beside.asynchronous * beside.num_cpus,
        "GPU": workers * float(config.scaling.use_gpu)
        + actors * config.rewards.gpus_per_actor
        + beside.asynchronous * beside.num_gpus,
    }


def check_resources(config: TrainConfig, available: Mapping[str, float], where: str) -> None:
    """ResourceError, with both numbers, when the run can never be placed."""
    needed = needed_resources(config)
    for kind, amount in needed.items():
        have = available.get(kind, 0.0)
        if amount > have + 1e-9:
            share = (
                f"{config.scaling.num_workers} workers × {config.scaling.cpus_per_worker:g} + "
                f"{config.rewards.num_actors} reward actors × {config.rewards.cpus_per_actor:g}"
                if kind == "CPU"
                else f"{config.scaling.num_workers} workers + {config.rewards.num_actors} reward actors × "
                f"{config.rewards.gpus_per_actor:g}"
            )
            if config.evaluation.asynchronous:
                beside = config.evaluation.num_cpus if kind == "CPU" else config.evaluation.num_gpus
                share += f" + {beside:g} for asynchronous evaluation"
            raise ResourceError(
                f"the run needs {amount:g} {kind}s ({share}), but {where} has {have:g}; lower scaling.num_workers or "
                "rewards.num_actors, or use a larger cluster"
            )


def check_local_machine(config: TrainConfig) -> None:
    """`check_resources` against the Ray that is connected, else against this machine when no cluster is named; nothing
    is started for it."""
    if ray.is_initialized():
        check_cluster(config)
        return
    if os.environ.get("RAY_ADDRESS"):
        return
    import torch

    check_resources(
        config,
        {"CPU": float(max(2, os.cpu_count() or 2)), "GPU": float(torch.cuda.device_count())},
        "this machine",
    )


def check_cluster(config: TrainConfig) -> None:
    """`check_resources` against the connected cluster."""
    check_resources(config, ray.cluster_resources(), "the Ray cluster")
