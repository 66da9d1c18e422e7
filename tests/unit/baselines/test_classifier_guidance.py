"""Guidance with the exact p(y|x_t, t) is the sampler of the conditional data law, not the tilt of the sampler's law."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray.baselines.classifier_guidance import ClassifierGuidance, NoisedLogProbs, _loaded
from ctrl_ray.baselines.dps import DPS
from ctrl_ray.baselines.methods import make_sampler
from ctrl_ray.baselines.noised_classifier import NoisedClassifier
from ctrl_ray.config import ControlConfig, MethodConfig
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.exact.gaussian import solve_gaussian
from ctrl_ray.exact.problems import GaussianReward, Mixture
from ctrl_ray.exact.suite import TWO_MODES, Case, component, gaussian
from ctrl_ray.gradients.rollout import Trajectory, rollout
from ctrl_ray.policy.analytic import MixtureDenoiser, analytic_scheduler
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.protocol import Inputs
from tests.unit.baselines.closed_forms import Bench, affine_law, guided_chain, law_of

ALPHAS = analytic_scheduler().alphas_cumprod


class ExactGaussian:
    """p(y|x_t) of x_0 ~ N(0, 1) and y ~ N(x_0, std²): given x_t, x_0 is N(√ᾱ x_t, 1 − ᾱ)."""

    def __init__(self, reward: GaussianReward) -> None:
        self.reward = reward

    def __call__(self, latents: Tensor, timestep: Tensor, prompts: tuple[str, ...]) -> Tensor:
        alpha = float(ALPHAS[timestep])
        std = (self.reward.std**2 + 1 - alpha) ** 0.5
        return torch.distributions.Normal(alpha**0.5 * latents[:, :1], std).log_prob(
            torch.tensor(self.reward.target).to(latents)
        )


class ExactComponent:
    """p(component|x_t) of a mixture; the classes are the components."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __call__(self, latents: Tensor, timestep: Tensor, prompts: tuple[str, ...]) -> Tensor:
        alpha = float(ALPHAS[timestep])
        means, stds, weights = (
            torch.tensor(v).to(latents) for v in (self.mixture.means, self.mixture.stds, self.mixture.weights)
        )
        law = torch.distributions.Normal(alpha**0.5 * means, (alpha * stds**2 + 1 - alpha).sqrt())
        return (law.log_prob(latents[:, :1]) + weights.log()).log_softmax(1)


def _with_steps(case: Case, num_steps: int) -> Case:
    sampler = dataclasses.replace(case.problem.sampler, num_steps=num_steps)
    return dataclasses.replace(case, problem=dataclasses.replace(case.problem, sampler=sampler))


def _guided(*classifiers: NoisedLogProbs, **options: Any) -> ClassifierGuidance:
    return ClassifierGuidance(noised_classifier=classifiers, exponents=(1.0,) * len(classifiers), **options)


def _in_float64(bench: Bench, mixture: Mixture) -> None:
    """The bench's denoiser becomes the exact one of a mixture, in float64."""
    exact = MixtureDenoiser(mixture.means, mixture.stds, ALPHAS).double()
    exact.means, exact.stds = (torch.tensor(v, dtype=torch.float64) for v in (mixture.means, mixture.stds))
    bench.policy.denoiser = exact


def _paths(bench: Bench, sampler: Any, count: int, label: int = 0) -> Trajectory:
    prompts = bench.learner.prompts * count
    inputs = Inputs(bench.learner.encoder.encode(prompts), torch.full((count, 1), label))
    noise = bench.noise(count)
    found: Trajectory = sampler(
        bench.policy, bench.learner.kernel, inputs, lambda k: noise(k).double(), None, reference=True
    )
    return found


T1_POSTERIOR = Mixture((1.6,), (0.2**0.5,), (1.0,))
"""N(0, 1) and y = 2 ~ N(x, 0.5²): precision 1 + 4, mean 4 · 2 / 5."""


