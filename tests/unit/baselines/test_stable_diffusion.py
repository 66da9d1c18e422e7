"""Baselines on a Stable Diffusion pipeline with classifier-free guidance: gradients through all of it, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ctrl_ray
from ctrl_ray.baselines.dps import DPS
from ctrl_ray.baselines.mpgd import MPGD
from ctrl_ray.baselines.prediction import predict
from ctrl_ray.baselines.tilt import log_tilt, log_tilt_and_gradient
from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.config import ControlConfig, MethodConfig, SamplerConfig
from ctrl_ray.diffusion.flow import FlowKernel
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluate import EvaluateOptions
from ctrl_ray.gradients.rollout import keyed_noise
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import load_policy_on
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModel
from ctrl_ray.sample import SampleConfig, main
from tests.classifiers import save_classifier
from tests.tiny import LATENT_SHAPE

CONTROLS = {
    "size": ControlConfig(classes=("low", "mid", "high")),
    "hue": ControlConfig(classes=("warm", "cold")),
}
PROMPTS = ("a red circle", "a blue cross")
EXPONENTS = (3.0, 0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    for name, control in CONTROLS.items():
        save_classifier(root / name, name, control)
    return {name: root / name for name in CONTROLS}


class Bench:
    """The tiny pipeline, its classifiers, and two images that ask for both controls and for one."""

    def __init__(self, pipeline: Path, folders: dict[str, Path], num_steps: int = 4) -> None:
        backbone = load_backbone(str(pipeline))
        counts = {name: control.num_classes for name, control in CONTROLS.items()}
        self.policy: ControlledPolicy = load_policy_on(backbone, counts, lora=None).eval()
        self.kernel = backbone.make_kernel(SamplerConfig(num_steps=num_steps, reference_steps=1))
        self.classifiers = [ImageClassifier.from_pretrained(folder) for folder in folders.values()]
        self.decoder = backbone.load_decoder()
        self.rewards = LocalRewards(RewardModel(self.decoder, self.classifiers))
        labels = torch.tensor([[2, 0], [1, 2]])  # hue of the second: null
        self.inputs = Inputs(backbone.load_encoder().encode(PROMPTS), labels, Guidance(7.5))

    def objective(self, latents: Tensor, step_index: int) -> Tensor:
        """Σ over images of ℓ(x̂_0(x)), written out, differentiable."""
        time = self.kernel.time(step_index)
        signal, level = self.kernel.scales(step_index)
        predicted = self.policy(latents, time, self.inputs, reference=True).prediction
        is_flow = isinstance(self.kernel, FlowKernel)
        x_0 = latents - level * predicted if is_flow else (latents - level * predicted) / signal
        images = self.decoder.decode(x_0)
        size, hue = (classifier.class_log_probs(images, PROMPTS) for classifier in self.classifiers)
        return 3.0 * (size[0, 2] + size[1, 1]) + 0.5 * hue[0, 0]

    def sample(self, sampler: Any) -> Any:
        noise = keyed_noise(0, 0, [0, 1], LATENT_SHAPE, self.kernel.num_steps)
        return sampler(self.policy, self.kernel, self.inputs, noise, self.rewards, reference=True, with_kl=True)


@pytest.fixture(scope="module")
def bench(tiny_pipeline: Path, folders: dict[str, Path]) -> Bench:
    return Bench(tiny_pipeline, folders)


@pytest.mark.parametrize("family", ["tiny_pipeline", "tiny_xl_pipeline", "tiny_3_pipeline", "tiny_aura_flow_pipeline"])
def test_the_gradient_is_that_of_the_whole_computation(
    family: str, folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """Denoiser with both branches of the guidance, VAE, classifiers, exponents; a null label asks for nothing. Of noise and of
    a flow's velocity."""
    bench = Bench(request.getfixturevalue(family), folders)
    latents = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    prediction = predict(bench.policy, bench.kernel, 1, latents, bench.inputs, with_graph=True)
    tilts, gradient = log_tilt_and_gradient(bench.rewards, prediction.denoised.x_0, bench.inputs, EXPONENTS)
    found = prediction.pull_back(gradient)
    leaf = latents.clone().requires_grad_(True)
    objective = bench.objective(leaf, 1)
    (expected,) = torch.autograd.grad(objective, leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert float(tilts.sum()) == pytest.approx(float(objective.detach()), rel=1e-5)
    again = log_tilt(bench.rewards, prediction.detached().x_0, bench.inputs, EXPONENTS)
    torch.testing.assert_close(again, tilts, rtol=1e-5, atol=1e-6)


def test_a_step_moves_by_the_textbook_amount(bench: Bench) -> None:
    """DPS at eta 1: w (1 − ᾱ/ᾱ') / √(ᾱ/ᾱ') ∇ℓ from the pre-trained mean; its KL is half its square over s²."""
    path = bench.sample(DPS(exponents=EXPONENTS, scale=0.7))
    start = path.latents[0].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(bench.objective(start, 0), start)
    kept = bench.kernel.scales(0).signal / bench.kernel.next_scales(0).signal
    push = 0.7 * (1 - kept**2) / kept * gradient
    kl = push.flatten(1).square().sum(1) / (2 * bench.kernel.std(0) ** 2)
    torch.testing.assert_close(path.kl_per_step[:, 0], kl, rtol=1e-3, atol=0)
    assert torch.equal(path.kl_per_step[:, 3], torch.zeros(2))  # the reference's step


def test_a_step_that_is_measured_by_the_prompt_s_guidance(bench: Bench) -> None:
    """MPGD's step has the size ρ · rms(w (ε_c − ε_∅)) for each image, and its direction is the gradient's."""
    start = keyed_noise(0, 0, [0, 1], LATENT_SHAPE, 4)(0)
    time, plain = bench.kernel.time(0), Guidance(1.0)
    conditional = bench.policy(start, time, Inputs(bench.inputs.condition, bench.inputs.labels, plain), reference=True)
    combined = bench.policy(start, time, bench.inputs, reference=True).prediction  # ε_∅ + 7.5 (ε_c − ε_∅)
    pull = 7.5 / 6.5 * (combined - conditional.prediction)
    prediction = predict(bench.policy, bench.kernel, 0, start, bench.inputs)
    sampler = MPGD(exponents=EXPONENTS, scale=0.2, step_size="guidance")
    call: Any = SimpleNamespace(rewards=bench.rewards, inputs=bench.inputs)
    mean = sampler.guided_mean(prediction, call)
    shift = ((mean - prediction.step.mean) / bench.kernel.next_scales(0).signal).flatten(1)
    torch.testing.assert_close(shift.square().mean(1), 0.04 * pull.flatten(1).square().mean(1), rtol=1e-3, atol=0)
    _, gradient = log_tilt_and_gradient(bench.rewards, prediction.denoised.x_0, bench.inputs, EXPONENTS)
    cosine = torch.nn.functional.cosine_similarity(shift, gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "family"), [("dps", "tiny_pipeline"), ("tds", "tiny_pipeline"), ("dps", "tiny_3_pipeline")]
)
def test_the_command_and_the_pipeline_draw_the_same(
    name: Any, family: str, request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever the batch; the manifest says the method and what was given."""
    base: Path = request.getfixturevalue(family)
    argv = ["--base-model", str(base), "--control", "size=high", "--exponent", "size=2", "--num-steps", "3"]
    argv += ["--classifier", f"size={folders['size']}", "--prompt", *PROMPTS, "--num-images", "3"]
    argv += ["--method.name", name, "--method.scale", "0.5"]
    for batch_size in ("4", "1"):
        assert main([*argv, "--batch-size", batch_size, "--output-dir", str(tmp_path / batch_size)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "1" / "manifest.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == [{"name": name, "scale": 0.5}] * 3
    pictures = [np.asarray(Image.open(tmp_path / batch / "00001.png")).astype(int) for batch in ("4", "1")]
    pipeline = ctrl_ray.ControlledPipeline.from_base_model(
        str(base), classifiers={"size": folders["size"]}, exponents={"size": 2.0}
    )
    pipeline.set_progress_bar_config(disable=True)
    sampled = pipeline(
        PROMPTS[1],
        controls={"size": "high"},
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(rows[1]["seed"]),
        method=ctrl_ray.MethodConfig(name=name, scale=0.5),
    )
    for picture in pictures:
        assert np.abs(picture - np.asarray(sampled.images[0]).astype(int)).max() <= 1
    assert (sampled.trajectory.kl_per_step is not None) == (name == "dps")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adapter": "a"}, "method dps steers the pre-trained model by itself, but --adapter is given too"),
        ({"base_model": "b", "base": True}, "but --base is given too"),
        ({"base_model": "b", "candidates": 4}, "but --candidates is given too"),
        ({}, "no adapter is given; expected --adapter RUN/adapter"),
    ],
)
def test_what_contradicts_a_method_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleConfig(prompt=PROMPTS, method=MethodConfig(name="dps"), **options)


def test_a_method_without_a_classifier_or_a_control_is_one_message(
    tiny_pipeline: Path, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base-model", str(tiny_pipeline), "--prompt", PROMPTS[0], "--method.name", "dps"]
    argv += ["--output-dir", str(tmp_path / "out")]
    assert main([*argv, "--classifier", f"size={folders['size']}"]) == 2
    assert "method dps steers by classifiers, but no control is asked for" in capsys.readouterr().err
    assert main([*argv, "--control", "size=high"]) == 2
    assert "the pre-trained model has no control 'size=high'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base_model": "b"}, "--base-model judges a method that steers it, but got method.name plain"),
        ({"adapter": "a", "method": MethodConfig(name="smc")}, "--method.name belongs to a method on a base model"),
        ({"adapter": "a", "exponent": ("size=2",)}, "--exponent belongs to a method on a base model"),
        ({"adapter": "a", "base_model": "b"}, "give one of --adapter RUN/adapter"),
    ],
)
def test_what_evaluate_cannot_judge_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateOptions(**options)
