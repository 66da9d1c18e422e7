"""The reward's numbers against finite differences and direct formulas, and what it refuses."""

from __future__ import annotations

import math
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.classifiers.networks import SmallCNN
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, ModelError, NonFiniteError, RewardError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModel, RewardModelSpec, load_reward_model
from tests.unit.rewards.small import DoubleDecoder, request, small_classifiers, small_model


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> RewardModel:
    return small_model(tiny_pipeline)


def test_log_probs_are_those_of_the_asked_classes(model: RewardModel) -> None:
    latents, prompts, labels, weights = request(7)
    answer = model.evaluate(latents, prompts, labels, weights)
    with torch.no_grad():
        images = model.decoder.decode(latents)
        for index, classifier in enumerate(small_classifiers()):
            of_all = classifier.eval().class_log_probs(images, prompts)
            for row in range(7):
                label = int(labels[row, index])
                null = label == classifier.spec.num_classes
                expected = 0.0 if null else float(of_all[row, label])
                assert float(answer.log_probs[row, index]) == pytest.approx(expected, abs=1e-6)
    assert answer.log_probs.dtype == torch.float32
    assert answer.cotangent is not None and answer.cotangent.dtype == torch.float32


def test_cotangent_is_the_derivative(tiny_pipeline: Path) -> None:
    decoder = DoubleDecoder(load_backbone(str(tiny_pipeline)).load_decoder().vae, chunk_size=2)
    with torch.no_grad():
        decoder.vae.decoder.conv_out.weight.mul_(0.2)
    model = RewardModel(decoder, small_classifiers()).double()
    latents, prompts, labels, weights = request(3)
    latents = latents.double()
    images = model.decoder.decode(latents)
    assert float(images.min()) > 0.01 and float(images.max()) < 0.99  # where the straight-through clamp is the identity

    def objective(points: Tensor) -> Tensor:
        """Σ_c w_c log p_c of each row, nulls left out, written without the model's own evaluate."""
        images = model.decoder.decode(points)
        total = torch.zeros(len(points), dtype=torch.float64)
        for index, classifier in enumerate(model.classifiers):
            of_all = classifier.class_log_probs(images, [prompts[row]] * len(points))
            if labels[row, index] < classifier.spec.num_classes:
                total += weights[row, index].double() * of_all[:, labels[row, index]]
        return total

    cotangent = model.evaluate(latents, prompts, labels, weights).cotangent
    assert cotangent is not None
    step = 1e-5
    directions = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row in range(3):
        with torch.no_grad():
            ahead, behind = (objective(latents[row] + sign * step * directions) for sign in (1, -1))
        slopes, differences = (directions * cotangent[row]).flatten(1).sum(1), (ahead - behind) / (2 * step)
        assert float((slopes - differences).norm() / differences.norm()) < 1e-6


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(model: RewardModel, tiny_pipeline: Path, chunk_size: int) -> None:
    arguments = request(8)
    expected, answer = model.evaluate(*arguments), small_model(tiny_pipeline, chunk_size).evaluate(*arguments)
    torch.testing.assert_close(answer.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer.cotangent, expected.cotangent, atol=1e-5, rtol=1e-4)


def test_memory_does_not_grow_with_the_batch(tiny_pipeline: Path) -> None:
    model = small_model(tiny_pipeline, chunk_size=2)
    earlier: list[weakref.ref[Tensor]] = []

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert len(output) <= 2
        assert not any(reference() is not None for reference in earlier), "an earlier chunk's graph is still alive"
        earlier.append(weakref.ref(output))

    model.decoder.vae.decoder.register_forward_hook(look)
    model.evaluate(*request(7))
    assert len(earlier) == 4


def test_weights_and_nulls(model: RewardModel) -> None:
    latents, prompts, labels, weights = request(6)

    def cotangent(labels: Tensor, weights: Tensor) -> Tensor:
        answer = model.evaluate(latents, prompts, labels, weights).cotangent
        assert answer is not None
        return answer

    first, second = weights.clone(), weights.clone()
    first[:, 1], second[:, 0] = 0, 0
    both = cotangent(labels, weights)
    torch.testing.assert_close(cotangent(labels, first) + cotangent(labels, second), both, atol=1e-6, rtol=1e-4)
    assert torch.equal(cotangent(labels, torch.zeros(6, 2)), torch.zeros_like(latents))
    null = torch.tensor([[4, 3]]).expand(6, 2)
    answer = model.evaluate(latents, prompts, null, torch.full((6, 2), math.nan))
    assert torch.equal(answer.log_probs, torch.zeros(6, 2))
    assert answer.cotangent is not None and torch.equal(answer.cotangent, torch.zeros_like(latents))


