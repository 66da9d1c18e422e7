"""What a run exports: LoRA in diffusers' own format, control embeddings or label gains, and the facts that belong to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft import get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrl_ray.config import AdapterKind, ControlConfig, LoraConfig, NullBranch, SamplerConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.base_model import fingerprint
from ctrl_ray.policy.class_loras import save_class_loras, write_usage
from ctrl_ray.policy.control.gains import GAINS
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.runs.files import write_whole

ADAPTER_FILE = "adapter.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDINGS_FILE = "control_embeddings.safetensors"
GAINS_FILE = "label_gains.safetensors"
README_FILE = "README.md"
"""How plain diffusers uses the files of the classes."""
_WEIGHTS = "diffusion_pytorch_model"
FORMAT_VERSION = 2
"""1, which is still read, knew one kind of adapter, 'embedding', and one unconditional branch, the pre-trained model's."""


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """The content of `adapter.json`."""

    base_model: str
    """Preset name, folder or hub id."""
    base_revision: str | None
    base_sha256: str
    """`fingerprint` of the base model's denoiser."""
    controls: Mapping[str, ControlConfig]
    """In label-column order."""
    sampler: SamplerConfig
    """What the adapter was trained for; the guarantee holds for it alone."""
    scheduler: Mapping[str, Any]
    """DDIM scheduler config."""
    lora: LoraConfig | None
    """None: the whole denoiser was trained and lies in its sub-folder (unet/)."""
    kind: AdapterKind = "embedding"
    """How labels reach the denoiser."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the run: kl_coef, updates, evaluation, the share of pre-trained candidates, and the precision and sizes that
    fitted its machines, which `python -m ctrl_ray.evaluate` takes up."""

    @property
    def num_classes(self) -> dict[str, int]:
        """Classes of each control, in label-column order."""
        return {name: control.num_classes for name, control in self.controls.items()}

    def to_json(self) -> str:
        """Indented JSON."""
        controls = {
            name: {
                "classes": list(control.class_names),
                "thresholds": list(control.thresholds),
                "unit": control.unit,
                "oracle": control.oracle,
                "guidance_strength": control.guidance_strength,
                "null_label": control.num_classes,
            }
            for name, control in self.controls.items()
        }
        content = {
            "format_version": FORMAT_VERSION,
            "base_model": {"id": self.base_model, "revision": self.base_revision, "sha256": self.base_sha256},
            "controls": controls,
            **dataclasses.asdict(self.sampler),
            "scheduler": dict(self.scheduler),
            "kind": self.kind,
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
            "training": dict(self.training),
        }
        return json.dumps(content, indent=2)


