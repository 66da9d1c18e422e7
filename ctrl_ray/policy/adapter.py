"""What a run exports: LoRA in diffusers' own format, control embeddings or label gains, and the facts that belong to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ctrl_ray.config import AdapterKind, ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.adapter_info import ADAPTER_FILE, AdapterInfo, read_adapter_info
from ctrl_ray.policy.adapter_tensors import EMBEDDINGS_FILE, GAINS_FILE, adapter_tensors
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.base_model import is_outline
from ctrl_ray.policy.class_loras import save_class_loras, write_usage
from ctrl_ray.policy.control.gains import GAINS
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.identity import file_fingerprints
from ctrl_ray.runs.files import write_whole

README_FILE = "README.md"
"""How plain diffusers uses the files of the classes."""
_WEIGHTS = "diffusion_pytorch_model"
_PART_NAMES = {
    "vae": "VAE (the decoder)",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
}


def add_training_facts(folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Add to what `adapter.json` tells of the training, or replace it."""
    info = read_adapter_info(folder)
    content = dataclasses.replace(info, training={**info.training, **facts}).to_json()
    write_whole(Path(folder) / ADAPTER_FILE, content)


def adapter_backbone(info: AdapterInfo, base_model: str | None) -> Backbone:
    """The base model that an adapter remembers, or `base_model` where it lies now; ModelError where there is none."""
    if base_model:
        return load_backbone(base_model, sampler=info.sampler)
    try:
        return load_backbone(info.base_model, info.base_revision, info.sampler)
    except ModelError as error:
        raise ModelError(
            f"{error} (that is where the adapter was trained; give base_model, --base-model, where it lies elsewhere now)"
        ) from error


def check_base_model(info: AdapterInfo, backbone: Backbone) -> str | None:
    """ModelError unless the denoiser found is the one the adapter was trained on; a warning where another part, through
    which its classes were learned, is not: the text encoder, the VAE. An adapter that knows its denoiser alone, by its
    files, is checked by those."""
    backbone.check_schedule(info.scheduler, "the adapter (in adapter.json)")
    folder, part = backbone.folder, backbone.denoiser
    trained_on = f"the adapter was trained on {info.base_model!r} (revision {info.base_revision or 'default'})"
    if not info.base_parts:
        found = list(file_fingerprints(folder, part))
        if info.base_sha256 not in found:
            raise ModelError(
                f"{trained_on[:-1]}, denoiser {info.base_sha256[:12]}…), but {folder} holds denoiser {found[0][:12]}…; give "
                "the original base model"
            )
        return None
    identities = backbone.identities()
    known = {name: identity for name, identity in info.base_parts.items() if name in identities}
    differences = {name: identity.difference(identities[name]) for name, identity in known.items()}
    if part not in known or differences[part]:
        raise ModelError(
            f"{trained_on}, but {folder} holds another denoiser ({differences.get(part) or 'of another family'}); give the "
            "original base model"
        )
    others = [f"{_PART_NAMES.get(name, name)} with {text}" for name, text in differences.items() if text]
    if not others:
        return None
    return (
        f"{trained_on}, but {folder} has another {' and another '.join(others)}; the adapter's classes may mean something "
        "else with it: give the original base model"
    )


