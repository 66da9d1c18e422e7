"""The pre-trained model's prediction at one step, in the terms that guidance changes: x̂_0, ε and the mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctrl_ray.diffusion.steps import NO_GUIDANCE, Denoised, DenoisingKernel, GaussianStep
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.protocol import Inputs, Policy, policy_for_latents


@dataclass(frozen=True)
class Prediction:
    """What the denoiser says of B latents before step `step_index`."""

    kernel: DenoisingKernel
    step_index: int
    latents: Tensor
    """(B, ...) float32; a leaf where the prediction has a graph."""
    denoised: Denoised
    """x̂_0 and ε̃, like the latents."""
    step: GaussianStep
    """The pre-trained model's law of the next latents; without a graph."""
    policy: Policy
    inputs: Inputs

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """∇_x <cotangent, x̂_0(x)>, through the denoiser; the graph is used up."""
        (gradient,) = torch.autograd.grad(self.denoised.x_0, self.latents, cotangent)
        return gradient

    @torch.no_grad()
    def prompt_pull(self) -> Tensor:
        """w (ε_c − ε_∅) of classifier-free guidance at scale w, like the latents, by one more forward.

        ConfigError where there is no guidance."""
        scale = self.inputs.guidance.scale
        if scale == 1.0:
            raise ConfigError(
                "step_size 'guidance' measures steps by classifier-free guidance, but guidance_scale is 1"
            )
        time = self.kernel.time(self.step_index, self.latents.device)
        alone = replace(self.inputs, guidance=NO_GUIDANCE)
        output = self.policy(self.latents.detach(), time, alone, reference=True)
        conditional = self.kernel.denoised(self.step_index, self.latents.detach(), output).noise
        return (self.detached().noise - conditional) * (scale / (scale - 1))

    def detached(self) -> Denoised:
        """x̂_0 and ε̃ without their graph."""
        return Denoised(self.denoised.x_0.detach(), self.denoised.noise.detach())

    def mean_of_shifted_noise(self, shift: Tensor) -> Tensor:
        """The next mean where ε̃ + shift is predicted in place of ε̃: x̂_0 moves with it."""
        scales = self.kernel.scales(self.step_index)
        x_0, noise = self.detached()
        moved = Denoised(x_0 - scales.noise / scales.signal * shift, noise + shift)
        return self.kernel.mean_from(self.step_index, moved)

    def mean_of_shifted_x_0(self, shift: Tensor) -> Tensor:
        """The next mean where x̂_0 + shift is predicted and ε̃ kept."""
        x_0, noise = self.detached()
        return self.kernel.mean_from(self.step_index, Denoised(x_0 + shift, noise))


def predict(
    policy: Policy,
    kernel: DenoisingKernel,
    step_index: int,
    latents: Tensor,
    inputs: Inputs,
    *,
    with_graph: bool = False,
) -> Prediction:
    """The pre-trained model's prediction; with_graph: so that `pull_back` can go through it."""
    model = policy_for_latents(policy) if with_graph else policy
    leaf = latents.detach().requires_grad_(with_graph)
    with torch.set_grad_enabled(with_graph):
        output = model(leaf, kernel.time(step_index, latents.device), inputs, reference=True)
        denoised = kernel.denoised(step_index, leaf, output)
    with torch.no_grad():
        step = kernel.step(step_index, leaf.detach(), output)
    return Prediction(kernel, step_index, leaf, denoised, GaussianStep(step.mean.detach(), step.std), policy, inputs)


def guides(kernel: DenoisingKernel, step_index: int) -> bool:
    """Whether a baseline may change the step: where a policy would (`StepKernel.controlled`), there is noise, and the latents
    are not noise alone, as at a flow's σ = 1."""
    return kernel.controlled(step_index) and kernel.std(step_index) > 0 and kernel.scales(step_index).signal > 0


def require_reference(kernel: DenoisingKernel, method: str, *, reference: bool) -> None:
    """ConfigError where a policy is to be sampled in place of the pre-trained model, or where no step can be guided."""
    if not reference:
        raise ConfigError(
            f"method {method} samples the pre-trained model, but an adapter is given; leave the adapter or the method out"
        )
    if not any(guides(kernel, k) for k in range(kernel.num_steps)):
        raise ConfigError(
            f"method {method} acts on steps that have noise and begin with more than noise, and none of the {kernel.num_steps} "
            "does; expected eta above 0, best 1, and 3 steps or more of a flow, whose first begins with noise alone"
        )
