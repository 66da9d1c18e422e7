"""The runs that train methods: their settings, and what they cost."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrl_ray.baselines.noised_fit import fit_noised_classifier
from ctrl_ray.config import TrainConfig
from ctrl_ray.runs.files import write_whole

TRAINED = "training.json"
"""In a run's folder when it is finished; what it cost."""
HELD_OUT = "ctrl-held-out"
Train = Callable[[TrainConfig, bool], Path]
"""(config, whether to go on with what is there) to the adapter's folder; `ctrl_ray.train.fit`."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished run."""

    adapter: str
    """Its folder; of a noised classifier, that one's."""
    seconds: float
    """Of the session that finished it, with its start, its evaluations and its report."""
    whole: bool
    """Whether that session was the only one."""


def run_config(
    config: TrainConfig, training: Callable[[TrainConfig], TrainConfig], folder: Path, seed: int
) -> TrainConfig:
    """The settings of one run of a method."""
    return _judged_elsewhere(dataclasses.replace(training(config), output_dir=str(folder), seed=seed))


def held_out_config(config: TrainConfig, folder: Path, kept: Sequence[str]) -> TrainConfig:
    """The preset's run on the prompts that are kept, which are written beside its folder."""
    file = folder.with_name(f"{folder.name}.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(f"{prompt}\n" for prompt in kept))
    return _judged_elsewhere(
        dataclasses.replace(config, output_dir=str(folder), prompts_file=str(file), encoding="utf-8")
    )


def _judged_elsewhere(config: TrainConfig) -> TrainConfig:
    """The run with no more samples before and after it than its evaluations on the way have: those choose the checkpoint, and
    the comparison draws its own images of what comes out."""
    beside = config.evaluation
    few = min(beside.num_samples, beside.final_num_samples)
    return dataclasses.replace(
        config,
        evaluation=dataclasses.replace(
            beside, final_num_samples=few, log_z_samples=few, max_log_z_samples=few, num_pairs=0
        ),
    )


def trained_run(config: TrainConfig, train: Train) -> TrainedRun:
    """The finished run of these settings: that in its folder, or one that is trained now, from its last checkpoint if it has
    one."""
    folder = Path(config.output_dir)
    begun = (folder / "config.json").is_file()
    return _kept_or_made(folder, lambda: train(config, begun), whole=not begun)


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds all that it is to leave."""
    return (folder / TRAINED).is_file()


def note_finished(folder: Path, run: TrainedRun) -> None:
    """To be called when it does."""
    write_whole(folder / TRAINED, json.dumps(dataclasses.asdict(run), indent=2) + "\n")


def noised_run(config: TrainConfig, control: str, folder: Path, say: Callable[[str], None]) -> TrainedRun:
    """The classifier of noised latents of one control: that in the folder, or one that is fitted now."""
    offline = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, num_pipeline_samples=0))

    def fit() -> Path:
        fit_noised_classifier(offline, control, output_dir=folder, overwrite=True, say=say)
        return folder

    return _kept_or_made(folder, fit, whole=True)


def noised_runs(config: TrainConfig, folder: Path, say: Callable[[str], None]) -> dict[str, TrainedRun]:
    """`noised_run` of every control, in FOLDER/NAME."""
    return {name: noised_run(config, name, folder / name, say) for name in config.controls}


def _kept_or_made(folder: Path, make: Callable[[], Path], *, whole: bool) -> TrainedRun:
    """What lies in the folder with its cost, else what is made now."""
    if is_finished(folder):
        known = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
        return TrainedRun(**{field.name: known[field.name] for field in dataclasses.fields(TrainedRun)})
    started = time.monotonic()
    made = make()
    run = TrainedRun(adapter=str(made), seconds=time.monotonic() - started, whole=whole)
    note_finished(folder, run)
    return run