@pytest.mark.parametrize(
    "case, classifier, label, conditional",
    [
        (gaussian(), ExactGaussian(GaussianReward(2.0, 0.5)), 0, T1_POSTERIOR),
        (component(), ExactComponent(TWO_MODES), 1, Mixture((2.0,), (0.5,), (1.0,))),
    ],
)
@pytest.mark.parametrize("num_steps", [10, 50])
def test_with_the_exact_classifier_it_is_the_sampler_of_the_conditional_data(
    case: Case, classifier: NoisedLogProbs, label: int, conditional: Mixture, num_steps: int
) -> None:
    """Path by path, under the same noise: ε̃ − √(1−ᾱ) ∇ log p(y|x_t) is the exact ε of p(x|y)."""
    bench = Bench.of(_with_steps(case, num_steps))
    _in_float64(bench, case.problem.mixture)
    guided = _paths(bench, _guided(classifier), 64, label)
    unguided = _paths(bench, rollout, 64)
    _in_float64(bench, conditional)
    torch.testing.assert_close(guided.latents, _paths(bench, rollout, 64).latents, rtol=0, atol=1e-9)
    assert guided.latents.dtype == torch.float64
    assert (guided.clean_latents - unguided.clean_latents).abs().mean() > 0.5


@pytest.mark.parametrize(
    "num_steps, drawn, tilt",
    [
        (10, (1.595, 0.3145), (1.443, 0.4247)),
        (50, (1.598, 0.4015), (1.563, 0.4420)),
        (200, (1.598, 0.4320), (1.590, 0.4457)),
    ],
)
def test_its_law_is_not_the_tilt_of_the_discrete_one(
    num_steps: int, drawn: tuple[float, float], tilt: tuple[float, float]
) -> None:
    """The sampler's own steps are affine, so its law is known without sampling; more steps bring it nearer to the tilt."""
    bench = Bench.of(_with_steps(gaussian(), num_steps))
    mean, std = affine_law(bench, _guided(ExactGaussian(GaussianReward(2.0, 0.5))))
    assert (mean, std) == pytest.approx(drawn, abs=6e-4)
    exact = solve_gaussian(bench.case.problem).tilt
    assert (exact.mean, exact.std) == pytest.approx(tilt, abs=6e-4)
    distance = ((mean - exact.mean) ** 2 + (std - exact.std) ** 2) ** 0.5  # Wasserstein-2 of two Gaussians
    assert distance == pytest.approx(((drawn[0] - tilt[0]) ** 2 + (drawn[1] - tilt[1]) ** 2) ** 0.5, abs=1e-3)
    assert distance > 0.015


@pytest.mark.parametrize("scale, exponent", [(1.0, 1.0), (0.5, 4.0), (2.0, 1.0)])
def test_scale_times_exponent_is_the_weight(scale: float, exponent: float) -> None:
    """ε moves by −w √(1−ᾱ) ∇ log p(y|x_t): by how much the mean does, from the chain's equations; and the path's KL."""
    reward, weight = GaussianReward(2.0, 0.5), scale * exponent

    def guide(alpha: float, following: float, slope: float, step: int) -> tuple[float, float]:
        kept = alpha / following
        factor = weight * (1 - kept) / kept**0.5 / (reward.std**2 + 1 - alpha) * alpha**0.5
        return -factor * alpha**0.5, factor * reward.target

    bench = Bench.of(_with_steps(gaussian(), 10))
    sampler = ClassifierGuidance(noised_classifier=(ExactGaussian(reward),), exponents=(exponent,), scale=scale)
    mean, std, kl = law_of(guided_chain(10, guide))
    assert affine_law(bench, sampler) == pytest.approx((mean, std), abs=2e-5)
    kls = bench.sample(sampler, 20_000).kl_per_step
    assert kls is not None
    assert float(kls.sum(1).mean()) == pytest.approx(kl, abs=4 * float(kls.sum(1).std()) / 20_000**0.5)


def test_it_is_not_dps() -> None:
    """DPS takes the reward's gradient at x̂_0, as if that were x_0: p(y|x_t) is wider."""
    bench = Bench.of(_with_steps(gaussian(), 10))
    ours, other = (
        affine_law(bench, _guided(ExactGaussian(GaussianReward(2.0, 0.5)))),
        affine_law(bench, DPS(exponents=(1.0,))),
    )
    assert abs(ours[0] - other[0]) + abs(ours[1] - other[1]) > 0.05


