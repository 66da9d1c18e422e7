"""ctrl_ray: add a control to a pre-trained diffusion model by reinforcement learning (CTRL, ICLR 2025), on Ray.

Importing the package takes no time: what is named here is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrl_ray.config import ControlConfig, MethodConfig, TrainConfig
    from ctrl_ray.config.presets import preset
    from ctrl_ray.driver.classifier import fit_classifier
    from ctrl_ray.errors import CtrlRayError
    from ctrl_ray.pipeline import ControlledPipeline
    from ctrl_ray.policy.flow_scheduler import AncestralFlowScheduler
    from ctrl_ray.train import Run, fit
    from ctrl_ray.tune import SweepResult, sweep
    from ctrl_ray.tuning.space import Space

# transformers warns at every start that torchvision, which nothing here uses, is not installed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.1.0"

_WHERE = {
    "AncestralFlowScheduler": "ctrl_ray.policy.flow_scheduler",
    "ControlConfig": "ctrl_ray.config",
    "ControlledPipeline": "ctrl_ray.pipeline",
    "CtrlRayError": "ctrl_ray.errors",
    "MethodConfig": "ctrl_ray.config",
    "Run": "ctrl_ray.train",
    "Space": "ctrl_ray.tuning.space",
    "SweepResult": "ctrl_ray.tune",
    "TrainConfig": "ctrl_ray.config",
    "fit": "ctrl_ray.train",
    "fit_classifier": "ctrl_ray.driver.classifier",
    "preset": "ctrl_ray.config.presets",
    "sweep": "ctrl_ray.tune",
    # diffusers loads a pipeline's part from another package where that has this name too
    "SchedulerMixin": "diffusers",
}

__all__ = [
    "AncestralFlowScheduler",
    "ControlConfig",
    "ControlledPipeline",
    "CtrlRayError",
    "MethodConfig",
    "Run",
    "Space",
    "SweepResult",
    "TrainConfig",
    "fit",
    "fit_classifier",
    "preset",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ctrl_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
