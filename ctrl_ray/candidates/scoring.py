"""What candidates are weighed by and methods of `ctrl_ray.baselines` steer by: each control's classifier and exponent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ctrl_ray.candidates.weights import DEFAULT_SHARE
from ctrl_ray.classifiers.classifier import ImageClassifier, read_control
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import AdapterInfo
from ctrl_ray.policy.decoder import LatentDecoder
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModel

CANDIDATES = "num_candidates is above 1"
"""Why a classifier is needed, where nothing else is said."""


class CandidateScoring:
    """Classifiers and exponents of a pipeline's controls; classifiers are loaded when candidates are first asked for."""

    def __init__(
        self,
        controls: Mapping[str, ControlConfig],
        classifiers: Mapping[str, str | Path],
        exponents: Mapping[str, float] | None,
        info: AdapterInfo | None,
    ) -> None:
        """controls: in label-column order. classifiers: folders of the controls that have one. exponents: None, or a control
        that is left out: guidance_strength / kl_coef of the adapter; 1 where there is none.

        Raises ConfigError for a name that is not a control's and for an exponent that is not a number ≥ 0.
        """
        for option, given in (("classifiers", classifiers), ("exponents", exponents or {})):
            unknown = sorted(set(given) - set(controls))
            if unknown:
                raise ConfigError(f"{option} names {unknown}; the controls are {list(controls)}")
        for name, exponent in (exponents or {}).items():
            if not (math.isfinite(exponent) and exponent >= 0):
                raise ConfigError(f"the exponent of {name!r} is {exponent}; expected a finite number >= 0")
        self.controls = controls
        self._folders = dict(classifiers)
        self._given = dict(exponents or {})
        self._info = info
        self._loaded: dict[str, ImageClassifier] = {}

    @property
    def share(self) -> float:
        """Share of pre-trained candidates that the adapter stores, else the default."""
        stored = {} if self._info is None else self._info.training
        return float(stored.get("candidate_share", DEFAULT_SHARE))

    def exponents(self, labels: Tensor, why: str = CANDIDATES) -> dict[str, float]:
        """Of every control, in column order; 0 where nobody asks for it.

        labels: (B, C). why: classifiers are needed, for the messages. ConfigError where all labels are null, or where an asked
        control's exponent is not known.
        """
        asked = self.asked(labels)
        if not asked:
            raise ConfigError(
                f"{why}, but no control is asked for, so there is nothing to choose by; give controls="
                f"{{NAME: CLASS}} (--control NAME=CLASS) of {list(self.controls)}"
            )
        return {name: self._exponent(name) if name in asked else 0.0 for name in self.controls}

    def rewards(
        self,
        labels: Tensor,
        decoder: LatentDecoder,
        device: torch.device,
        *,
        prompts_known: bool = True,
        every_column: bool = False,
        why: str = CANDIDATES,
    ) -> LocalRewards:
        """The asked controls' classifiers behind `decoder` (every_column: those of all controls, as `Rewards.submit` takes
        labels); ConfigError where one has none, or depends on prompts that are not known as text."""
        asked = list(self.controls) if every_column else self.asked(labels)
        for name in asked:
            if name not in self._loaded:
                self._loaded[name] = ImageClassifier.from_pretrained(self._checked_folder(name, why))
            if self._loaded[name].prompt_conditional and not prompts_known:
                raise ConfigError(
                    f"the classifier of {name!r} depends on the prompt, and prompt_embeds do not tell its text; give prompt"
                )
        return LocalRewards(RewardModel(decoder, [self._loaded[name].to(device) for name in asked]))

    def asked(self, labels: Tensor) -> list[str]:
        """Controls that are not null in every row of labels (B, C)."""
        controls = enumerate(self.controls.items())
        return [name for column, (name, control) in controls if bool((labels[:, column] != control.num_classes).any())]

    def check(self, labels: Tensor, why: str = CANDIDATES) -> None:
        """What can be known before anything is loaded: ConfigError as of `exponents` and `rewards`, ModelError for a
        classifier of other classes."""
        self.exponents(labels, why)
        for name in self.asked(labels):
            self._checked_folder(name, why)

    def _checked_folder(self, name: str, why: str) -> str | Path:
        if name not in self._folders:
            raise ConfigError(
                f"{why}, but there is no classifier of control {name!r}, which weighs images; "
                f"give classifiers={{{name!r}: FOLDER}} (--classifier {name}=FOLDER), such as RUN/classifier/"
                f"{name} of the run that made the adapter"
            )
        folder, control = self._folders[name], self.controls[name]
        spec = read_control(folder, name)
        if spec.class_names != control.class_names:
            raise ModelError(
                f"classifier folder {folder} has the classes {list(spec.class_names)}, but the adapter's "
                f"control {name!r} has {list(control.class_names)}; give the classifier that the adapter was trained with"
            )
        return folder

    def _exponent(self, name: str) -> float:
        if name in self._given:
            return self._given[name]
        if self._info is None:
            return 1.0
        training = self._info.training
        kl_coef, reduction = training.get("kl_coef"), training.get("latent_reduction", "sum")
        give = (
            f"give exponents={{{name!r}: NUMBER}} (--exponent {name}=NUMBER): the target is p_pre(x|c) p(y|x,c)^NUMBER"
        )
        if reduction != "sum":
            raise ConfigError(
                f"the adapter was trained with latent_reduction {reduction!r}, whose KL has no such target; {give}"
            )
        if not isinstance(kl_coef, int | float) or kl_coef <= 0:
            raise ConfigError(
                f"kl_coef of the adapter is {'not known' if kl_coef is None else kl_coef}, so guidance_strength / kl_coef, "
                f"by which candidates are weighed, has no value; {give}"
            )
        return self.controls[name].guidance_strength / kl_coef
