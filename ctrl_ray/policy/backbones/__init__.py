"""Families of base models, one file each; `load_backbone` finds the family of a pipeline."""

from __future__ import annotations

import importlib
from pathlib import Path

from ctrl_ray.config import SamplerConfig
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.base_model import is_outline, resolve_base_model
from ctrl_ray.policy.pipeline_files import read_json

FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionImg2ImgPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusionXLImg2ImgPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "stable_diffusion_3:StableDiffusion3",
    "StableDiffusion3Img2ImgPipeline": "stable_diffusion_3:StableDiffusion3",
    "AuraFlowPipeline": "aura_flow:AuraFlow",
}
"""`_class_name` of model_index.json to 'module:class' of this package."""
_WHOLE: set[str] = set()
"""Folders that this process has found whole."""


def load_backbone(base_model: str, revision: str | None = None, sampler: SamplerConfig | None = None) -> Backbone:
    """The backbone of a pipeline (see `resolve_base_model`), for images and texts of the sampler's size; None: of the model's.

    ModelError lists the families where it is of none, and says what is missing or damaged (`Backbone.check`); ConfigError where
    the family does not make such a size.
    """
    folder = resolve_base_model(base_model, revision)
    name = read_json(Path(folder) / "model_index.json", "its list of parts").get("_class_name")
    if name not in FAMILIES:
        raise ModelError(
            f"base model {base_model!r} is a {name}, which is no family that ctrl_ray can train; expected one of "
            f"{', '.join(FAMILIES)} (in {Path(folder) / 'model_index.json'}); give a base model of such a family"
        )
    module, _, family = FAMILIES[name].partition(":")
    backbone: Backbone = getattr(importlib.import_module(f"{__name__}.{module}"), family)(folder, sampler)
    if folder not in _WHOLE and not is_outline(folder):
        backbone.check()
        _WHOLE.add(folder)
    backbone.check_size()
    return backbone
