"""Label gains: nothing without a label, an ordinary LoRA for each class, and the way to disk and back."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ctrl_ray.config import AdapterKind, ControlConfig, LoraConfig, SamplerConfig, TrainConfig
from ctrl_ray.diffusion.steps import NO_GUIDANCE, Guidance
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.gradients.rollout import keyed_noise, rollout
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.adapter import load_into_policy, make_adapter_info, read_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.class_loras import class_file
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.configs import EVERY_LAYER
from tests.gradients import full_pass
from tests.policies import make_policy, moved

CONTROLS = {"size": ControlConfig(classes=("a", "b", "c")), "hue": ControlConfig(thresholds=(3.0,), unit="x")}
LORA = LoraConfig(rank=2, alpha=6.0, target_modules=EVERY_LAYER)
"""Convolutions, attention, time projections; alpha is not the rank."""
PROMPTS = ["a red circle", "a blue cross"]
SAMPLER = SamplerConfig(num_steps=3, reference_steps=1)


def _policy(folder: str, kind: AdapterKind = "gains", names: tuple[str, ...] = ("size", "hue"), **kwargs: Any):
    counts = {name: CONTROLS[name].num_classes for name in names}
    return make_policy(folder, counts, lora=LORA, kind=kind, **kwargs)


def _move(policy: ControlledPolicy) -> ControlledPolicy:
    return moved(policy, by=0.05, seed=1)


def _save(folder: Path, policy: ControlledPolicy, base: str, sampler: SamplerConfig = SAMPLER) -> Path:
    info = make_adapter_info(
        base_model=base,
        base_revision=None,
        controls={name: CONTROLS[name] for name in policy.controls.names},
        sampler=sampler,
        lora=LORA,
        kind=policy.kind,
        training={},
    )
    return save_adapter(folder, policy, info)


@functools.cache
def _given(folder: str) -> tuple[Tensor, Tensor, Any]:
    condition = load_backbone(folder).load_encoder().encode(PROMPTS)
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(500), condition


def _predict(
    policy: ControlledPolicy, folder: str, labels: Any, guidance: Guidance = NO_GUIDANCE, *, reference: bool = False
) -> Tensor:
    latents, time, condition = _given(folder)
    inputs = Inputs(condition, torch.as_tensor(labels), guidance)
    return policy(latents, time, inputs, reference=reference).prediction


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@torch.no_grad()
def test_a_sample_without_labels_is_the_pre_trained_models_bit_for_bit(tiny_pipeline: str, precision: Any) -> None:
    """At the start whatever the labels; later for a null row beside a labelled one, guided or not; a label alone moves its own
    sample only."""
    policy = _policy(tiny_pipeline, precision=precision)
    null, mixed = [[3, 2], [3, 2]], [[3, 2], [1, 0]]
    guidances = (Guidance(), Guidance(7.5), Guidance(7.5, 2.0))
    plain = [_predict(policy, tiny_pipeline, null, guidance, reference=True) for guidance in guidances]
    assert torch.equal(_predict(policy, tiny_pipeline, mixed), plain[0])
    _move(policy)
    for guidance, expected in zip(guidances, plain, strict=True):
        assert torch.equal(_predict(policy, tiny_pipeline, null, guidance), expected)
        found = _predict(policy, tiny_pipeline, mixed, guidance)
        assert torch.equal(found[0], expected[0]) and (found[1] - expected[1]).abs().max() > 1e-3


def test_null_rows_get_no_gradient_and_labels_move_all_that_is_trained(tiny_pipeline: str) -> None:
    """After a backward: zero for every null row, not zero for A, B and the rows of the labels asked for."""
    policy = _move(_policy(tiny_pipeline))
    _predict(policy, tiny_pipeline, [[0, 2], [1, 1]]).square().sum().backward()
    for name, parameter in policy.trainable_parameters().items():
        gradient = parameter.grad
        assert gradient is not None
        if "tables." in name:
            assert not gradient[-1].any()
            assert gradient[:2].any(1).tolist() == ([True, True] if "size" in name else [False, True])
        else:
            assert gradient.any(), name


@pytest.mark.full
def test_recomputed_activations_give_the_same_gradient(tiny_pipeline: str) -> None:
    """Gradient checkpointing re-enters the labels of its own forward, though another came between."""
    gradients = []
    for checkpointed in (False, True):
        policy = _move(_policy(tiny_pipeline))
        if checkpointed:
            policy.enable_gradient_checkpointing()
        output = _predict(policy, tiny_pipeline, [[0, 2], [1, 1]])
        _predict(policy, tiny_pipeline, [[2, 0], [2, 0]], reference=True)
        output.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["gains", pytest.param("both", marks=pytest.mark.full)])
def test_graphs_kept_by_the_rollout_give_the_same_gradient(tiny_pipeline: str, kind: AdapterKind) -> None:
    """float64: 1e-9 of those computed again; with gains alone one forward is policy and reference, with their KL."""
    policy = _move(_policy(tiny_pipeline, kind)).double()
    inputs, kernel = (
        Inputs(_given(tiny_pipeline)[2], torch.tensor([[0, 2], [3, 1]])),
        policy.backbone.make_kernel(SAMPLER),
    )
    noise = keyed_noise(0, 0, [0, 1], policy.latent_shape, kernel.num_steps)
    found, called = [], []
    policy.denoiser.register_forward_hook(lambda *_: called.append(None))
    for kept in (False, True):
        policy.zero_grad()
        called.clear()
        trajectory = rollout(policy, kernel, inputs, lambda k: noise(k).double(), with_graphs=kept)
        full_pass(policy, kernel, trajectory, torch.ones_like(trajectory.clean_latents), torch.ones(2))
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()]))
        a_step = 3 if not kept else 1 if kind == "gains" else 2
        assert len(called) == 2 * a_step + 2  # the third step is the reference's: once on each way
    assert (found[1] - found[0]).norm() < 1e-9 * found[0].norm()


@torch.no_grad()
def test_the_adapters_scale_is_that_of_its_update(tiny_pipeline: str) -> None:
    """0: the pre-trained model; a half: as a table of half the gains."""
    policy, halved = _move(_policy(tiny_pipeline)), _move(_policy(tiny_pipeline))
    labels = [[0, 1], [2, 2]]
    for name, parameter in halved.trainable_parameters().items():
        if "tables." in name:
            parameter.data /= 2
    policy.scale_adapter(0.5)
    torch.testing.assert_close(_predict(policy, tiny_pipeline, labels), _predict(halved, tiny_pipeline, labels))
    policy.scale_adapter(0.0)
    assert torch.equal(_predict(policy, tiny_pipeline, labels), _predict(policy, tiny_pipeline, labels, reference=True))


@torch.no_grad()
def test_the_unconditional_branch_may_keep_its_class(tiny_pipeline: str) -> None:
    """null_branch 'class': u(label) + w (c(label) − u(label)), 'pre_trained': u without a label."""
    policy, labels, null = _move(_policy(tiny_pipeline)), torch.tensor([[0, 1], [2, 2]]), torch.tensor([[3, 2], [3, 2]])
    latents, time, _ = _given(tiny_pipeline)
    empty = load_backbone(tiny_pipeline).load_encoder().encode(["", ""])
    labelled = _predict(policy, tiny_pipeline, labels)
    for branch, of in (("class", labels), ("pre_trained", null)):
        without = policy(latents, time, Inputs(empty, of), reference=False).prediction
        found = _predict(policy, tiny_pipeline, labels, Guidance(2.0, None, branch))
        torch.testing.assert_close(found, without + 2.0 * (labelled - without), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gains", pytest.param("both", marks=pytest.mark.full)])
@torch.no_grad()
def test_an_adapter_comes_back_as_it_was(tiny_pipeline: str, tmp_path: Path, kind: AdapterKind) -> None:
    """Predictions bit for bit, its kind and its unconditional branch; only gains have files of classes."""
    policy = _move(_policy(tiny_pipeline, kind))
    _save(tmp_path, policy, tiny_pipeline, SamplerConfig(num_steps=3, null_branch="class"))
    info, other = read_adapter_info(tmp_path), _policy(tiny_pipeline, kind)
    assert (info.kind, info.sampler.null_branch) == (kind, "class")
    load_into_policy(tmp_path, other)
    labels = [[0, 2], [1, 1]]
    assert torch.equal(_predict(policy, tiny_pipeline, labels), _predict(other, tiny_pipeline, labels))
    assert (tmp_path / "classes").is_dir() == (kind == "gains")
    assert (tmp_path / "control_embeddings.safetensors").is_file() == (kind == "both")


@torch.no_grad()
def test_a_second_control_starts_without_effect_beside_the_first(tiny_pipeline: str, tmp_path: Path) -> None:
    """The first keeps what it learned; another kind or rank is refused with the remedy."""
    policy = _move(_policy(tiny_pipeline, names=("size",)))
    _save(tmp_path, policy, tiny_pipeline)
    wider = _policy(tiny_pipeline)
    load_into_policy(tmp_path, wider)
    alone, beside = _predict(policy, tiny_pipeline, [[0], [1]]), _predict(wider, tiny_pipeline, [[0, 0], [1, 1]])
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match=r"kind 'gains'.*set adapter.kind to gains"):
        load_into_policy(tmp_path, _policy(tiny_pipeline, "embedding"))
    config = TrainConfig(base_model=str(tiny_pipeline), controls=CONTROLS, init_adapter=str(tmp_path))
    with pytest.raises(ConfigError, match=r"of kind 'gains'; go on with --adapter.kind gains"):
        build_policy(config)
    other = make_policy(tiny_pipeline, {"size": 3}, lora=LoraConfig(rank=3), kind="gains")
    with pytest.raises(ModelError, match=r"same lora.rank"):
        load_into_policy(tmp_path, other)


@torch.no_grad()
def test_format_version_1_still_loads(tiny_pipeline: str, tmp_path: Path) -> None:
    """It knew neither kinds nor another unconditional branch."""
    policy = _move(_policy(tiny_pipeline, "embedding"))
    _save(tmp_path, policy, tiny_pipeline)
    content = json.loads((tmp_path / "adapter.json").read_text())
    assert content.pop("kind") == "embedding" and content.pop("null_branch") == "pre_trained"
    (tmp_path / "adapter.json").write_text(json.dumps({**content, "format_version": 1}))
    other = _policy(tiny_pipeline, "embedding")
    info = load_into_policy(tmp_path, other)
    assert (info.kind, info.sampler.null_branch) == ("embedding", "pre_trained")
    assert torch.equal(
        _predict(policy, tiny_pipeline, [[0, 2], [1, 1]]), _predict(other, tiny_pipeline, [[0, 2], [1, 1]])
    )
    (tmp_path / "adapter.json").write_text(json.dumps({**content, "kind": "spells", "null_branch": "class"}))
    with pytest.raises(ModelError, match=r"kind 'spells'; this ctrl_ray knows gains, embedding, both"):
        read_adapter_info(tmp_path)


@pytest.mark.full
@torch.no_grad()
def test_a_class_is_a_lora_that_diffusers_loads(tiny_pipeline: str, tmp_path: Path) -> None:
    """One file a class; two controls are two files loaded together. Predictions of the stock denoiser are the policy's."""
    policy = _move(_policy(tiny_pipeline))
    _save(tmp_path, policy, tiny_pipeline)
    files = sorted(file.name for file in (tmp_path / "classes").iterdir())
    assert files == [
        *(class_file("hue", label) for label in range(2)),
        *(class_file("size", label) for label in range(3)),
    ]
    latents, time, condition = _given(tiny_pipeline)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.load_lora_weights(tmp_path / "classes", weight_name="size=2.safetensors", adapter_name="size")
    pipe.load_lora_weights(tmp_path / "classes", weight_name="hue=0.safetensors", adapter_name="hue")
    for names, labels in ((["size"], [2, 2]), (["hue"], [3, 0]), (["size", "hue"], [2, 0])):
        pipe.set_adapters(names)
        theirs = pipe.unet(latents, time, encoder_hidden_states=condition.tensors["text"]).sample
        ours = _predict(policy, tiny_pipeline, [labels, labels])
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        assert (ours - _predict(policy, tiny_pipeline, [labels, labels], reference=True)).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.5])
@torch.no_grad()
def test_folded_gains_predict_the_same_for_one_set_of_labels(tiny_pipeline: str, scale: float) -> None:
    """To float32's rounding, for linear layers and convolutions, with two controls, of which either may be null; no layer then
    adds gains. What is not that tensor of labels, the reference, and all outside of the context is as it was, bit for bit."""
    policy = _move(_policy(tiny_pipeline))
    policy.scale_adapter(scale)
    latents, time, condition = _given(tiny_pipeline)
    reference = _predict(policy, tiny_pipeline, [[3, 2], [3, 2]], reference=True)
    added: list[None] = []
    for module in policy.denoiser.modules():
        if hasattr(module, "label_gains"):
            module.label_gains.register_forward_hook(lambda *_: added.append(None))
    for row in ([1, 0], [2, 1], [0, 2], [3, 1]):
        inputs = Inputs(condition, torch.tensor([row, row]))
        expected = policy(latents, time, inputs, reference=False).prediction
        with policy.folded(inputs):
            added.clear()
            found = policy(latents, time, inputs, reference=False).prediction
            assert not added
            assert torch.equal(policy(latents, time, inputs, reference=True).prediction, reference)
            other = [[2, 0], [2, 0]] if row != [2, 0] else [[1, 0], [1, 0]]
            beside = _predict(policy, tiny_pipeline, other)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (expected - reference).abs().max() > 1e-3
        assert torch.equal(beside, _predict(policy, tiny_pipeline, other))
        assert torch.equal(policy(latents, time, inputs, reference=False).prediction, expected)


