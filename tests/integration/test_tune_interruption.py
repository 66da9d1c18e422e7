"""Ctrl-C while Ray Tune runs a trial."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ray import tune

from ctrl_ray.tuning.interruption import interruptible_tune

pytestmark = pytest.mark.full


def _trial(knobs: dict[str, str]) -> dict[str, bool]:
    began = Path(knobs["began"])
    if not began.exists():
        began.touch()
        time.sleep(600)
    return {"final": True}


def test_an_interrupted_sweep_raises_and_can_be_restored(ray_session: None, tmp_path: Path) -> None:
    began = tmp_path / "began"
    trainable = tune.with_resources(_trial, {"CPU": 0.1})
    tuner = tune.Tuner(
        trainable,
        param_space={"began": str(began)},
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path), verbose=0),
    )

    def interrupt_once_it_runs() -> None:
        limit = time.monotonic() + 60
        while not began.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    thread = threading.Thread(target=interrupt_once_it_runs)
    thread.start()
    with pytest.raises(KeyboardInterrupt), interruptible_tune():
        tuner.fit()
    thread.join()
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    again = tune.Tuner.restore(str(tmp_path / "tune"), trainable=trainable, resume_unfinished=True)
    [result] = again.fit()
    assert result.error is None and result.metrics is not None and result.metrics["final"]
