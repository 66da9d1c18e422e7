"""What a user may do when a run is done, as commands that run as they are printed."""

from __future__ import annotations

import shlex
from pathlib import Path

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.presets import PRESETS
from ctrl_ray.driver.pre_trained import has_target
from ctrl_ray.evaluation.certificate import exponents_of


def next_steps(config: TrainConfig, adapter: Path, prompt: str) -> dict[str, str]:
    """Command lines by what they are for, in the order in which one would try them.

    config: The finished run, its classifiers fitted. adapter: Where the adapter lies. prompt: Any of the run's.
    """
    labels = [f"{name}={control.num_classes - 1}" for name, control in config.controls.items()]
    chosen = ["--prompt", prompt, "--control", *labels]
    steps = {
        "sample": _line("sample", "--adapter", adapter, *chosen, "--output-dir", adapter.parent / "samples"),
        "a page": _line("demo", "--adapter", adapter),
    }
    if has_target(config) and config.training_method == "ctrl":
        steps["is it right?"] = _line("verify", "--adapter", adapter)
        steps["compare"] = _comparison(config, adapter)
    return steps | {
        "your photos": "python -m ctrl_ray.label --images photos/ --output data.parquet --controls jpeg_size"
    }


def next_lines(steps: dict[str, str]) -> list[str]:
    """The commands as lines for the terminal."""
    width = max(map(len, steps)) + 2
    return ["next", *(f"  {purpose:{width}}{line}" for purpose, line in steps.items())]


def _comparison(config: TrainConfig, adapter: Path) -> str:
    """All methods where a preset has this task, else one that needs no training."""
    for name, make in PRESETS.items():
        if _task(make()) == _task(config):
            return _line("compare", "--preset", name, "--quick", "--adapters", f"ctrl={adapter}")
    exponents = exponents_of(config.controls, config.kl_coef)
    flags = ["--base-model", config.base_model, "--method.name", "tds"]
    flags += ["--classifier", *(f"{name}={control.classifier}" for name, control in config.controls.items())]
    flags += ["--exponent", *(f"{name}={exponent:g}" for name, exponent in exponents.items())]
    sampler = config.sampler
    return _line(
        "evaluate", *flags, "--num-steps", sampler.num_steps, "--guidance-scale", f"{sampler.guidance_scale:g}"
    )


def _task(config: TrainConfig) -> object:
    controls = {name: (control.oracle, control.thresholds) for name, control in config.controls.items()}
    return controls and (config.base_model, config.sampler, controls)


def _line(command: str, *words: object) -> str:
    return f"python -m ctrl_ray.{command} {shlex.join(map(str, words))}"
