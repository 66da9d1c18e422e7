"""Which classifier and which exponent weigh candidates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrl_ray.candidates.scoring import CandidateScoring
from ctrl_ray.candidates.weights import DEFAULT_SHARE
from ctrl_ray.config import ControlConfig, SamplerConfig
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import AdapterInfo
from ctrl_ray.policy.backbones import load_backbone
from tests.classifiers import save_classifier

CONTROLS = {
    "size": ControlConfig(classes=("low", "high"), guidance_strength=6.0),
    "hue": ControlConfig(classes=("red", "blue"), guidance_strength=1.0),
}
BOTH, SIZE, NONE = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0, 2]]), torch.tensor([[2, 2]])


def _info(**training: Any) -> AdapterInfo:
    return AdapterInfo(
        base_model="shapes",
        base_revision=None,
        base_sha256="",
        controls=CONTROLS,
        sampler=SamplerConfig(),
        scheduler={},
        lora=None,
        training=training,
    )


def _scoring(info: AdapterInfo | None, **options: Any) -> CandidateScoring:
    return CandidateScoring(CONTROLS, options.get("classifiers", {}), options.get("exponents"), info)


def test_exponents_are_the_adapters_unless_given() -> None:
    trained = _info(kl_coef=2.0)
    assert _scoring(trained).exponents(BOTH) == {"size": 3.0, "hue": 0.5}
    assert _scoring(trained).exponents(SIZE) == {"size": 3.0, "hue": 0.0}
    assert _scoring(trained, exponents={"hue": 4.0}).exponents(BOTH) == {"size": 3.0, "hue": 4.0}
    assert _scoring(None).exponents(BOTH) == {"size": 1.0, "hue": 1.0}
    assert _scoring(_info()).share == DEFAULT_SHARE == _scoring(None).share
    assert _scoring(_info(candidate_share=0.0625)).share == 0.0625


def test_an_exponent_that_is_not_known_is_asked_for() -> None:
    """Of adapters that say less, or that have no such target; what the user gives is enough then."""
    for info, message in (
        (_info(), "kl_coef of the adapter is not known"),
        (_info(kl_coef=0.0), "kl_coef of the adapter is 0.0"),
        (_info(kl_coef=1.0, latent_reduction="mean"), "trained with latent_reduction 'mean'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message) + ".*--exponent size=NUMBER"):
            _scoring(info).exponents(SIZE)
        assert _scoring(info, exponents={"size": 2.0}).exponents(SIZE)["size"] == 2.0
    with pytest.raises(ConfigError, match="no control is asked for"):
        _scoring(_info(kl_coef=1.0)).exponents(NONE)
    with pytest.raises(ConfigError, match=r"exponents names \['shape'\]; the controls are \['size', 'hue'\]"):
        _scoring(None, exponents={"shape": 1.0})
    with pytest.raises(ConfigError, match=r"the exponent of 'size' is -1\.0"):
        _scoring(None, exponents={"size": -1.0})


def test_the_asked_controls_classifiers_are_loaded(tiny_pipeline: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "size", "size", CONTROLS["size"])
    save_classifier(tmp_path / "other", "size", ControlConfig(classes=("a", "b")))
    decoder, cpu = load_backbone(str(tiny_pipeline)).load_decoder(), torch.device("cpu")
    scoring = _scoring(None, classifiers={"size": tmp_path / "size"})
    assert scoring.rewards(SIZE, decoder, cpu).controls == {"size": 2}
    with pytest.raises(ConfigError, match=r"there is no classifier of control 'hue'.*--classifier hue=FOLDER"):
        scoring.rewards(BOTH, decoder, cpu)
    with pytest.raises(
        ModelError, match=r"has the classes \['a', 'b'\], but the adapter's control 'size' has \['low', 'h"
    ):
        _scoring(None, classifiers={"size": tmp_path / "other"}).rewards(SIZE, decoder, cpu)
    with pytest.raises(ModelError, match="was fitted for control 'size', but it is given for 'hue'"):
        _scoring(None, classifiers={"size": tmp_path / "size", "hue": tmp_path / "size"}).rewards(BOTH, decoder, cpu)