@pytest.mark.full
@torch.no_grad()
def test_compiled_blocks_follow_the_labels(tiny_pipeline: str) -> None:
    """The reference, two sets of labels and folded weights, in turns, by torch's own operations: bit for bit as without."""
    latents, time, condition = _given(tiny_pipeline)
    plain, compiled = _move(_policy(tiny_pipeline)), _move(_policy(tiny_pipeline))
    compiled.compile_blocks("aot_eager")
    mixed, same = (Inputs(condition, torch.tensor(rows)) for rows in ([[1, 0], [0, 2]], [[2, 1], [2, 1]]))
    for inputs, reference in ((mixed, False), (mixed, True), (same, False), (mixed, False)):
        expected = plain(latents, time, inputs, reference=reference).prediction
        assert torch.equal(compiled(latents, time, inputs, reference=reference).prediction, expected)
        with plain.folded(inputs), compiled.folded(inputs):
            expected = plain(latents, time, inputs, reference=reference).prediction
            assert torch.equal(compiled(latents, time, inputs, reference=reference).prediction, expected)


def test_gains_are_not_folded_where_that_would_change_what_is_computed(tiny_pipeline: str) -> None:
    """Samples of different labels, a graph, guidance, weights of 16 bits, other kinds: bit for bit as without."""
    latents, time, condition = _given(tiny_pipeline)
    same, mixed = torch.tensor([[1, 0], [1, 0]]), torch.tensor([[1, 0], [0, 0]])
    cases: list[tuple[dict[str, Any], Tensor, Guidance, bool]] = [
        ({}, mixed, NO_GUIDANCE, False),
        ({}, same, NO_GUIDANCE, True),
        ({}, same, Guidance(3.0), False),
        ({"precision": "bf16"}, same, NO_GUIDANCE, False),
        ({"kind": "embedding"}, same, NO_GUIDANCE, False),
    ]
    for options, labels, guidance, with_graph in cases:
        policy = _move(_policy(tiny_pipeline, **options))
        inputs = Inputs(condition, labels, guidance)
        with torch.set_grad_enabled(with_graph):
            expected = policy(latents, time, inputs, reference=False).prediction
            with policy.folded(inputs):
                found = policy(latents, time, inputs, reference=False).prediction
        assert torch.equal(found, expected)
        assert found.requires_grad == with_graph