def read_adapter_info(folder: str | Path) -> AdapterInfo:
    """Parse `adapter.json`; ModelError says what is missing."""
    file = Path(folder) / ADAPTER_FILE
    if not file.is_file():
        raise ModelError(f"{file} does not exist; expected an adapter folder, such as RUN/adapter of a finished run")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format_version"] not in range(1, FORMAT_VERSION + 1):
            raise ModelError(
                f"{file} has format version {content['format_version']}; this ctrl_ray reads 1 to {FORMAT_VERSION}"
            )
        if content["format_version"] == 1:
            content = {"kind": "embedding", "null_branch": "pre_trained", **content}
        for key, known in (("kind", get_args(AdapterKind)), ("null_branch", get_args(NullBranch))):
            if content[key] not in known:
                raise ModelError(f"{file} has {key} {content[key]!r}; this ctrl_ray knows {', '.join(known)}")
        base = content["base_model"]
        return AdapterInfo(
            base_model=base["id"],
            base_revision=base["revision"],
            base_sha256=base["sha256"],
            controls={
                name: ControlConfig(
                    classes=tuple(control["classes"]),
                    thresholds=tuple(control["thresholds"]),
                    unit=control["unit"],
                    oracle=control["oracle"],
                    guidance_strength=control["guidance_strength"],
                )
                for name, control in content["controls"].items()
            },
            sampler=SamplerConfig(**{f.name: content[f.name] for f in dataclasses.fields(SamplerConfig)}),
            scheduler=content["scheduler"],
            lora=None
            if content["lora"] is None
            else LoraConfig(
                rank=content["lora"]["rank"],
                alpha=content["lora"]["alpha"],
                target_modules=tuple(content["lora"]["target_modules"]),
            ),
            kind=content["kind"],
            training=content["training"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is not an adapter description of ctrl_ray: {type(error).__name__} {error}") from error


def add_training_facts(folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Add to what `adapter.json` tells of the training, or replace it."""
    info = read_adapter_info(folder)
    content = dataclasses.replace(info, training={**info.training, **facts}).to_json()
    write_whole(Path(folder) / ADAPTER_FILE, content)


def check_base_model(info: AdapterInfo, backbone: Backbone) -> None:
    """ModelError unless the denoiser found is the one the adapter was trained on."""
    found = fingerprint(backbone.folder, backbone.denoiser)
    if found != info.base_sha256:
        raise ModelError(
            f"the adapter was trained on {info.base_model!r} (revision {info.base_revision or 'default'}, denoiser "
            f"{info.base_sha256[:12]}…), but {backbone.folder} holds denoiser {found[:12]}…; give the original base model"
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


def read_embeddings(folder: str | Path, info: AdapterInfo) -> dict[str, Tensor]:
    """Control tables by name, (num_classes + 1, embedding_dim) float32, null row last."""
    file = Path(folder) / EMBEDDINGS_FILE
    if not file.is_file():
        raise ModelError(f"{file} does not exist; the adapter folder is incomplete")
    tables = load_file(file)
    for name, control in info.controls.items():
        if name not in tables or len(tables[name]) != control.num_classes + 1:
            raise ModelError(
                f"{file} holds {list(tables[name].shape) if name in tables else 'no table'} for control {name!r}; "
                f"expected {control.num_classes} classes + 1 null row"
            )
    return {name: tables[name].float() for name in info.controls}


def load_into_policy(folder: str | Path, policy: ControlledPolicy) -> AdapterInfo:
    """Set a policy's parameters from an adapter (`--init-adapter`, evaluation).

    Controls that the adapter lacks stay as they start, without effect; a control of the adapter that the policy lacks, other
    classes, another kind of adapter or another LoRA rank are ModelErrors.
    """
    info = read_adapter_info(folder)
    if info.lora is not None and policy.lora is not None and info.kind != policy.kind:
        raise ModelError(
            f"adapter {folder} is of kind {info.kind!r}, this policy of kind {policy.kind!r}; set adapter.kind to {info.kind}"
        )
    for name, count in info.num_classes.items():
        have = policy.controls.num_classes.get(name)
        if have != count:
            raise ModelError(
                f"adapter {folder} has control {name!r} with {count} classes; this policy has "
                f"{'no such control' if have is None else f'{have} classes'}. Keep the adapter's controls in the config"
            )
    if info.lora is None or info.kind != "gains":
        for name, table in read_embeddings(folder, info).items():
            weight = policy.controls.table(name).weight
            weight.data.copy_(table.to(weight.device))
    if info.lora is None:
        _load_denoiser(Path(folder) / policy.backbone.denoiser, policy)
    elif info.kind != "embedding":
        _load_gains(Path(folder) / GAINS_FILE, policy, info)
    else:
        _load_lora(Path(folder) / LORA_FILE, policy)
    return info


def _load_lora(file: Path, policy: ControlledPolicy) -> None:
    if not file.is_file():
        raise ModelError(f"{file} does not exist; the adapter folder is incomplete")
    prefix = f"{policy.backbone.denoiser}."
    loaded = policy.backbone.pipeline_class.lora_state_dict(str(file.parent), weight_name=file.name)
    state = loaded[0] if isinstance(loaded, tuple) else loaded  # with the networks' alphas, in some families
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _require_shapes(file, own, get_peft_model_state_dict(policy.denoiser), "this policy's LoRA")
    set_peft_model_state_dict(policy.denoiser, own)


def _load_gains(file: Path, policy: ControlledPolicy, info: AdapterInfo) -> None:
    """Those of the adapter's controls; a control that only the policy has keeps its own."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist; the adapter folder is incomplete")
    state = load_file(file)
    own = {
        name: parameter
        for name, parameter in policy.denoiser.named_parameters()
        if f".{GAINS}." in name and name.partition(f".{GAINS}.")[2].split(".")[1] in info.controls
    }
    _require_shapes(file, state, own, "this policy's label gains")
    for name, parameter in own.items():
        parameter.data.copy_(state[name].to(parameter.device))


def _require_shapes(file: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], whose: str) -> None:
    """ModelError where names or shapes differ."""
    have = {name: tuple(value.shape) for name, value in found.items()}
    want = {name: tuple(value.shape) for name, value in wanted.items()}
    if have != want:
        different = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise ModelError(
            f"{file} does not fit {whose} ({len(different)} of {len(want)} tensors differ, first {different[0]}: file "
            f"{have.get(different[0])}, policy {want.get(different[0])}); use the same lora.rank and lora.target_modules as "
            "the adapter"
        )


def _load_denoiser(folder: Path, policy: ControlledPolicy) -> None:
    if policy.reference_denoiser is None:
        raise ModelError(
            f"adapter {folder.parent} holds a fully fine-tuned denoiser; set full_finetune to go on from it"
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors weights; the adapter folder is incomplete")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    policy.denoiser.load_state_dict(state)


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
    """Facts of a run as `adapter.json` stores them; hashes the base model."""
    backbone = load_backbone(base_model, base_revision)
    public = {key: value for key, value in backbone.scheduler_config().items() if not key.startswith("_")}
    return AdapterInfo(
        base_model=str(base_model),
        base_revision=base_revision,
        base_sha256=fingerprint(backbone.folder, backbone.denoiser),
        controls=dict(controls),
        sampler=sampler,
        scheduler=json.loads(json.dumps(public, default=str)),
        lora=lora,
        kind=kind if lora is not None else "embedding",
        training=dict(training),
    )
