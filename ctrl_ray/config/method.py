"""Which sampler draws the images: the plain one, or one that steers the pre-trained model and trains nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.config.policy import SamplerConfig
from ctrl_ray.config.values import named_values, require

MethodName = Literal[
    "plain", "best_of_n", "rejection", "dps", "mpgd", "tfg", "classifier_guidance", "smc", "svdd", "tds", "fk_steering"
]

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "best_of_n": ("num_particles",),
    "rejection": ("max_tries",),
    "dps": ("scale", "window"),
    "mpgd": ("scale", "step_size", "window"),
    "tfg": ("scale", "mean_scale", "smoothing", "num_smoothed", "num_iterations", "num_recurrences", "window"),
    "classifier_guidance": ("scale", "window", "noised_classifier"),
    "smc": ("num_particles",),
    "svdd": ("num_particles", "temperature"),
    "tds": ("num_particles", "scale"),
    "fk_steering": ("num_particles", "every", "potential"),
}
"""The options that each method has."""

NOISED_EXAMPLE = "jpeg_size=runs/noised"


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """A method of `ctrl_ray.baselines`. An option that is None has the method's own default."""

    name: MethodName = "plain"
    """'plain': no steering. Keep or drop whole samples: 'best_of_n', 'rejection' (exact). Push each step: 'dps'
    (reconstruction guidance), 'mpgd', 'tfg', 'classifier_guidance' (by a classifier of noised latents). Weigh and resample
    particles: 'smc', 'tds', 'fk_steering' (exact as their number grows), 'svdd'."""
    reference_steps: Annotated[int, at_least(0)] = 1
    """The method does not steer this many of the last denoising steps. They have so little noise that a push there costs a
    large KL and gains nothing."""
    scale: Annotated[float | None, at_least(0)] = None
    """Strength of a gradient. dps, tds, tfg: the gradient through the denoiser. mpgd: the gradient in x_0.
    classifier_guidance: the gradient of log p(y|x_t)^exponent. Default 1, the nominal one."""
    num_particles: Annotated[int | None, at_least(1)] = None
    """Paths of each image at a time: samples (best_of_n: 4), particles (smc, tds, fk_steering: 4), candidates of a step (svdd:
    8). The cost is at least this many times plain sampling's, and several times more where each step decodes or
    differentiates: on the built-in example smc with 8 costs 46, tds with 4 costs 32, svdd with 8 costs 38.""" ""
    max_tries: Annotated[int | None, at_least(1)] = None
    """rejection: the most samples drawn for an image. Default 256."""
    window: tuple[float, float] | None = None
    """dps, mpgd, tfg, classifier_guidance: guide the steps between these two shares of the way from noise (0) to image (1).
    Default 0 1: all steps."""
    noised_classifier: tuple[str, ...] | None = None
    """classifier_guidance: NAME=FOLDER of each control's classifier of noised latents. `python -m ctrl_ray.classify --noised`
    writes it."""
    step_size: Literal["plain", "guidance"] | None = None
    """mpgd: 'guidance' makes the step as large as the prompt's classifier-free guidance (times scale), whatever the gradient's
    size. Default plain."""
    mean_scale: Annotated[float | None, at_least(0)] = None
    """tfg: strength of the gradient in x_0. Default 1."""
    smoothing: Annotated[float | None, at_least(0)] = None
    """tfg: the noise on x_0 over which the reward is averaged. Default 0.01."""
    num_smoothed: Annotated[int | None, at_least(1)] = None
    """tfg: how many draws of this noise. Default 4."""
    num_iterations: Annotated[int | None, at_least(1)] = None
    """tfg: gradient steps in x_0 at each denoising step. Default 4."""
    num_recurrences: Annotated[int | None, at_least(1)] = None
    """tfg: how many times each denoising step is taken, with new noise in between. Default 1."""
    temperature: Annotated[float | None, at_least(0)] = None
    """svdd: α of the softmax over candidates. 0: take the best one. Default 1."""
    every: Annotated[int | None, at_least(1)] = None
    """fk_steering: steps between two potentials. Default 5."""
    potential: Literal["difference", "max", "add"] | None = None
    """fk_steering: how particles are compared on the way. The target is the same for all. Default difference."""

    def __post_init__(self) -> None:
        check_fields(self)
        known = OPTIONS[self.name]
        odd = [
            f.name
            for f in fields(self)
            if f.name not in ("name", "reference_steps", *known) and getattr(self, f.name) is not None
        ]
        require(
            not odd,
            f"method {self.name} has no option {', '.join(odd)}; its options are {', '.join(known) or 'none'}",
        )
        if self.window is not None:
            low, high = self.window
            require(
                0 <= low < high <= 1,
                f"method.window is {low} {high}; expected two shares of the steps, the first below the second, in 0 … 1",
            )

        require(
            self.name != "classifier_guidance" or bool(self.noised_classifier),
            "method classifier_guidance needs noised_classifier: NAME=FOLDER of each control's classifier of noised latents, "
            "which `python -m ctrl_ray.classify --noised` writes; fit one, or take dps, which asks the classifier of images",
        )
        _ = self.noised_folders  # refuses another form

    @property
    def steers(self) -> bool:
        """Whether it is another sampler than the plain one."""
        return self.name != "plain"

    @property
    def why(self) -> str:
        """Why it needs classifiers, for messages."""
        return f"method {self.name} steers by classifiers"

    def sampler(self, sampler: SamplerConfig) -> SamplerConfig:
        """The sampler of a base model as the method is to act on it; ConfigError where no step is left to steer."""
        require(
            sampler.num_steps > self.reference_steps,
            f"num_steps is {sampler.num_steps}, but nothing steers the last {self.reference_steps} "
            f"(method.reference_steps); expected at least {self.reference_steps + 1}",
        )
        return replace(sampler, reference_steps=self.reference_steps)

    @property
    def noised_folders(self) -> dict[str, str]:
        """Control to folder, in the given order."""
        return named_values("method.noised_classifier", self.noised_classifier or (), NOISED_EXAMPLE)

    @property
    def given(self) -> dict[str, object]:
        """The options that are not None."""
        return {name: getattr(self, name) for name in OPTIONS[self.name] if getattr(self, name) is not None}
