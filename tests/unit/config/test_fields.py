"""Types and ranges of settings: one checker for every configuration, however its values came."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import pytest
from torch import nn

from ctrl_ray.classify import ClassifyConfig
from ctrl_ray.config import (
    ClassifierConfig,
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.config.control import check_control_name
from ctrl_ray.config.fields import Range, above, at_least, check_fields, share
from ctrl_ray.config.json import read_train_config, to_json, train_config_from_json
from ctrl_ray.config.tracker import parse_tracker
from ctrl_ray.config.values import Auto
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluate import EvaluateOptions
from ctrl_ray.label import LabelConfig
from ctrl_ray.sample import SampleConfig
from ctrl_ray.verify import VerifyOptions

_OF_RUNS = (
    *(TrainConfig, ControlConfig, ClassifierConfig, SamplerConfig, LoraConfig, OptimizerConfig, RewardPoolConfig),
    *(ScalingConfig, EstimatorConfig, EvaluationConfig, ClassifyConfig, VerifyOptions),
)
CONFIGS: dict[Any, dict[str, Any]] = {
    **{cls: {} for cls in _OF_RUNS},
    LabelConfig: {"images": "photos", "output": "data"},
    SampleConfig: {"adapter": "adapter", "prompt": ("a cross",)},
    EvaluateOptions: {"adapter": "adapter"},
}
NUMBERS = [
    (cls, field.name)
    for cls in CONFIGS
    for field in dataclasses.fields(cls)
    if re.search(r"\b(int|float)\b", str(get_type_hints(cls)[field.name]).replace("<class ", "").replace("'>", ""))
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    rate: Annotated[float, above(0)] = 1.0
    count: Annotated[int | Auto, at_least(1)] = 1
    most: int | None = None
    shares: Annotated[tuple[float, ...], share(without_1=True)] = ()
    switch: bool = False
    kind: Literal["a", "b"] = "a"
    folder: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "some")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": "1e-4"}, "some.rate is '1e-4' (str); expected a number"),
        ({"rate": True}, "some.rate is True (bool); expected a number"),
        ({"rate": 0}, "some.rate is 0.0; expected a number above 0"),
        ({"rate": math.inf}, "some.rate is inf; expected a finite number, a number above 0"),
        ({"rate": 10**400}, f"some.rate is 1{'0' * 400} (int); expected a number"),
        ({"count": 0}, "some.count is 0; expected at least 1, or auto"),
        ({"count": 1.5}, "some.count is 1.5 (float); expected an integer or 'auto'"),
        ({"count": "all"}, "some.count is 'all' (str); expected an integer or 'auto'"),
        ({"most": False}, "some.most is False (bool); expected an integer or None"),
        ({"shares": (0.5, math.nan)}, "some.shares is (0.5, nan); expected each a finite number, a number in [0, 1)"),
        ({"shares": (1,)}, "some.shares is (1.0,); expected each a number in [0, 1)"),
        ({"shares": 0.5}, "some.shares is 0.5 (float); expected a list, each item a number"),
        ({"switch": "false"}, "some.switch is 'false' (str); expected True or False"),
        ({"switch": 1}, "some.switch is 1 (int); expected True or False"),
        ({"kind": "c"}, "some.kind is 'c' (str); expected 'a' or 'b'"),
        ({"folder": 3}, "some.folder is 3 (int); expected a string or None"),
    ],
)
def test_another_type_or_range_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        _Settings(**given)


def test_what_means_the_same_is_taken() -> None:
    taken = _Settings(rate=np.float32(2), count=np.int64(3), shares=[0, 0.5], folder=Path("x"))  # type: ignore[arg-type]
    assert taken == _Settings(rate=2.0, count=3, shares=(0.0, 0.5), folder="x")
    assert [type(value) for value in (taken.rate, taken.count, taken.shares, taken.folder)] == [float, int, tuple, str]
    assert all(type(value) is float for value in taken.shares)
    assert _Settings(count="auto").count == "auto" and _Settings(most=10**400).most == 10**400


def test_ranges_in_words() -> None:
    assert [str(allowed) for allowed in (Range(), at_least(2), above(0.5), share(without_0=True))] == [
        *("a finite number", "at least 2", "a number above 0.5", "a number in (0, 1]")
    ]


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_no_setting_is_not_a_number(cls: Any, name: str) -> None:
    """In no configuration of any command; a list of numbers holds none either."""
    is_list = isinstance(getattr(cls(**CONFIGS[cls]), name), tuple) or "tuple" in str(get_type_hints(cls)[name])
    for wrong in (math.nan, math.inf, "7"):
        value = (wrong, wrong, wrong) if is_list else wrong
        with pytest.raises(ConfigError, match=rf"(^|\.){name} is .*expected"):
            cls(**CONFIGS[cls] | {name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": {"learning_rate": "1e-4"}},
            "mine.json: optimizer.learning_rate is '1e-4' (str); expected a number",
        ),
        ({"num_updates": "ten"}, "mine.json: num_updates is 'ten' (str); expected an integer"),
        ({"full_finetune": "false"}, "mine.json: full_finetune is 'false' (str); expected True or False"),
        (
            {"scaling": {"precision": "fp8"}},
            "mine.json: scaling.precision is 'fp8' (str); expected 'fp32' or 'tf32' or 'bf16'",
        ),
        ({"sampler": None}, "mine.json: sampler is null; expected a group of settings"),
        ({"controls": []}, "mine.json: controls is []; expected a group for each control"),
        ({"controls": {"size": 3}}, "mine.json: controls.size is 3; expected a group of settings"),
        (
            {"controls": {"size": {"guidance_strength": -1}}},
            "mine.json: controls.size: guidance_strength is -1.0; expected at least 0",
        ),
        ({"kl_coef": math.nan}, "mine.json: kl_coef is nan; expected a finite number, at least 0"),
        (
            {"tracker": "http://localhost:53800"},
            "mine.json: tracker is 'http://localhost:53800'; expected aim, tensorboard, none, aim://HOST:PORT",
        ),
        ([1], "mine.json is [1]; expected a group of settings"),
    ],
)
def test_json_is_read_as_strictly_as_a_command_line(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        train_config_from_json(json.dumps(change), source="mine.json")


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({"aim": True, "aim_repo": None}, "aim"),
        ({"aim": False, "aim_repo": None}, "none"),
        ({"aim": True, "aim_repo": "aim://host:53800"}, "aim://host:53800"),
        ({"aim_repo": "/shared/aim"}, "aim:/shared/aim"),
    ],
)
def test_the_trackers_of_an_earlier_version_are_read(
    earlier: dict[str, object], now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line where it is not what every run has."""
    assert train_config_from_json(json.dumps(earlier), source="old.json").tracker == now
    line = f"old.json: aim and aim_repo of an earlier version are read as tracker {now!r}\n"
    assert capsys.readouterr().err == ("" if now == "aim" else line)
    assert parse_tracker(now).kind in ("aim", "none")


