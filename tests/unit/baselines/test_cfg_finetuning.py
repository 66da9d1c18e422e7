"""The loss of CFG fine-tuning against closed forms, and whose images a sample of an update is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ctrl_ray.baselines.cfg_finetuning import DenoisingBatch, denoising_loss, draw_batch
from ctrl_ray.baselines.labelled import LabelledLatents
from ctrl_ray.baselines.noising import NoiseSchedule
from ctrl_ray.config import ControlConfig
from ctrl_ray.diffusion.ddim import PredictionType, predict_x_0_and_noise
from ctrl_ray.diffusion.flow import FlowKernel
from ctrl_ray.diffusion.steps import ModelOutput
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones.base import NoiseLevels
from ctrl_ray.policy.protocol import Condition, Inputs

ALPHAS = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
MEANS, STDS = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 1.5]).double()
"""Of the two classes' images, which are one number each."""


def _images(count: int) -> LabelledLatents:
    """Two Gaussian classes as often as each other, and a second control that says nothing of the image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.arange(count) % 2, torch.arange(count) // 2 % 3], dim=1)
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return LabelledLatents(
        latents=MEANS[labels[:, :1]] + STDS[labels[:, :1]] * noise,
        prompts=tuple(f"image {i}" for i in range(count)),
        labels=labels,
        split=torch.zeros(count, dtype=torch.int8),
        controls={"size": ControlConfig(classes=("a", "b")), "hue": ControlConfig(classes=("r", "g", "b"))},
    )


class _Affine(nn.Module):
    """A prediction a x + b, with its own a and b for each class (the last: null) and timestep."""

    latent_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3, len(ALPHAS), 2, dtype=torch.float64))

    def forward(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        assert not reference and inputs.guidance.num_branches == 1
        slope, offset = self.weights[inputs.labels[:, 0], time].unsqueeze(-1).unbind(1)
        return ModelOutput(slope * latents + offset)


def _schedule(alphas: Tensor, prediction_type: str) -> NoiseSchedule:
    return NoiseSchedule(NoiseLevels(alphas.double().sqrt(), (1 - alphas.double()).sqrt(), prediction_type))


def _minimiser(prediction_type: PredictionType, dropout: float) -> Tensor:
    """(3, T, 2): a and b of the least loss, by Newton's step, which is exact for a square."""
    batch = draw_batch(_images(30_000), len(ALPHAS), dropout, seed=1, update=2, sample_ids=range(30_000))
    schedule, policy = _schedule(ALPHAS, prediction_type), _Affine()

    def gradient(weights: Tensor) -> Tensor:
        policy.weights.data = weights.expand(3, len(ALPHAS), 2).clone()
        loss = denoising_loss(policy, schedule, batch, Condition(batch.prompts, {})).sum()
        return torch.autograd.grad(loss, policy.weights)[0]

    at_zero = gradient(torch.zeros(2, dtype=torch.float64))
    hessian = torch.stack([gradient(unit) - at_zero for unit in torch.eye(2, dtype=torch.float64)], dim=-1)
    return -torch.linalg.solve(hessian, at_zero)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_least_loss_is_at_the_conditional_expectation(prediction_type: PredictionType) -> None:
    """For a Gaussian class N(m, s²) and the null label, of both classes: E[target | x_t, y] (of null: its best affine form)."""
    found = _minimiser(prediction_type, 0.4)
    pooled = (STDS**2 + MEANS**2).mean() - MEANS.mean() ** 2
    means, variances = torch.cat([MEANS, MEANS.mean()[None]]), torch.cat([STDS**2, pooled[None]])
    signal, share = ALPHAS.sqrt(), (1 - ALPHAS).sqrt()
    # target = p x_0 + q ε, x_t = signal x_0 + share ε
    p, q = {
        "epsilon": (0 * signal, 1 + 0 * share),
        "v_prediction": (-share, signal),
        "sample": (1 + 0 * signal, 0 * share),
    }[prediction_type]
    spread = variances[:, None]
    slopes = (p * signal * spread + q * share) / (signal**2 * spread + share**2)
    offsets = (p - slopes * signal) * means[:, None]
    assert (found[..., 0] - slopes).abs().max() < 0.1
    assert (found[..., 1] - offsets).abs().max() < 0.15
    # classes are further apart than what was allowed
    assert (offsets[0] - offsets[1]).abs().max() > 0.5


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_target_is_what_the_kernel_takes_a_prediction_for(prediction_type: PredictionType) -> None:
    """x_0 and ε come back from the noised latents and the target, each sample at its own timestep."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator).unbind(0)
    timesteps, schedule = torch.tensor([2, 0, 1]), _schedule(ALPHAS, prediction_type)
    noised, target = schedule.noised(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    for row, time in enumerate(timesteps.tolist()):
        x_0, found = predict_x_0_and_noise(noised[row], target[row], float(ALPHAS[time]), prediction_type)
        torch.testing.assert_close(x_0, latents[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, noise[row], atol=1e-5, rtol=1e-5)


def test_the_target_of_a_flow_is_its_velocity() -> None:
    """x_0 and ε come back by the kernel's own way."""
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    sigmas = torch.tensor([0.0, 0.3, 0.6])
    timesteps, schedule = torch.tensor([2, 0, 1]), NoiseSchedule(NoiseLevels(1 - sigmas, sigmas, "flow"))
    noised, target = schedule.noised(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    kernel = FlowKernel([0.6, 0.3, 0.0])
    for row, step_index in ((0, 0), (2, 1)):
        found = kernel.denoised(step_index, noised[row], ModelOutput(target[row]))
        torch.testing.assert_close(found.x_0, latents[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.noise, noise[row], atol=1e-5, rtol=1e-5)
    assert torch.equal(noised[1], latents[1])


def test_an_unknown_prediction_is_refused() -> None:
    schedule = _schedule(ALPHAS, "score")
    with pytest.raises(ConfigError, match="prediction_type 'score' is unknown; expected epsilon, v_prediction, sample"):
        schedule.target(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))


def test_the_loss_by_hand() -> None:
    """ᾱ = 0.5, x_0 = 2, ε = 1 and a prediction of 0.25: (0.25 − 1)², of each sample alone, mean over its dimensions."""

    def quarter(latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        assert torch.equal(latents[0], torch.full((2,), 0.5**0.5 * 3))
        return ModelOutput(torch.full_like(latents, 0.25))

    batch = DenoisingBatch(
        latents=torch.tensor([[2.0, 2.0], [0.0, 0.0]]),
        noise=torch.tensor([[1.0, 1.0], [0.25, 1.25]]),
        timesteps=torch.tensor([1, 1]),
        prompts=("a", "b"),
        labels=torch.zeros(2, 1, dtype=torch.long),
    )
    schedule = _schedule(ALPHAS, "epsilon")
    losses = denoising_loss(quarter, schedule, batch, Condition(batch.prompts, {}))  # type: ignore[arg-type]
    torch.testing.assert_close(losses, torch.tensor([0.75**2, 0.5]))


def test_each_label_is_dropped_for_itself_and_images_and_times_are_uniform() -> None:
    """Within four standard errors; prompt and labels are those of the image."""
    images, number, dropout = _images(10), 8000, 0.2
    batch = draw_batch(images, 3, dropout, seed=3, update=1, sample_ids=range(number))
    null = batch.labels == torch.tensor([2, 3])
    for found, share in ((null[:, 0], dropout), (null[:, 1], dropout), (null.all(1), dropout**2)):
        assert abs(float(found.double().mean()) - share) < 4 * (share * (1 - share) / number) ** 0.5
    rows = torch.tensor([int(prompt.split()[1]) for prompt in batch.prompts])
    assert torch.equal(batch.latents, images.latents[rows])
    assert torch.equal(batch.labels[~null], images.labels[rows][~null])
    for found, count in ((rows, 10), (batch.timesteps, 3)):
        shares = torch.bincount(found, minlength=count) / number
        assert len(shares) == count
        assert (shares - 1 / count).abs().max() < 4 * (1 / count * (1 - 1 / count) / number) ** 0.5


def test_a_sample_depends_on_its_id_alone() -> None:
    """On whatever rank and among whatever others it is drawn; another update, another draw. No dropout: no null label."""
    images = _images(50)
    whole = draw_batch(images, 3, 0.0, seed=3, update=1, sample_ids=range(12))
    part = draw_batch(images, 3, 0.0, seed=3, update=1, sample_ids=range(5, 9))
    other = draw_batch(images, 3, 0.0, seed=3, update=2, sample_ids=range(5, 9))
    for name in ("latents", "noise", "timesteps", "labels"):
        assert torch.equal(getattr(whole, name)[5:9], getattr(part, name))
    assert whole.prompts[5:9] == part.prompts != other.prompts
    assert not torch.equal(part.noise, other.noise)
    assert (whole.labels < torch.tensor([2, 3])).all()