def test_always_frozen_and_in_eval_mode(model: RewardModel) -> None:
    arguments = request(4)
    before = model.evaluate(*arguments)
    assert model.train() is model and not any(module.training for module in model.modules())
    with torch.no_grad():
        again = model.evaluate(*arguments)
    assert torch.equal(before.log_probs, again.log_probs)
    assert before.cotangent is not None and again.cotangent is not None
    assert torch.equal(before.cotangent, again.cotangent)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_nonfinite_values_are_named(model: RewardModel, tiny_pipeline: Path) -> None:
    latents, prompts, labels, weights = request(6)
    latents[2, 0, 0, 0] = math.nan
    latents[4, 1, 1, 1] = math.inf
    with pytest.raises(NonFiniteError, match=r"latents are not finite for 2 of 6 samples \(positions 2, 4 of"):
        model.evaluate(latents, prompts, labels, weights)
    with pytest.raises(NonFiniteError, match="latents are not finite"):
        model.decode(latents)
    latents, prompts, labels, weights = request(6)
    weights[1, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"weights are not finite for 1 of 6 samples \(positions 1 of"):
        model.evaluate(latents, prompts, labels, weights)
    broken = small_model(tiny_pipeline)
    with torch.no_grad():
        broken.classifiers[1].head.bias[0] = math.nan
    _, prompts, labels, weights = request(6)
    with pytest.raises(NonFiniteError, match=r"log-probabilities are not finite .*positions 0, 2, 3, 5 of"):
        broken.evaluate(latents, prompts, labels, weights)


def test_requests_that_do_not_fit(model: RewardModel) -> None:
    latents, prompts, labels, weights = request(4)
    with pytest.raises(RewardError, match="4 latents came with 3 prompts"):
        model.evaluate(latents, prompts[:3], labels, weights)
    with pytest.raises(RewardError, match=r"weights have shape \(4, 1\); expected \(4, 2\).*'jpeg_size', 'colour"):
        model.evaluate(latents, prompts, labels, weights[:, :1])
    with pytest.raises(RewardError, match="expected integers"):
        model.evaluate(latents, prompts, labels.float(), weights)
    with pytest.raises(RewardError, match=r"latents have shape \(4, 64\)"):
        model.evaluate(latents.flatten(1), prompts, labels, weights)
    labels[3, 1] = 7
    with pytest.raises(ConfigError, match="label 7 of control 'colourfulness' is out of range; expected 0 to 2, or 3"):
        model.evaluate(latents, prompts, labels, weights)
    with pytest.raises(ConfigError, match="one classifier for each control"):
        RewardModel(model.decoder, small_classifiers()[:1] * 2)


def test_class_log_probs_of_latents_and_of_images(model: RewardModel) -> None:
    latents, prompts, labels, weights = request(5)
    of_latents = model.class_log_probs(latents, prompts)
    assert {name: tuple(values.shape) for name, values in of_latents.items()} == {
        "jpeg_size": (5, 4),
        "colourfulness": (5, 3),
    }
    for values in of_latents.values():
        torch.testing.assert_close(values.exp().sum(1), torch.ones(5))
    asked = model.evaluate(latents, prompts, labels, weights).log_probs
    row = 1  # its first label is not null
    assert float(of_latents["jpeg_size"][row, labels[row, 0]]) == pytest.approx(float(asked[row, 0]), abs=1e-6)

    images = model.decode(latents)
    assert images.dtype == torch.uint8 and tuple(images.shape) == (5, 32, 32, 3)
    of_images = model.class_log_probs(images, prompts)
    for name, values in of_images.items():  # half a grey level apart
        assert 0 < float((values - of_latents[name]).abs().max()) < 0.1
    with torch.no_grad():
        red = model.decoder.decode(latents)[0, 0]
    assert float((images[0, :, :, 0] / 255 - red).abs().max()) <= 0.5 / 255 + 1e-6


def test_local_rewards_are_the_model(model: RewardModel) -> None:
    rewards, arguments = LocalRewards(model), request(4)
    assert rewards.differentiable and rewards.controls == {"jpeg_size": 4, "colourfulness": 3}
    answer, expected = rewards.submit(*arguments).result(timeout_s=1), model.evaluate(*arguments)
    assert answer.cotangent is not None and expected.cotangent is not None
    assert torch.equal(answer.log_probs, expected.log_probs) and torch.equal(answer.cotangent, expected.cotangent)
    assert torch.equal(rewards.decode(arguments[0]), model.decode(arguments[0]))


def test_a_spec_travels_and_loads_the_model(tiny_pipeline: Path, tmp_path: Path) -> None:
    network = SmallCNN(3)
    control = ControlConfig(classes=("low", "middle", "high"))
    fitted = ImageClassifier(network, kind="cnn", arguments={}, control="size", spec=control, temperature=2.0)
    fitted.eval().save(tmp_path)
    spec = RewardModelSpec(base_model=str(tiny_pipeline), classifiers={"size": str(tmp_path)}, decode_chunk_size=2)
    spec = pickle.loads(pickle.dumps(spec))
    model = load_reward_model(spec)
    latents, prompts, _, weights = request(3)
    answer = model.evaluate(latents, prompts, torch.tensor([[2], [0], [3]]), weights[:, :1])
    with torch.no_grad():
        of_all = torch.log_softmax(network(model.decoder.decode(latents), None) / 2.0, dim=1)
    expected = torch.stack([of_all[0, 2], of_all[1, 0], torch.tensor(0.0)])[:, None]
    torch.testing.assert_close(answer.log_probs, expected, atol=1e-5, rtol=0)

    renamed = RewardModelSpec(base_model=str(tiny_pipeline), classifiers={"colour": str(tmp_path)})
    with pytest.raises(ModelError, match="was fitted for control 'size', but it is given for 'colour'"):
        load_reward_model(renamed)
