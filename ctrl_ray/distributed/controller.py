"""What Ray Train's controller does for the driver; light, for the controller starts sooner without torch."""

from __future__ import annotations

from typing import Any

import ray

from ctrl_ray.ray_internals import controller_callback

_ControllerCallback: Any = controller_callback()


class IntroducesController(_ControllerCallback):
    """Hands the controller's handle to the channel: `TorchTrainer.fit` keeps it to itself, and offers no other way to end a
    run than a signal to the main thread."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller's process before it asks for workers."""
        self._channel.introduce_controller.remote(ray.get_runtime_context().current_actor)
