"""Policy against reference, and the adapter's way to disk and back."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.diffusion.steps import NO_GUIDANCE, Guidance
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import load_into_policy, make_adapter_info, read_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.configs import EVERY_LAYER
from tests.policies import make_policy

RANK_2 = LoraConfig(rank=2)
CONTROLS = {"size": ControlConfig(classes=("a", "b", "c")), "hue": ControlConfig(thresholds=(3.0,), unit="x")}


def _policy(folder: str, lora: LoraConfig | None = RANK_2, controls: dict | None = None) -> ControlledPolicy:
    counts = {name: c.num_classes for name, c in (controls or CONTROLS).items()}
    return make_policy(folder, counts, lora=lora)


@functools.cache
def _inputs(folder: str) -> tuple:
    condition = load_backbone(folder).load_encoder().encode(["a red circle", "a blue cross"])
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor(500), condition, torch.tensor([[0, 1], [2, 2]])


def _predict(policy: ControlledPolicy, given: tuple, guidance: Guidance = NO_GUIDANCE, *, reference: bool) -> Tensor:
    latents, time, condition, labels = given
    return policy(latents, time, Inputs(condition, labels, guidance), reference=reference).prediction


def _perturb(policy: ControlledPolicy) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    for table in policy.controls.tables.values():
        table.weight.data[-1] = 0


@pytest.mark.parametrize("lora", [LoraConfig(rank=2), None])
def test_policy_equals_reference_bit_for_bit_at_initialisation(tiny_pipeline: str, lora: LoraConfig | None) -> None:
    """Whatever the labels and the guidance; and no longer after the parameters moved."""
    policy = _policy(tiny_pipeline, lora)

    def predictions() -> list[list[torch.Tensor]]:
        with torch.no_grad():
            return [
                [_predict(policy, _inputs(tiny_pipeline), guidance, reference=r) for r in (False, True)]
                for guidance in (Guidance(), Guidance(7.5), Guidance(7.5, 2.0))
            ]

    at_first = predictions()
    _perturb(policy)
    for (ours, theirs), (moved, unmoved) in zip(at_first, predictions(), strict=True):
        assert torch.equal(ours, theirs) and torch.equal(unmoved, theirs)
        assert (moved - ours).abs().max() > 1e-3


def test_labels_act_only_through_their_tables(tiny_pipeline: str) -> None:
    """A null label equals no label; a label moves its own sample only; guidance drops it in the other branch, and with a scale
    of the label alone that branch keeps the prompt."""
    policy = _policy(tiny_pipeline)
    latents, time, condition, labels = _inputs(tiny_pipeline)
    policy.controls.tables["size"].weight.data[0] = 0.3
    null = policy.controls.null(2)
    with torch.no_grad():
        base = _predict(policy, (latents, time, condition, null), reference=False)
        labelled = _predict(policy, (latents, time, condition, labels), reference=False)
        guided = _predict(policy, (latents, time, condition, labels), Guidance(2.0), reference=False)
        of_label = _predict(policy, (latents, time, condition, labels), Guidance(1.0, 3.0), reference=False)
        uncond = load_backbone(tiny_pipeline).load_encoder().encode(["", ""])
        null_prediction = _predict(policy, (latents, time, uncond, null), reference=True)
    assert (labelled[0] - base[0]).abs().max() > 1e-3
    torch.testing.assert_close(labelled[1], base[1])
    torch.testing.assert_close(guided, null_prediction + 2.0 * (labelled - null_prediction), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_label, base + 3.0 * (labelled - base), rtol=1e-4, atol=1e-5)


def test_samples_may_have_times_of_their_own(tiny_pipeline: str) -> None:
    """(B,) timesteps: each sample is predicted as if its own were the only one."""
    policy = _policy(tiny_pipeline)
    _perturb(policy)
    latents, _, condition, labels = _inputs(tiny_pipeline)
    with torch.no_grad():
        both = _predict(policy, (latents, torch.tensor([700, 30]), condition, labels), reference=False)
        for row, time in enumerate((700, 30)):
            one = _predict(policy, (latents, torch.tensor(time), condition, labels), reference=False)
            torch.testing.assert_close(both[row], one[row], rtol=1e-4, atol=1e-5)


def test_bfloat16_backbone_keeps_trainables_in_float32(tiny_pipeline: str) -> None:
    """Policy = reference at initialisation in bf16 too, with float32 LoRA, tables and outputs."""
    policy = make_policy(tiny_pipeline, {"size": 3}, lora=LoraConfig(rank=2), precision="bf16")
    latents, time, condition, labels = _inputs(tiny_pipeline)
    with torch.no_grad():
        outputs = [_predict(policy, (latents, time, condition, labels[:, :1]), reference=r) for r in (False, True)]
    assert torch.equal(*outputs) and outputs[0].dtype == torch.float32
    assert {p.dtype for p in policy.trainable_parameters().values()} == {torch.float32}


def _info(folder: str, lora: LoraConfig | None):
    return make_adapter_info(
        base_model=folder,
        base_revision=None,
        controls=CONTROLS,
        sampler=SamplerConfig(num_steps=7),
        lora=lora,
        training={"kl_coef": 1.0},
    )


@pytest.mark.parametrize("lora", [LoraConfig(rank=2), LoraConfig(rank=2, alpha=6.0), None])
def test_adapter_round_trip(tiny_pipeline: str, tmp_path: Path, lora: LoraConfig | None) -> None:
    """Saved and loaded, an adapter gives the same predictions bit for bit, and its facts come back."""
    policy, info = _policy(tiny_pipeline, lora), _info(tiny_pipeline, lora)
    _perturb(policy)
    save_adapter(tmp_path / "adapter", policy, info)
    other = _policy(tiny_pipeline, lora)
    assert load_into_policy(tmp_path / "adapter", other) == read_adapter_info(tmp_path / "adapter")
    read = read_adapter_info(tmp_path / "adapter")
    assert (read.sampler, read.base_sha256, read.lora) == (info.sampler, info.base_sha256, info.lora)
    assert read.controls["hue"].thresholds == (3.0,) and read.num_classes == {"size": 3, "hue": 2}
    with torch.no_grad():
        pair = [_predict(p, _inputs(tiny_pipeline), reference=False) for p in (policy, other)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("modules", [LoraConfig().target_modules, pytest.param(EVERY_LAYER, marks=pytest.mark.full)])
def test_lora_loads_with_diffusers_alone(tiny_pipeline: str, tmp_path: Path, modules: tuple[str, ...]) -> None:
    """`load_lora_weights` on the plain pipeline gives our prediction with null labels: alpha is not rank, and
    convolutions have LoRA too."""
    lora = LoraConfig(rank=2, alpha=6.0, target_modules=modules)
    policy = _policy(tiny_pipeline, lora)
    _perturb(policy)
    save_adapter(tmp_path, policy, _info(tiny_pipeline, lora))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    latents, time, condition, _ = _inputs(tiny_pipeline)
    with torch.no_grad():
        theirs = pipe.unet(latents, time, encoder_hidden_states=condition.tensors["text"]).sample
        ours = _predict(policy, (latents, time, condition, policy.controls.null(2)), reference=False)
        plain = _predict(policy, (latents, time, condition, policy.controls.null(2)), reference=True)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert (ours - plain).abs().max() > 1e-3


def test_a_second_control_is_added_to_an_adapter(tiny_pipeline: str, tmp_path: Path) -> None:
    """The known control keeps its table, the new one starts at zero; a lost control is an error."""
    lora = LoraConfig(rank=2)
    policy = _policy(tiny_pipeline, lora)
    _perturb(policy)
    save_adapter(tmp_path, policy, _info(tiny_pipeline, lora))
    wider = _policy(tiny_pipeline, lora, {**CONTROLS, "blur": ControlConfig(classes=("low", "high"))})
    load_into_policy(tmp_path, wider)
    assert torch.equal(wider.controls.tables["size"].weight, policy.controls.tables["size"].weight)
    assert torch.count_nonzero(wider.controls.tables["blur"].weight) == 0
    with pytest.raises(ModelError, match=r"control 'hue' with 2 classes.*no such control"):
        load_into_policy(tmp_path, _policy(tiny_pipeline, lora, {"size": CONTROLS["size"]}))
    with pytest.raises(ModelError, match=r"same lora.rank"):
        load_into_policy(tmp_path, _policy(tiny_pipeline, LoraConfig(rank=3)))


def test_broken_adapters_say_what_is_wrong(tiny_pipeline: str, tmp_path: Path) -> None:
    """Missing description, wrong version, truncated tables."""
    with pytest.raises(ModelError, match=r"adapter\.json does not exist"):
        read_adapter_info(tmp_path)
    policy = _policy(tiny_pipeline)
    save_adapter(tmp_path, policy, _info(tiny_pipeline, LoraConfig(rank=2)))
    content = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(ModelError, match="version 99"):
        read_adapter_info(tmp_path)
    del content["controls"]["size"]["unit"]
    (tmp_path / "adapter.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="unit"):
        read_adapter_info(tmp_path)


def test_control_names_and_classes_are_checked(tiny_pipeline: str) -> None:
    """A control needs an identifier and two classes."""
    with pytest.raises(ConfigError, match="not an identifier"):
        _policy(tiny_pipeline, controls={"my size": CONTROLS["size"]})
    with pytest.raises(ConfigError, match="1 classes"):
        make_policy(tiny_pipeline, {"size": 1}, lora=None)


def test_saved_tables_are_the_live_ones(tiny_pipeline: str, tmp_path: Path) -> None:
    """The embeddings file holds one float32 table per control, null row zero."""
    policy = _policy(tiny_pipeline)
    _perturb(policy)
    save_adapter(tmp_path, policy, _info(tiny_pipeline, LoraConfig(rank=2)))
    tables = load_file(tmp_path / "control_embeddings.safetensors")
    assert {name: len(t) for name, t in tables.items()} == {"size": 4, "hue": 3}
    assert torch.equal(tables["size"], policy.controls.tables["size"].weight) and not tables["size"][-1].any()
