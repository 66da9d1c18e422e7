"""Where a reward model's parts lie; without torch, so that whoever passes it on needs none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ctrl_ray.config import Precision
from ctrl_ray.runs.copies import FolderCopy


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelSpec:
    """Where a reward model's parts lie: small and picklable, so that an actor loads the model itself."""

    base_model: str
    """'shapes', a folder in the diffusers format, or a hub id: the owner of the VAE."""
    revision: str | None = None
    """Hub revision of base_model."""
    classifiers: Mapping[str, str]
    """Folder of each control's classifier; their order is the order of the label columns."""
    copies: Mapping[str, FolderCopy] = field(default_factory=dict, repr=False)
    """Classifier folders by value, for hosts that do not have them."""
    device: str = "cpu"
    """torch device of decoder and classifiers."""
    precision: Precision = "fp32"
    """The run's. Decoder and classifiers are float32; on a GPU a reward actor multiplies with TF32 unless it is 'fp32'."""
    threads: int | None = None
    """torch threads of the process that loads the model; None: left as they are."""
    decode_chunk_size: int = 32
    """Images decoded at a time."""