def test_controls_add_up_and_a_null_label_guides_nowhere() -> None:
    bench = Bench.of(_with_steps(component(), 10))
    exact = ExactComponent(TWO_MODES)
    asked = torch.tensor([[0, 2], [2, 0], [1, 1], [2, 2]])
    inputs = Inputs(bench.learner.encoder.encode(bench.learner.prompts * 4), asked)
    half = ClassifierGuidance(noised_classifier=(exact, exact), exponents=(0.25, 0.75))

    def latents(sampler: Any, inputs: Inputs) -> Tensor:
        return sampler(bench.policy, bench.learner.kernel, inputs, bench.noise(4), reference=True).clean_latents

    found = latents(half, inputs)
    for row, (label, weight) in enumerate(((0, 0.25), (0, 0.75), (1, 1.0))):
        one = dataclasses.replace(inputs, labels=torch.full((4, 1), label))
        sampler = ClassifierGuidance(noised_classifier=(exact,), exponents=(weight,))
        torch.testing.assert_close(found[row], latents(sampler, one)[row], rtol=0, atol=1e-5)
    assert torch.equal(found[3], latents(rollout, inputs)[3])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    spec = ControlConfig(oracle="jpeg_size", thresholds=(1.0, 2.0), unit="bytes")
    NoisedClassifier.new("jpeg_size", spec, latent_shape=(4, 8, 8), base_model="shapes").save(tmp_path / "noised")
    return tmp_path / "noised"


def test_a_folder_is_loaded_once_and_the_sampler_travels(folder: Path) -> None:
    method = MethodConfig(name="classifier_guidance", noised_classifier=(f"jpeg_size={folder}",), scale=2.0)
    sampler: Any = make_sampler(method, (3.0,), ["jpeg_size"])
    assert sampler == ClassifierGuidance(
        noised_classifier=(str(folder),), controls=("jpeg_size",), exponents=(3.0,), scale=2.0
    )
    assert pickle.loads(pickle.dumps(sampler)) == sampler
    assert sampler._classifier(0, str(folder), torch.device("cpu")) is _loaded(str(folder), "jpeg_size", "cpu")


def test_a_folder_that_knows_other_latents_is_told_once(tmp_path: Path, tiny_pipeline: Path) -> None:
    """By the VAE's weights, not by where they lie; one that does not say which VAE it was is silent."""
    spec = ControlConfig(oracle="jpeg_size", thresholds=(1.0, 2.0), unit="bytes")
    backbone = load_backbone(str(tiny_pipeline))
    own = backbone.identities()["vae"].sha256
    for name, vae in (("own", own), ("other", "0" * 64), ("silent", None)):
        classifier = NoisedClassifier.new("size", spec, latent_shape=(4, 4, 4), base_model="their/model", vae=vae)
        classifier.save(tmp_path / name)
        sampler = ClassifierGuidance(noised_classifier=(str(tmp_path / name),), exponents=(1.0,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                sampler._classifier(0, str(tmp_path / name), torch.device("cpu"), backbone)
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == (name == "other")
        if texts:
            assert all(part in texts[0] for part in ("their/model", "000000000000…", own[:12], "classify --noised"))


def test_its_folders_travel_by_value(folder: Path) -> None:
    """To a host that does not have them; what is not a folder stays."""
    exact = ExactGaussian(GaussianReward(2.0, 0.5))
    sampler = ClassifierGuidance(noised_classifier=(str(folder), exact), exponents=(1.0, 1.0))
    assert sampler.folders == (str(folder),)
    assert sampler.reading(["/elsewhere"]) == dataclasses.replace(sampler, noised_classifier=("/elsewhere", exact))


def test_folders_are_put_into_the_order_of_the_controls() -> None:
    method = MethodConfig(name="classifier_guidance", noised_classifier=("b=/x", "a=/y"))
    ordered: Any = make_sampler(method, (1.0, 2.0), ["a", "b"])
    assert (ordered.controls, ordered.noised_classifier) == (("a", "b"), ("/y", "/x"))
    given: Any = make_sampler(method, (1.0, 2.0))
    assert (given.controls, given.noised_classifier) == (("b", "a"), ("/x", "/y"))
    with pytest.raises(ConfigError, match="has folders for b, a, and the controls are a"):
        make_sampler(method, (1.0,), ["a"])


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="classifier_guidance needs noised_classifier: NAME=FOLDER"):
        MethodConfig(name="classifier_guidance")
    with pytest.raises(ConfigError, match="'folder' is not NAME=VALUE"):
        MethodConfig(name="classifier_guidance", noised_classifier=("folder",))
    bench = Bench.of(_with_steps(gaussian(), 4))
    exact = ExactGaussian(GaussianReward(2.0, 0.5))
    with pytest.raises(ConfigError, match="a noised classifier for each control, got 1 for 2 controls"):
        bench.sample(ClassifierGuidance(noised_classifier=(exact,), exponents=(1.0, 1.0)), 2)
    with pytest.raises(ModelError, match=r"takes latents of shape \(B, 4, h, w\).*got \(2, 1\)"):
        bench.sample(ClassifierGuidance(noised_classifier=(str(folder),), exponents=(1.0,)), 2)