def test_a_file_in_another_encoding_says_which_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes('{"num_updates": 3}'.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"mine\.json is not UTF-8 text .*; expected JSON in UTF-8"):
        read_train_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + to_json(TrainConfig(num_updates=3)).encode())
    assert read_train_config(file) == TrainConfig(num_updates=3), "a byte order mark is no fault"


def _is_torchs(value: Any) -> bool:
    return getattr(value, "__module__", "torch").startswith("torch")


def test_control_names_are_keys_everywhere() -> None:
    """Whatever torch's containers already have is refused by the rule, without torch."""
    torchs = [
        kind for dictionary in (nn.ModuleDict, nn.ParameterDict) for kind in dictionary.__mro__[:-1]
    ]  # not others' patches
    taken = {
        name for kind in torchs for name, value in vars(kind).items() if _is_torchs(value) and not name.startswith("_")
    }
    for name in (*taken, "my-score", "2nd", "_hidden", ""):
        with pytest.raises(ConfigError, match="control name"):
            check_control_name(name)
    for name in ("jpeg_size", "größe", "type_2"):
        check_control_name(name)


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"names 'small' twice"):
        ControlConfig(classes=("tiny", "small", "small"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two\nlines", r"a line break \(U\+000A\)"),
        ("two\u2028lines", r"a line break \(U\+2028\)"),
        ("bell\x07", r"a control character \(U\+0007\)"),
        ("\x00", r"a control character \(U\+0000\)"),
        ("half\ud83d", r"half of a surrogate pair \(U\+D83D\)"),
        ("", "without a letter"),
        (" \t".strip() + "  ", "without a letter"),
        ("\u200b", "without a letter"),
    ],
)
def test_a_class_name_is_one_line_that_can_be_seen(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ControlConfig(classes=("plain", name))


@pytest.mark.parametrize("name", ["$", "好", "a/b=c", "1", "very good", "👩‍👩‍👧", "naïve", "x" * 200, "<&>"])
def test_any_other_text_names_a_class(name: str) -> None:
    assert ControlConfig(classes=("plain", name)).class_names[1] == name


def test_a_name_is_the_same_with_its_accents_apart() -> None:
    """As another system types it."""
    with pytest.raises(ConfigError, match="twice"):
        ControlConfig(classes=("gr\u00fcn", "gru\u0308n"))


def test_a_unit_is_one_line_too() -> None:
    with pytest.raises(ConfigError, match=r"unit .*line break"):
        ControlConfig(unit="by\ntes")