def save_adapter(folder: str | Path, policy: ControlledPolicy, info: AdapterInfo) -> Path:
    """Write the adapter of a policy whose parameters are whole (gather first under ZeRO-3)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parameter in policy.trainable_parameters().items():
        if parameter.numel() == 0:
            raise ModelError(f"parameter {name} is empty: it is sharded; gather it before exporting")
    if info.lora is None:
        denoiser: Any = policy.denoiser
        denoiser.save_pretrained(folder / policy.backbone.denoiser, safe_serialization=True)
    elif info.kind != "embedding":
        state = policy.denoiser.state_dict()
        gains = {name: value.detach().cpu().contiguous() for name, value in state.items() if f".{GAINS}." in name}
        save_file(gains, folder / GAINS_FILE)
        if info.kind == "gains":
            save_class_loras(folder, policy, info.controls)
            base = policy.backbone.folder if is_embedded(info.base_model) else info.base_model
            write_usage(folder / README_FILE, policy, base, info.controls, info.sampler)
    else:
        layers = {key: v.detach().cpu().contiguous() for key, v in get_peft_model_state_dict(policy.denoiser).items()}
        facts = {
            "r": info.lora.rank,
            "lora_alpha": info.lora.alpha,
            "target_modules": list(info.lora.target_modules),
        }
        key = policy.backbone.denoiser
        policy.backbone.pipeline_class.save_lora_weights(
            folder, **{f"{key}_lora_layers": layers, f"{key}_lora_adapter_metadata": facts}
        )
    tables = {name: policy.controls.table(name).weight.detach().cpu().contiguous() for name in policy.controls.tables}
    _save_facts(folder, tables, info)
    return folder


def save_adapter_shard(
    folder: str | Path,
    policy: ControlledPolicy,
    info: AdapterInfo,
    shard: Mapping[str, Tensor],
    owners: Mapping[str, int],
    rank: int,
    num_ranks: int,
) -> None:
    """Write one rank's part of a fully fine-tuned denoiser, in diffusers' sharded format; all ranks' parts together are
    the adapter. shard: whole float32 tensors of the parameters that `owners` gives to this rank (others are ignored)."""
    folder, prefix = Path(folder), f"{policy.backbone.denoiser}."
    target = folder / policy.backbone.denoiser
    target.mkdir(parents=True, exist_ok=True)
    mine = {name.removeprefix(prefix): shard[name] for name in owners if name in shard and name.startswith(prefix)}
    save_file(mine, target / shard_file(_WEIGHTS, rank, num_ranks), metadata={"format": "pt"})
    if rank:
        return
    denoiser: Any = policy.denoiser
    denoiser.save_config(target)
    if num_ranks > 1:
        places = {
            name.removeprefix(prefix): shard_file(_WEIGHTS, owner, num_ranks)
            for name, owner in owners.items()
            if name.startswith(prefix)
        }
        index = {"metadata": {}, "weight_map": places}
        (target / f"{_WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    _save_facts(folder, {name: shard[f"controls.tables.{name}.weight"] for name in policy.controls.names}, info)


def shard_file(stem: str, rank: int, num_ranks: int) -> str:
    """File name of one part of several, as diffusers and transformers name them; the plain name when it is the only one."""
    return f"{stem}.safetensors" if num_ranks == 1 else f"{stem}-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


def _save_facts(folder: Path, tables: Mapping[str, Tensor], info: AdapterInfo) -> None:
    if tables:
        save_file(dict(tables), folder / EMBEDDINGS_FILE)
    (folder / ADAPTER_FILE).write_text(info.to_json(), encoding="utf-8")


def load_into_policy(folder: str | Path, policy: ControlledPolicy) -> AdapterInfo:
    """Set a policy's parameters from an adapter (`--init-adapter`, evaluation).

    Controls that the adapter lacks stay as they start, without effect. ModelErrors: a control of the adapter that the policy
    lacks, other classes, another kind of adapter or another LoRA rank; files that are missing or damaged, by name.
    """
    info = read_adapter_info(folder)
    check_fits(folder, info, policy)
    for parameter, value in adapter_tensors(folder, info, policy):
        parameter.data.copy_(value.to(parameter.device))
    return info


def check_fits(folder: str | Path, info: AdapterInfo, policy: ControlledPolicy) -> None:
    """ModelError where a policy cannot take an adapter, by its description."""
    if info.lora is not None and policy.lora is not None and info.kind != policy.kind:
        raise ModelError(
            f"adapter {folder} is of kind {info.kind!r}, this policy of kind {policy.kind!r}; set adapter.kind to {info.kind}"
        )
    if info.lora is None and policy.reference_denoiser is None:
        raise ModelError(f"adapter {folder} holds a fully fine-tuned denoiser; set full_finetune to go on from it")
    if info.lora is not None and policy.lora is None:
        raise ModelError(
            f"adapter {folder} holds LoRA, but this policy trains the whole denoiser; leave full_finetune out"
        )
    for name, count in info.num_classes.items():
        have = policy.controls.num_classes.get(name)
        if have != count:
            raise ModelError(
                f"adapter {folder} has control {name!r} with {count} classes; this policy has "
                f"{'no such control' if have is None else f'{have} classes'}. Keep the adapter's controls in the config"
            )


def make_adapter_info(
    *,
    base_model: str,
    base_revision: str | None,
    controls: Mapping[str, ControlConfig],
    sampler: SamplerConfig,
    lora: LoraConfig | None,
    kind: AdapterKind = "embedding",
    training: Mapping[str, Any],
) -> AdapterInfo:
    """Facts of a run as `adapter.json` stores them, with the identity of the base model's parts."""
    backbone = load_backbone(base_model, base_revision)
    public = {key: value for key, value in backbone.scheduler_config().items() if not key.startswith("_")}
    return AdapterInfo(
        base_model=str(base_model),
        base_revision=base_revision,
        base_parts={} if is_outline(backbone.folder) else backbone.identities(),
        controls=dict(controls),
        sampler=sampler,
        scheduler=json.loads(json.dumps(public, default=str)),
        lora=lora,
        kind=kind if lora is not None else "embedding",
        training=dict(training),
    )
