"""What holds for every family of base models, checked on its small pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ctrl_ray
from ctrl_ray.config import SamplerConfig
from ctrl_ray.gradients.rollout import rollout
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.policies import make_policy, moved


@torch.no_grad()
def check_start(policy: ControlledPolicy, latents: Tensor, time: Tensor, inputs: Inputs) -> None:
    """The policy is the reference, bit for bit, and not when it has moved."""
    ours, ref = (policy(latents, time, inputs, reference=reference).prediction for reference in (False, True))
    assert torch.equal(ours, ref)
    after = moved(policy, by=0.1, seed=3)(latents, time, inputs, reference=False).prediction
    assert not torch.allclose(after, ref, atol=1e-3)
    assert torch.equal(policy(latents, time, inputs, reference=True).prediction, ref)


def check_rows_of_adapted_layers(folder: Path) -> None:
    """By running the denoiser: a layer whose rows are samples sees (batch, width)."""
    backbone = load_backbone(str(folder))
    policy = make_policy(folder, {"size": 2}, lora=None)
    seen: dict[str, int] = {}
    stated = backbone.adapted_layers(policy.denoiser)
    for name in stated:
        layer = policy.denoiser.get_submodule(name)
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: args[0].dim()}))
    inputs = Inputs(backbone.load_encoder().encode(["a red circle"] * 3), torch.full((3, 1), 2))
    policy(torch.zeros(3, *backbone.latent_shape), torch.tensor(500.0), inputs, reference=False)
    assert seen.keys() == stated.keys() and {"sample", "token"} == set(stated.values())
    assert {name for name, rows in stated.items() if rows == "sample"} == {n for n, dim in seen.items() if dim == 2}


@torch.no_grad()
def check_stock_flow_draws(
    pipe: Any,
    adapter: Path,
    policy: ControlledPolicy,
    sampler: SamplerConfig,
    inputs: Inputs,
    latents: Tensor,
    **call: Any,
) -> None:
    """A stock pipeline with a class's LoRA draws the policy's images: with our scheduler, from the same noise, its LoRA off in
    the last step. call: what else it is given."""
    stored = json.loads((adapter / "adapter.json").read_text())["scheduler"]
    pipe.scheduler = ctrl_ray.AncestralFlowScheduler.from_config(stored)
    pipe.scheduler.generator = torch.Generator().manual_seed(1)
    generator, kernel = torch.Generator().manual_seed(1), policy.backbone.make_kernel(sampler, stored)
    steps = [torch.randn(latents.shape, generator=generator) for _ in range(sampler.num_steps - 1)]
    path = rollout(policy, kernel, inputs, lambda index: latents if index == 0 else steps[index - 1])

    def pre_trained_at_last(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        if step == sampler.num_steps - 2:
            pipe.disable_lora()
        return tensors

    drawn = pipe(
        list(inputs.condition.prompts),
        latents=latents.clone(),
        num_inference_steps=sampler.num_steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=pre_trained_at_last,
        **call,
    ).images
    torch.testing.assert_close(drawn, path.clean_latents, rtol=1e-4, atol=1e-4)
