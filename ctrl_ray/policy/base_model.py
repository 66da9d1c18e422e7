"""Where a base model's files are."""

from __future__ import annotations

from pathlib import Path

from ctrl_ray.embedded import PIPELINES
from ctrl_ray.errors import ModelError

OUTLINES_FOLDER = Path(__file__).with_name("backbones") / "outlines"
"""Pipelines without weights and tokenizers: configurations alone, for a plan."""
OUTLINES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "stable-diffusion",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "fal/AuraFlow-v0.3": "auraflow",
}
"""Hub id to the folder of its configurations within OUTLINES_FOLDER."""

_ENDINGS = (".json", ".txt", ".safetensors", ".model")
"""Of a pipeline's files, in the folders of its parts; single-file checkpoints lie at the top of a repository."""


def resolve_base_model(base_model: str, revision: str | None = None) -> str:
    """Folder of a diffusers pipeline: a shipped one by its name, a local folder, or the snapshot of a hub id.

    Raises ModelError when the folder has no `model_index.json` or the hub id can be neither found nor reached.
    """
    if base_model in PIPELINES:
        return str(PIPELINES[base_model])
    try:
        folder = Path(base_model).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: an unknown user after '~'
        raise ModelError(
            f"base model {base_model[:200]!r} cannot be looked at ({error}); give a diffusers folder or a hub id"
        ) from error
    if exists:
        if folder.is_file():
            raise ModelError(
                f"base model {folder} is a file; expected a folder in diffusers' format: write one with "
                f"StableDiffusionPipeline.from_single_file({str(folder)!r}).save_pretrained(FOLDER)"
            )
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"base model folder {folder} holds no model_index.json; expected a folder written by "
                "diffusers' save_pretrained"
            )
        return str(folder.resolve())
    if folder.is_absolute() or base_model.startswith("."):
        raise ModelError(f"base model folder {folder} does not exist; give a diffusers folder or a hub id")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(base_model, revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"base model {base_model!r} (revision {revision or 'default'}) is neither a folder here nor a hub model that "
            f"can be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); check the name, the network, or "
            "download it first and give the folder"
        ) from error


def is_here(base_model: str, revision: str | None = None) -> bool:
    """Whether a base model need not be fetched: a shipped one, a folder, or a hub id in the cache."""
    if base_model in PIPELINES or Path(base_model).expanduser().exists():
        return True
    try:
        _snapshot(base_model, revision, local_files_only=True)
    except (OSError, ValueError):  # LocalEntryNotFoundError and HFValidationError
        return False
    return True


def outline_of(base_model: str) -> str | None:
    """Folder of the configurations of a hub id; None where the package holds none."""
    name = OUTLINES.get(base_model)
    return None if name is None else str(OUTLINES_FOLDER / name)


def is_outline(folder: str | Path) -> bool:
    """Whether a pipeline's folder holds configurations alone."""
    return Path(folder).parent == OUTLINES_FOLDER


def _snapshot(base_model: str, revision: str | None, *, local_files_only: bool = False) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        base_model,
        revision=revision,
        allow_patterns=["model_index.json", *(f"*/*{ending}" for ending in _ENDINGS)],
        ignore_patterns=["*.fp16.*", "*.non_ema.*", "safety_checker/*", "*/diffusion_flax_model*"],
        local_files_only=local_files_only,
    )
