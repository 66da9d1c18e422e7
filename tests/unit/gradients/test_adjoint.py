"""The adjoint pass against autograd through the whole graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from ctrl_ray.config import LoraConfig, SamplerConfig
from ctrl_ray.diffusion.ddim import DDIMKernel
from ctrl_ray.diffusion.steps import Guidance, StepKernel, step_kl
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.gradients.rollout import keyed_noise, policy_step, rollout
from ctrl_ray.planning.live_bytes import LiveBytes
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Condition, Inputs
from ctrl_ray.policy.schedule import ddim_scheduler
from tests.gradients import full_pass
from tests.policies import make_policy

PROMPTS = ("a red circle", "a blue cross", "a green square")


def _perturbed_policy(folder: str) -> ControlledPolicy:
    policy = make_policy(folder, {"size": 4, "hue": 2}, lora=LoraConfig(rank=2)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    for table in policy.controls.tables.values():
        table.weight.data[-1] = 0
    return policy


@functools.cache
def _loaded(folder: str) -> tuple[ControlledPolicy, Condition]:
    """Policy and prompts for all tests; no test changes a parameter."""
    policy = _perturbed_policy(folder)
    condition = policy.backbone.load_encoder().encode(PROMPTS)
    assert condition.null_tensors is not None
    return policy, Condition(condition.prompts, _double(condition.tensors), _double(condition.null_tensors))


def _setup(folder: str, num_steps: int, guidance: Guidance) -> tuple[ControlledPolicy, StepKernel, Inputs]:
    policy, condition = _loaded(folder)
    policy.zero_grad()
    kernel = policy.backbone.make_kernel(SamplerConfig(num_steps=num_steps))
    return policy, kernel, Inputs(condition, torch.tensor([[0, 1], [4, 0], [2, 2]]), guidance)


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _reward(latents: Tensor) -> Tensor:
    return torch.tanh(latents).pow(3).flatten(1).sum(1) + latents.flatten(1)[:, 0] * latents.flatten(1)[:, 1]


def _whole_graph_gradient(
    policy: ControlledPolicy,
    kernel: StepKernel,
    inputs: Inputs,
    ids: list[int],
    weights: Tensor,
    kl_coef: float,
) -> dict[str, Tensor]:
    noise = keyed_noise(0, 0, ids, policy.latent_shape, kernel.num_steps)
    latents = noise(0).double()
    loss = torch.zeros((), dtype=torch.float64)
    for k in range(kernel.num_steps):
        step = ref = policy_step(policy, kernel, k, latents, inputs, reference=True)
        if kernel.controlled(k):
            step = policy_step(policy, kernel, k, latents, inputs, reference=False)
            loss = loss + kl_coef * (weights * step_kl(step, ref)).sum()
        latents = step.mean + step.std * noise(k + 1).double()
    loss = loss - (weights * _reward(latents)).sum()
    names, parameters = zip(*policy.trainable_parameters().items(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(),
        pytest.param(Guidance(1.7), marks=pytest.mark.full),
        pytest.param(Guidance(2.0, 1.3), marks=pytest.mark.full),
    ],
)
def test_adjoint_pass_equals_autograd_through_the_whole_graph(tiny_pipeline: str, guidance: Guidance) -> None:
    """float64, T = 4, LoRA and two tables, one sample with a null label: 1e-9 relative, in one and in three micro-batches, with
    one graph at a time and with two."""
    _check_gradient(tiny_pipeline, guidance, 1e-9)


@pytest.mark.full
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.7)])
@pytest.mark.parametrize(
    ("family", "tolerance"),
    [
        ("tiny_xl_pipeline", 1e-9),
        # its RMS norms and the embedding of its time compute in float32, whatever the latents' type
        ("tiny_3_pipeline", 1e-5),
        # so does the embedding of its time, and its norms
        ("tiny_aura_flow_pipeline", 1e-5),
    ],
)
def test_the_gradient_of_every_family(
    family: str, tolerance: float, guidance: Guidance, request: pytest.FixtureRequest
) -> None:
    """The same for Stable Diffusion XL, and for Stable Diffusion 3 and AuraFlow, whose last step is the reference's."""
    _check_gradient(request.getfixturevalue(family), guidance, tolerance)


def _check_gradient(folder: str, guidance: Guidance, tolerance: float) -> None:
    policy, kernel, inputs = _setup(folder, 4, guidance)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = _whole_graph_gradient(policy, kernel, inputs, [0, 1, 2], weights, 0.7)
    for batches, with_means in (
        ([[0, 1, 2]], False),
        ([[0], [1], [2]], False),
        ([[0, 1, 2]], True),
        ([[0], [1, 2]], True),
    ):
        policy.zero_grad()
        for rows in batches:
            noise = keyed_noise(0, 0, rows, policy.latent_shape, kernel.num_steps)
            trajectory = rollout(
                policy, kernel, inputs.select(rows), lambda p, n=noise: n(p).double(), with_means=with_means
            )
            clean = trajectory.clean_latents.clone().requires_grad_(True)
            (cotangent,) = torch.autograd.grad(_reward(clean).sum(), clean)
            full_pass(policy, kernel, trajectory, cotangent, weights[rows], kl_coef=0.7)
        for name, parameter in policy.trainable_parameters().items():
            assert parameter.grad is not None
            scale = expected[name].norm().clamp_min(1e-12)
            assert (parameter.grad - expected[name]).norm() / scale < tolerance, (name, len(batches), with_means)


