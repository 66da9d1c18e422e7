"""A tiny run of the main job for several hosts, and how to wait for what it does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctrl_ray.config import RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.reporting.tracking import read_metrics
from tests.configs import tiny_run
from tests.multihost.hosts import Host
from tests.tiny import make_tiny_pipeline

NUM_UPDATES = 12
RUN_VARIABLES = {"HF_HUB_OFFLINE": "1", "CXX": "/bin/false"}
"""Of a run on the hosts: nothing is downloaded, nothing compiled."""


def tiny_config(shared: Path) -> TrainConfig:
    """Updates of about a second on the tiny pipeline, a checkpoint after each; an elastic group of two."""
    return dataclasses.replace(
        tiny_run(make_tiny_pipeline(shared / "pipeline")),
        num_updates=NUM_UPDATES,
        checkpoint_every_updates=1,
        rewards=RewardPoolConfig(num_actors=1, node_resource="rewards"),
        scaling=ScalingConfig(num_workers=2, min_workers=1, max_failures=3),
    )


class Command:
    """A command of a host, such as `ray job submit`, that ends with the run and as it does."""

    def __init__(self, host: Host, *words: str | Path, log: Path, env: Mapping[str, str]) -> None:
        self._log = log
        self.process = host.start(*words, log=log, env=env)

    def said(self) -> str:
        """What it printed, its own output and that of the run."""
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], timeout_s: float = 300) -> None:
        """Wait for something that the run does."""

        def look() -> bool:
            return condition() or self.process.poll() is not None

        assert eventually(look, bool, timeout_s) and condition(), self.said()[-6000:]


def updates_of(run: Path) -> list[int]:
    """The updates that the run has done so far."""
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return [row["update"] for row in rows if row["kind"] == "update"]


def eventually(look: Callable[[], Any], enough: Callable[[Any], bool], timeout_s: float) -> Any:
    """What `look` saw when it was enough, or last."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if enough(seen) or time.monotonic() > deadline:
            return seen
        time.sleep(0.5)
