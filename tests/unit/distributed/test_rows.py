"""Rows between processes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from ctrl_ray.distributed.rows import (
    EvaluationDone,
    Notice,
    Row,
    SamplesDrawn,
    Started,
    Stop,
    Stopped,
    Stopping,
    UpdateDone,
)


@pytest.mark.parametrize(
    "row",
    [
        Started(3, 0.006),
        UpdateDone(4, {"kl": 0.5}),
        EvaluationDone(4, {"accuracy": 1.0}),
        SamplesDrawn(4, [], ["size: small"]),
        Notice("a line"),
        Stopping("SIGINT"),
        Stopped(4, Stop("asked", "SIGINT received")),
    ],
)
def test_a_row_survives_pickling(row: Row) -> None:
    assert pickle.loads(pickle.dumps(row)) == row


def test_rows_are_read_without_torch_and_ray() -> None:
    """Ray Train's controller would start seconds later."""
    code = (
        "import sys, ctrl_ray.distributed.rows, ctrl_ray.distributed.scores; print({'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
