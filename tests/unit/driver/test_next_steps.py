"""What is said to be next after a run; that the lines run is in tests/integration/test_documents.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ctrl_ray.config import ControlConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.driver.next_steps import next_lines, next_steps

ADAPTER = Path("runs/x/adapter")


def test_the_methods_are_compared_where_a_preset_has_the_task() -> None:
    """Else one that needs no training, with the run's own classifiers and exponents."""
    config = preset("shapes")
    fitted = dataclasses.replace(config.controls["jpeg_size"], classifier="/c/jpeg")
    steps = next_steps(dataclasses.replace(config, controls={"jpeg_size": fitted}), ADAPTER, "a 'red' circle")
    assert steps["compare"] == "python -m ctrl_ray.compare --preset shapes --quick --adapters ctrl=runs/x/adapter"
    assert "--prompt 'a '\"'\"'red'\"'\"' circle' --control jpeg_size=3 " in steps["sample"]
    own = ControlConfig(oracle="jpeg_size", thresholds=(5.0, 9.0), classifier="/c/own", guidance_strength=3.0)
    steps = next_steps(dataclasses.replace(config, controls={"own": own}, kl_coef=2.0), ADAPTER, "")
    assert steps["compare"] == (
        "python -m ctrl_ray.evaluate --base-model shapes --method.name tds --classifier own=/c/own "
        "--exponent own=1.5 --num-steps 10 --guidance-scale 1"
    )
    assert "--control own=2 " in steps["sample"] and "--prompt '' " in steps["sample"]
    lines = next_lines(steps)
    assert lines[0] == "next" and {line.index("python") for line in lines[1:]} == {16}


def test_without_a_target_nothing_is_compared_with_it() -> None:
    estimator = dataclasses.replace(preset("shapes").estimator, max_drift=0.0, final_max_drift=0.0)
    config = dataclasses.replace(preset("shapes"), kl_coef=0.0, estimator=estimator)
    assert list(next_steps(config, ADAPTER, "a circle")) == ["sample", "a page", "your photos"]