def test_one_graph_at_a_time_takes_two_thirds_of_the_memory_however_long_the_trajectory(tiny_pipeline: str) -> None:
    """Peak bytes of the adjoint pass beyond what is there before it, with guidance."""

    def peak(num_steps: int, *, with_means: bool) -> int:
        policy, kernel, inputs = _setup(tiny_pipeline, num_steps, Guidance(1.7))
        for parameter in policy.trainable_parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        noise = keyed_noise(0, 0, [0, 1, 2], policy.latent_shape, num_steps)
        with LiveBytes() as live:
            for parameter in policy.parameters():
                live.add(parameter)
            trajectory = rollout(policy, kernel, inputs, lambda k: noise(k).double(), with_means=with_means)
            start = live.restart_peak()
            full_pass(policy, kernel, trajectory, torch.ones_like(trajectory.clean_latents), torch.ones(3).double())
            return live.peak - start

    one, two = (peak(5, with_means=with_means) for with_means in (True, False))
    assert one <= 0.65 * two
    assert peak(25, with_means=True) <= 1.05 * one


def test_null_row_gets_no_gradient_and_padding_none_at_all(tiny_pipeline: str) -> None:
    """The null rows stay zero, and samples of weight 0 change nothing."""
    policy, kernel, inputs = _setup(tiny_pipeline, 3, Guidance())

    def gradients(rows: list[int], weights: list[float]) -> dict[str, Tensor]:
        policy.zero_grad()
        noise = keyed_noise(0, 0, rows, policy.latent_shape, kernel.num_steps)
        trajectory = rollout(policy, kernel, inputs.select(rows), lambda p: noise(p).double())
        full_pass(
            policy,
            kernel,
            trajectory,
            torch.ones_like(trajectory.clean_latents),
            torch.tensor(weights, dtype=torch.float64),
        )
        return {n: p.grad.clone() for n, p in policy.trainable_parameters().items() if p.grad is not None}

    padded, plain = gradients([0, 1, 2], [0.5, 0.5, 0.0]), gradients([0, 1], [0.5, 0.5])
    for name, gradient in plain.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-9, atol=1e-12)
    assert padded["controls.tables.size.weight"][4].abs().max() == 0
    assert padded["controls.tables.size.weight"][0].abs().max() > 0


def test_a_trajectory_asks_for_no_longer_drift_than_the_bound(tiny_pipeline: str) -> None:
    """Two steps, the last of them the reference's, which shortens nothing: cotangents of a thousand times their length give the
    gradient of one that asks for 1.5 standard deviations of the first step's noise; one below the bound is not touched, and a
    sample without weight stays without."""
    policy, _, inputs = _setup(tiny_pipeline, 2, Guidance())
    kernel = policy.backbone.make_kernel(SamplerConfig(num_steps=2, reference_steps=1))
    noise = keyed_noise(0, 0, [0, 1, 2], policy.latent_shape, 2)
    trajectory = rollout(policy, kernel, inputs, lambda p: noise(p).double())
    weights = torch.tensor([0.2, 0.8, 0.0], dtype=torch.float64)
    start = torch.randn(trajectory.clean_latents.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(factors: list[float], **bound: float) -> tuple[Tensor, list[float]]:
        policy.zero_grad()
        scaled = start * torch.tensor(factors, dtype=torch.float64).view(3, 1, 1, 1)
        stats = full_pass(policy, kernel, trajectory, scaled, weights, kl_coef=0.7, **bound)
        found = torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values() if p.grad is not None])
        return found, stats.bounded.tolist()

    with torch.enable_grad():
        latents = trajectory.latents[1].clone().requires_grad_()
        mean = policy_step(policy, kernel, 1, latents, inputs, reference=True).mean
        (pulled_back,) = torch.autograd.grad((mean * start).sum(), latents)
    asked = pulled_back.flatten(1).norm(dim=1) * kernel.std(0) / 0.7
    expected, _ = gradient([1.5 / float(asked[0]), 0.5 / float(asked[1]), 1.0])
    found, bounded = gradient([1000.0, 0.5 / float(asked[1]), 1.0], max_drift=1.5)
    assert bounded == [1, 0, 0]
    assert (found - expected).norm() < 1e-9 * expected.norm()
    assert (gradient([1000.0, 1.0, 1.0])[0] - expected).norm() > expected.norm()


def _compile_blocks(policy: ControlledPolicy) -> None:
    policy.compile_blocks("aot_eager")  # torch's own operations, so that no number may change


def _both(policy: ControlledPolicy) -> None:
    policy.enable_gradient_checkpointing()
    _compile_blocks(policy)


