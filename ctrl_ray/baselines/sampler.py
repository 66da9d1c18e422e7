"""What all baselines that sample share: the call of a `Sampler`, checked in one place, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from ctrl_ray.baselines.noise import ImageNoise
from ctrl_ray.baselines.prediction import Prediction, predict, require_reference
from ctrl_ray.baselines.tilt import require_rewards
from ctrl_ray.diffusion.steps import DenoisingKernel
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory
from ctrl_ray.policy.protocol import Inputs, Policy
from ctrl_ray.rewards.protocol import Rewards

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a sampler is called with."""

    policy: Policy
    """The pre-trained model, by `reference=True`."""
    kernel: DenoisingKernel
    inputs: Inputs
    """Of B images."""
    noise: ImageNoise
    rewards: Rewards
    on_step: OnStep
    """Told each step's index and its next latents."""

    def predict(
        self, step_index: int, latents: Tensor, inputs: Inputs | None = None, *, with_graph: bool = False
    ) -> Prediction:
        """The pre-trained model's prediction of the images, or of others' `inputs`."""
        return predict(self.policy, self.kernel, step_index, latents, inputs or self.inputs, with_graph=with_graph)

    def repeated(self, count: int) -> Inputs:
        """The inputs of `count` rows for each image, in the order of the images."""
        return self.inputs.select([row for row in range(len(self.inputs)) for _ in range(count)])


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A `Sampler` of p_pre(x|c) e^ℓ(x), or of what comes near it, that trains nothing; subclasses say how in `draw`."""

    exponents: tuple[float, ...]
    """λ of each control, in the order of the label columns."""
    method: ClassVar[str]
    """Its name in `MethodConfig`."""
    needs_rewards: ClassVar[bool] = True
    """Whether the reward is asked; where it is not, there may be none."""

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must have a gradient."""
        return False

    @property
    def rows_per_image(self) -> int:
        """Latents that are held for each image at a time."""
        return 1

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that it reads where it samples."""
        return ()

    def reading(self, folders: Sequence[str]) -> Baseline:
        """Itself, with others in the place of `folders`: where they lie on this host."""
        return self

    def draw(self, call: Call) -> Trajectory:
        """Sample; with KL and log-ratio to the pre-trained model where the density of a path is known."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: NoiseSource,
        rewards: Rewards | None = None,
        *,
        reference: bool = True,
        with_kl: bool = False,
        on_step: OnStep | None = None,
    ) -> Trajectory:
        """See `Sampler`; with_kl gives KL and log-ratio of methods whose paths have a density.

        Raises ConfigError for a policy in place of the pre-trained model, for rewards that are missing or without the
        gradient that the method needs, and where no step has noise.
        """
        require_reference(kernel, self.method, reference=reference)
        if self.needs_rewards:
            rewards = require_rewards(rewards, self.method, gradient=self.needs_gradient)
        call = Call(
            policy=policy,
            kernel=kernel,
            inputs=inputs,
            noise=ImageNoise(noise),
            rewards=cast(Rewards, rewards),
            on_step=on_step or _nobody,
        )
        found = self.draw(call)
        return found if with_kl else replace(found, kl_per_step=None, log_ratio=None)


def _nobody(step_index: int, next_latents: Tensor) -> None:
    """Where nobody wants to be told."""