@pytest.mark.parametrize("guidance_scale", [1.0, pytest.param(3.0, marks=pytest.mark.full)])
def test_a_stock_pipeline_draws_our_images(
    tiny_pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance_scale: float
) -> None:
    """By the lines of the adapter's README, with the same generators: to 1e-4 of [0, 1]."""
    sampler = SamplerConfig(num_steps=3, reference_steps=1, guidance_scale=guidance_scale, null_branch="class")
    _save(tmp_path, _move(_policy(tiny_pipeline)), str(tiny_pipeline), sampler)
    ours = ControlledPipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "README.md").read_text()
    code = text.split("```python")[1].split("```")[0].replace("size=0", "size=1")
    setup, _, call = code.partition("image = ")
    names: dict[str, Any] = {"PROMPTS": PROMPTS, "generators": _generators()}
    exec(setup, names)
    names["pipe"].set_progress_bar_config(disable=True)
    call = (
        call.strip()
        .removesuffix("[0]")
        .replace('pipe("PROMPT"', 'pipe(PROMPTS, generator=generators, output_type="np"')
    )
    found = eval(call, names)
    expected = ours(PROMPTS, controls={"size": 1}, generator=_generators(), output_type="np").images
    plain = ours(PROMPTS, generator=_generators(), output_type="np").images
    assert abs(found - expected).max() < 1e-4 < abs(plain - expected).max()
    assert ("what a stock pipeline does" in text) == (guidance_scale != 1.0)


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (11, 12)]


def test_layers_that_gains_cannot_adapt_are_refused(tiny_pipeline: str) -> None:
    """By the layers' names, before anything is trained."""
    with pytest.raises(ConfigError, match=r"lora.target_modules \['nowhere'\] are not in this denoiser"):
        make_policy(tiny_pipeline, {"size": 3}, lora=LoraConfig(target_modules=("nowhere",)), kind="gains")
