"""What `adapter.json` says of an adapter: written by a run, read back as strictly as a configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from ctrl_ray.config import AdapterKind, ControlConfig, LoraConfig, NullBranch, Precision, SamplerConfig
from ctrl_ray.config.control import check_control_name
from ctrl_ray.config.fields import at_least, check_fields, share, typed
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.identity import PartIdentity

ADAPTER_FILE = "adapter.json"
FORMAT_VERSION = 2
"""1, which is still read, knew one kind of adapter, 'embedding', and one unconditional branch, the pre-trained model's."""
_RUN_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """The content of `adapter.json`."""

    base_model: str
    """Preset name, folder or hub id."""
    base_revision: str | None
    base_parts: Mapping[str, PartIdentity] = field(default_factory=dict)
    """Of the base model's denoiser, text encoder and VAE, by sub-folder. Empty: `base_sha256` is all that is known."""
    base_sha256: str = ""
    """Of an adapter that knows no parts: `file_fingerprints` of the base model's denoiser."""
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
        known = (
            {"parts": {part: dataclasses.asdict(identity) for part, identity in self.base_parts.items()}}
            if self.base_parts
            else {"sha256": self.base_sha256}
        )
        content = {
            "format_version": FORMAT_VERSION,
            "base_model": {"id": self.base_model, "revision": self.base_revision, **known},
            "controls": controls,
            **dataclasses.asdict(self.sampler),
            "scheduler": dict(self.scheduler),
            "kind": self.kind,
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
            "training": dict(self.training),
        }
        return json.dumps(content, indent=2)


def read_adapter_info(folder: str | Path) -> AdapterInfo:
    """Parse `adapter.json`; ModelError names the file and what is missing or wrong, or the folder that is meant."""
    folder = adapter_folder(folder)
    file = folder / ADAPTER_FILE
    try:
        if not file.is_file():
            raise ModelError(_no_adapter(folder))
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        version = content["format_version"]
        if type(version) is not int or version not in range(1, FORMAT_VERSION + 1):
            raise ModelError(
                f"{file} has format version {version}; this ctrl_ray reads 1 to {FORMAT_VERSION}: use the version that wrote "
                "it, or a newer one"
            )
        if version == 1:
            content = {"kind": "embedding", "null_branch": "pre_trained", **content}
        for key, known in (("kind", get_args(AdapterKind)), ("null_branch", get_args(NullBranch))):
            if content[key] not in known:
                raise ModelError(f"{file} has {key} {content[key]!r}; this ctrl_ray knows {', '.join(known)}")
        return _info(content)
    except ModelError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__} {error}"
        raise ModelError(
            f"{file} is not an adapter description of ctrl_ray: {what}; copy the adapter's folder again, or export it again"
        ) from error


def adapter_folder(folder: str | Path) -> Path:
    """An adapter's folder as it was given, with '~' replaced where that is somebody's."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        return Path(folder)


def _no_adapter(folder: Path) -> str:
    """Why there is no description in a folder, and which one may be meant."""
    expected = "expected an adapter folder, such as RUN/adapter of a finished run"
    if folder.is_file():
        return f"adapter {folder} is a file; {expected}"
    if (folder / "adapter" / ADAPTER_FILE).is_file():
        return f"{folder} is a run's folder; give its adapter: {folder / 'adapter'}"
    if not folder.exists():
        hub = "" if folder.is_absolute() or len(folder.parts) != 2 else "; an adapter on a hub is to be fetched first"
        return f"adapter folder {folder} does not exist; {expected}{hub}"
    if (folder / _RUN_FILE).is_file():
        return (
            f"{folder / ADAPTER_FILE} does not exist: {folder} is the folder of a run that has exported no adapter; finish it "
            "with python -m ctrl_ray.train --resume"
        )
    return f"{folder / ADAPTER_FILE} does not exist; {expected}"


def _info(content: Any) -> AdapterInfo:
    """KeyError, TypeError, AttributeError or ConfigError where something is missing or of another type."""
    base, lora = content["base_model"], content["lora"]
    controls = {}
    for name, control in content["controls"].items():
        check_control_name(name)
        facts = {key: control[key] for key in ("classes", "thresholds", "unit", "oracle", "guidance_strength")}
        controls[name] = ControlConfig(**facts)
        if controls[name].num_classes < 2:
            raise ConfigError(f"control {name!r} has {controls[name].num_classes} classes; expected at least 2")
    if not controls:
        raise ConfigError("controls is empty; expected at least one")
    parts = {
        part: PartIdentity(
            sha256=typed(identity["sha256"], str, f"base_model.parts.{part}.sha256"),
            config=_group(identity["config"], f"base_model.parts.{part}.config"),
        )
        for part, identity in base.get("parts", {}).items()
    }
    training = _group(content["training"], "training")
    known = {field.name for field in dataclasses.fields(_Training)}
    _Training(**{name: value for name, value in training.items() if name in known})
    return AdapterInfo(
        base_model=typed(base["id"], str, "base_model.id"),
        base_revision=typed(base["revision"], str | None, "base_model.revision"),
        base_parts=parts,
        base_sha256="" if parts else typed(base["sha256"], str, "base_model.sha256"),
        controls=controls,
        sampler=SamplerConfig(**{name: content[name] for name in _SAMPLER if name in content or name not in _LATER}),
        scheduler=_group(content["scheduler"], "scheduler"),
        lora=None if lora is None else LoraConfig(**{key: lora[key] for key in ("rank", "alpha", "target_modules")}),
        kind=content["kind"],
        training=training,
    )


_SAMPLER = tuple(field.name for field in dataclasses.fields(SamplerConfig))
_LATER = ("flow_sde", "height", "width", "max_sequence_length")
"""Settings that adapters of format version 2 may lack: they were written before there were flows, and other sizes."""


def _group(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {value!r} ({type(value).__name__}); expected a group of settings")
    return value


@dataclass(frozen=True, kw_only=True)
class _Training:
    """The facts of the training that commands take up, with their ranges."""

    kl_coef: Annotated[float | None, at_least(0)] = None
    latent_reduction: Literal["sum", "mean"] = "sum"
    precision: Precision = "fp32"
    evaluation_batch_size: Annotated[int, at_least(1)] = 1
    decode_chunk_size: Annotated[int, at_least(1)] = 1
    candidate_share: Annotated[float, share(without_0=True, without_1=True)] = 0.5
    kl_noise_floor: Annotated[float | None, at_least(0)] = None

    def __post_init__(self) -> None:
        check_fields(self, "training")
