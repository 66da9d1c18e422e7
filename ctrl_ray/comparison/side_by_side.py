"""Training runs side by side on the cores of one machine.

A run's worker and its reward actor compute in turn, and a second thread helps neither much. As many runs as there are cores,
each with one thread in a process of its own on the comparison's Ray, leave no core idle.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import ray

from ctrl_ray.cluster.connection import names_cluster
from ctrl_ray.cluster.resources import local_memory_bytes
from ctrl_ray.comparison.training import TrainedRun, is_finished, note_finished
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.errors import ConfigError, CtrlRayError, InterruptedRunError
from ctrl_ray.runs.files import write_whole

Command = Callable[[Path, bool], Sequence[str]]
"""(the run's config file, whether to go on with what is there) to a command line."""
_BYTES_A_RUN = 4 * 2**30
"""Memory that a run of a small pipeline takes at most, all its processes together."""
_POLL_S, _TELL_EVERY_S = 0.3, 30.0
_TAIL_BYTES = 8192


def runs_at_a_time(config: TrainConfig) -> int:
    """How many runs of a comparison train at a time: 1 where each has workers or cards enough of its own, or where Ray is
    not this machine's alone."""
    if config.scaling.use_gpu or config.scaling.num_workers != 1 or names_cluster():
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), local_memory_bytes() // _BYTES_A_RUN))


def sharing(config: TrainConfig, at_a_time: int) -> TrainConfig:
    """The run with its share of the cores: one thread for each of its processes."""
    if at_a_time == 1:
        return config
    cpus = max(2, len(os.sched_getaffinity(0))) / at_a_time / (1 + config.rewards.num_actors)
    return dataclasses.replace(
        config,
        scaling=dataclasses.replace(config.scaling, cpus_per_worker=cpus, threads_per_worker=1),
        rewards=dataclasses.replace(config.rewards, cpus_per_actor=cpus, threads_per_actor=1),
    )


def train_command(config_file: Path, resume: bool) -> list[str]:
    """The main job."""
    return [sys.executable, "-m", "ctrl_ray.train", "--config", str(config_file), *(["--resume"] if resume else [])]


def train_side_by_side(
    configs: Sequence[TrainConfig],
    at_a_time: int,
    say: Callable[[str], None],
    command: Command = train_command,
) -> None:
    """Train the runs that are not finished; each is noted as `trained_run` notes it. Output goes to FOLDER.log.

    Nothing is done where only one is trained at a time: `trained_run` does that. After Ctrl-C every run leaves a checkpoint.
    Raises ConfigError or CtrlRayError with a run's own message where one fails; the others leave checkpoints then.
    """
    waiting = [config for config in configs if not is_finished(Path(config.output_dir))]
    if at_a_time == 1 or not waiting:
        return
    say(f"training {len(waiting)} runs, {min(at_a_time, len(waiting))} at a time, one thread each")
    running: list[_Running] = []
    told = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(_Running.started(waiting.pop(0), command))
                say(f"{running[-1].name}: begun; its output goes to {running[-1].log}")
            time.sleep(_POLL_S)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                run.end()
                say(f"{run.name}: trained in {run.seconds:.0f} s")
            if time.monotonic() - told >= _TELL_EVERY_S and running:
                told = time.monotonic()
                say("\n".join(f"{run.name}: {run.last_line()}" for run in running))
    except BaseException:
        _stop(running)
        raise


def _stop(running: Sequence[_Running]) -> None:
    """Ask all to leave a checkpoint, and wait; asked again (Ctrl-C meanwhile), they end at once."""
    for run in running:
        run.process.send_signal(signal.SIGTERM)
    try:
        for run in running:
            run.process.wait()
    except BaseException:
        for run in running:
            run.process.kill()
        raise
    finally:
        for run in running:
            run.output.close()


@dataclass(frozen=True, kw_only=True)
class _Running:
    config: TrainConfig
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    log: Path
    began: float
    whole: bool

    @classmethod
    def started(cls, config: TrainConfig, command: Command) -> _Running:
        """In a session of its own: Ctrl-C reaches it through this process alone."""
        folder = Path(config.output_dir)
        resume = (folder / "config.json").is_file()
        file, log = folder.with_name(f"{folder.name}.json"), folder.with_name(f"{folder.name}.log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, to_json(config))
        output = log.open("ab")
        process = subprocess.Popen(
            command(file, resume),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | _address(),
        )
        return cls(config=config, process=process, output=output, log=log, began=time.monotonic(), whole=not resume)

    @property
    def name(self) -> str:
        """Of its folder."""
        return Path(self.config.output_dir).name

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began

    def end(self) -> None:
        """Note that it is finished; raises where it is not."""
        self.output.close()
        status = self.process.returncode
        if status == 0:
            folder = Path(self.config.output_dir)
            adapter = str(folder / "adapter")
            note_finished(folder, TrainedRun(adapter=adapter, seconds=self.seconds, whole=self.whole))
            return
        if status == 130:
            raise InterruptedRunError(f"the run {self.name} was stopped")
        kind = ConfigError if status == 2 else CtrlRayError
        raise kind(f"the run {self.name} failed: {self.last_line().removeprefix('error: ')} (its output: {self.log})")

    def last_line(self) -> str:
        """Of its output; of a failed run the message."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip() and "(raylet)" not in line]  # nor what Ray says
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["no output yet"])[-1].strip()


def _address() -> dict[str, str]:
    """The comparison's Ray, where there is one."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if ray.is_initialized() else {}