@pytest.mark.full
@pytest.mark.parametrize("change", [ControlledPolicy.enable_gradient_checkpointing, _compile_blocks, _both])
def test_checkpointed_and_compiled_blocks_keep_gradients(
    tiny_pipeline: str, change: Callable[[ControlledPolicy], None]
) -> None:
    """A recomputation, or what was compiled, must run in the mode (policy or reference) of its own forward."""
    results = []
    for changed in (False, True):
        policy, kernel, inputs = _setup(tiny_pipeline, 3, Guidance(1.5))
        if changed:
            policy = _perturbed_policy(tiny_pipeline)
            change(policy)
        noise = keyed_noise(0, 0, [0, 1, 2], policy.latent_shape, kernel.num_steps)
        trajectory = rollout(policy, kernel, inputs, lambda p, n=noise: n(p).double())
        full_pass(
            policy, kernel, trajectory, torch.ones_like(trajectory.clean_latents), torch.ones(3, dtype=torch.float64)
        )
        results.append({n: p.grad for n, p in policy.trainable_parameters().items()})
        assert all(gradient is not None for gradient in results[-1].values())
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-10, atol=1e-12)


def test_deterministic_last_step_belongs_to_the_reference(tiny_pipeline: str) -> None:
    """With ᾱ_final = 1 the last step has std 0: it is the reference's, without KL, and gradients pass through it."""
    policy, _, inputs = _setup(tiny_pipeline, 3, Guidance())
    scheduler = ddim_scheduler(policy.backbone.scheduler_config())
    scheduler.set_timesteps(3)
    kernel = DDIMKernel(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        final_alpha_cumprod=1.0,
        eta=1.0,
        prediction_type="epsilon",
        num_train_timesteps=1000,
    )
    assert kernel.std(2) == 0 < kernel.std(1)
    assert [kernel.controlled(k) for k in range(3)] == [True, True, False]
    noise = keyed_noise(0, 0, [0, 1, 2], policy.latent_shape, kernel.num_steps)
    trajectory = rollout(policy, kernel, inputs, lambda p: noise(p).double(), with_kl=True)
    assert trajectory.kl_per_step is not None and trajectory.kl_per_step[:, 2].abs().max() == 0
    last = policy_step(policy, kernel, 2, trajectory.latents[2], inputs, reference=True)
    torch.testing.assert_close(trajectory.clean_latents, last.mean)
    full_pass(
        policy,
        kernel,
        trajectory,
        torch.ones_like(trajectory.clean_latents),
        torch.ones(3, dtype=torch.float64),
        kl_coef=0.0,
    )  # what arrives is the reward's
    for name, parameter in policy.trainable_parameters().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_non_finite_cotangent_stops_before_the_update(tiny_pipeline: str) -> None:
    """A NaN reward gradient is an error that names the step."""
    policy, kernel, inputs = _setup(tiny_pipeline, 2, Guidance())
    noise = keyed_noise(0, 0, [0, 1, 2], policy.latent_shape, kernel.num_steps)
    trajectory = rollout(policy, kernel, inputs, lambda p: noise(p).double())
    bad = torch.full_like(trajectory.clean_latents, float("nan"))
    with pytest.raises(NonFiniteError, match="denoising step 1"):
        full_pass(policy, kernel, trajectory, bad, torch.ones(3, dtype=torch.float64))


@pytest.mark.full
def test_splitting_a_batch_changes_no_gradient(tiny_pipeline: str) -> None:
    """Eight samples at once, in equal parts, and with a ragged last part that is padded with weight 0."""

    def gradients(parts: list[tuple[list[int], list[float]]]) -> dict[str, Tensor]:
        policy, kernel, inputs = _setup(tiny_pipeline, 2, Guidance())
        labels = torch.tensor([[i % 5, i % 3] for i in range(8)])
        for rows, weights in parts:
            noise = keyed_noise(0, 0, rows, policy.latent_shape, kernel.num_steps)
            condition = inputs.condition.select([row % 3 for row in rows])
            chosen = Inputs(condition, labels[rows])
            trajectory = rollout(policy, kernel, chosen, lambda p, n=noise: n(p).double())
            full_pass(
                policy,
                kernel,
                trajectory,
                torch.cos(trajectory.clean_latents),
                torch.tensor(weights, dtype=torch.float64),
            )
        return {name: p.grad.clone() for name, p in policy.trainable_parameters().items() if p.grad is not None}

    whole = gradients([(list(range(8)), [1 / 8] * 8)])
    for sizes in ((4, 4), (2, 2, 2, 2), (3, 3, 2), (5, 3)):
        parts, start = [], 0
        for size in sizes:
            rows = list(range(start, start + size))
            padding = max(sizes) - size
            parts.append((rows + rows[:1] * padding, [1 / 8] * size + [0.0] * padding))
            start += size
        split = gradients(parts)
        assert whole.keys() == split.keys() and len(whole) > 4
        for name, gradient in whole.items():
            assert (split[name] - gradient).norm() < 1e-10 * gradient.norm().clamp_min(1e-9), (sizes, name)
