"""A control and what is asked of its classifier."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ctrl_ray.config.fields import above, at_least, check_fields
from ctrl_ray.config.values import require
from ctrl_ray.errors import ConfigError

_ATTRIBUTES = """
T_destination add_module apply bfloat16 buffers call_super_init children clear compile copy cpu cuda double dump_patches eval
extra_repr float forward fromkeys get get_buffer get_extra_state get_parameter get_submodule half ipu items keys load_state_dict
modules mtia named_buffers named_children named_modules named_parameters parameters pop popitem register_backward_hook
register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule setdefault share_memory
state_dict to to_empty train training type update values xpu zero_grad
"""
_TAKEN = frozenset(_ATTRIBUTES.split())
"""Attributes of torch's containers of modules and parameters, in which a control's name is a key."""
_NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, halves of surrogate pairs, and separators of lines and paragraphs."""
_LINE_ENDS = ("\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029")


def check_text(what: str, text: str) -> None:
    """ConfigError where a name of a class, or a unit, is no line of text: people see it in figures, tables and messages, and
    give it on command lines."""
    bad = next((letter for letter in text if unicodedata.category(letter) in _NOT_IN_A_LINE), None)
    if bad is not None:
        half = unicodedata.category(bad) == "Cs"
        kind = "a line break" if bad in _LINE_ENDS else "half of a surrogate pair" if half else "a control character"
        raise ConfigError(
            f"{what} {text!r} has {kind} (U+{ord(bad):04X}) in it; expected one line of text; leave it out"
        )


def check_class_names(names: Sequence[str]) -> None:
    """ConfigError unless each class has a name of its own that can be shown: the one rule for them, whoever gives them."""
    for name in names:
        check_text("class name", name)
        seen = any(unicodedata.category(letter)[0] in "LMNPS" for letter in name)
        require(seen, f"classes {names} has a name without a letter ({name!r}); expected a name for each class")
    composed = [same_text(name) for name in names]
    twice = next((name for index, name in enumerate(composed) if name in composed[:index]), None)
    require(twice is None, f"classes {names} names {twice!r} twice; expected a different name for each class")


def same_text(text: str) -> str:
    """The text in composed form: a name typed on another system, with its accents apart, is the same name."""
    return unicodedata.normalize("NFC", text)


def check_control_name(name: str) -> None:
    """ConfigError where a control cannot be called so: it is a key of settings, flags, files and torch modules."""
    require(
        name.isidentifier() and not name.startswith("_"),
        f"control name {name!r} is not an identifier; expected letters, digits and underscores, a letter first",
    )
    require(name not in _TAKEN, f"control name {name!r} is taken by torch's modules; call the control otherwise")


def check_network(what: str, network: str) -> None:
    """ConfigError unless it names a kind of classifier network, and for a pre-trained one the model."""
    kind, colon, source = network.partition(":")
    require(
        network == "cnn" or (kind in ("clip", "transformers") and bool(colon and source)),
        f"{what} {network!r} is unknown; expected 'cnn', 'clip:NAME_OR_FOLDER' or 'transformers:NAME_OR_FOLDER'",
    )


def control_name_of(column: str) -> str:
    """A name that `check_control_name` takes, as near as can be to a column's: 'my stars' becomes 'my_stars'."""
    name = "".join(sign if f"a{sign}".isidentifier() else "_" for sign in column).lstrip("_")
    if not name.isidentifier():
        name = f"control_{name}"
    return f"{name}_value" if name in _TAKEN else name


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """One control y: its classes, what measures it, and how hard it pulls."""

    guidance_strength: Annotated[float, at_least(0)] = 1.0
    """gamma, how hard this control pulls. The target is p_pre(x|c) p(y|x,c)^(guidance_strength / kl_coef), so with
    kl_coef = 1 it is the exponent itself. Higher: more accurate, more KL, less diverse."""
    oracle: str | None = None
    """What measures the true value of an image: 'jpeg_size', 'colourfulness', 'clip_head:FILE' (a score by a head on CLIP's
    features, `ctrl_ray.classifiers.clip_head`) or 'my_module:my_oracle' (a function from a PIL image to a number; if it
    has a parameter `prompt`, it gets the prompt too). None: nothing measures it, and the report leaves the accuracy empty."""
    thresholds: tuple[float, ...] = ()
    """Class borders of a measured number, ascending: class i is [thresholds[i-1], thresholds[i]). Empty: the data
    column already holds integer labels or class names."""
    classes: tuple[str, ...] = ()
    """Class names, one for each output of the classifier. Empty with thresholds: the names are made from the
    thresholds."""
    unit: str = ""
    """Unit of the measured number, such as 'bytes'. Pictures show it."""
    column: str | None = None
    """Column of the offline data set. None: the column with the control's name."""
    classifier: str | None = None
    """Folder of a fitted classifier. None: stage 1 fits one from `data`."""
    network: str | None = None
    """Network of the classifier that stage 1 fits, such as 'clip:NAME_OR_FOLDER'. None: the one in classifier.network."""
    label_weights: Annotated[tuple[float, ...], at_least(0)] = ()
    """How often training draws each class, as relative weights. Empty: all classes equally often."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            list(self.thresholds) == sorted(set(self.thresholds)),
            f"thresholds {self.thresholds} must be strictly ascending",
        )
        if self.thresholds and self.classes:
            require(
                len(self.classes) == len(self.thresholds) + 1,
                f"{len(self.thresholds)} thresholds make {len(self.thresholds) + 1} classes, but classes names "
                f"{len(self.classes)}: {self.classes}",
            )
        check_class_names(self.classes)
        check_text("unit", self.unit)
        if self.network is not None:
            check_network("network of a control", self.network)
        if self.label_weights:
            require(
                len(self.label_weights) == self.num_classes and sum(self.label_weights) > 0,
                f"label_weights {self.label_weights} must hold one weight >= 0 for each of the {self.num_classes} "
                "classes, not all zero",
            )

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 while unknown (a classifier folder given, not yet read)."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, made from the thresholds where none are given: '<1500', '1500-1700', '>=1700'."""
        if self.classes or not self.thresholds:
            return self.classes
        t = [f"{value:g}" for value in self.thresholds]
        return (f"<{t[0]}", *(f"{low}-{high}" for low, high in zip(t, t[1:], strict=False)), f">={t[-1]}")

    def classify(self, value: float) -> int:
        """Class index of a measured value: the number of thresholds that are <= value."""
        return sum(value >= threshold for threshold in self.thresholds)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """Stage 1: how p(y|x,c) is fitted and calibrated."""

    network: str = "cnn"
    """'cnn' (small convolutional network), 'clip:NAME_OR_FOLDER' (head on a CLIP vision tower), or
    'transformers:NAME_OR_FOLDER' (any image-classification backbone)."""
    prompt_conditional: bool = False
    """Give the classifier the prompt too. It needs the prompt when the same image gets another label under another
    prompt: thresholds or annotators that differ by prompt, or the label "does it match its prompt?". Without it the
    classifier learns the average over prompts, and the policy misses its target by what `python -m ctrl_ray.verify
    --problem prompt-dependent` shows. Leave it off where the image alone decides the label: the fit then needs fewer images."""
    ignore_prompts: bool = False
    """Read the labelled images as pairs (x, y), as if they had no prompts. CFG fine-tuning then learns the label with
    the empty prompt only."""
    epochs: Annotated[int, at_least(1)] = 12
    """Passes over the fitting split. The epoch with the lowest negative log-likelihood on the selection split is
    kept."""
    learning_rate: Annotated[float, above(0)] = 2e-3
    """Peak learning rate of the one-cycle schedule (AdamW)."""
    weight_decay: Annotated[float, at_least(0)] = 0.01
    """AdamW weight decay of the network."""
    batch_size: Annotated[int, at_least(1)] = 128
    """Images per optimizer update, over all workers."""
    max_images: Annotated[int | None, at_least(1)] = None
    """Use at most this many rows of the data set. None: all."""
    num_pipeline_samples: Annotated[int, at_least(0)] = 0
    """Also fit on this many samples of the pre-trained pipeline, because the reward will judge images of this kind. The
    oracle labels them, so the control needs one."""
    split: Annotated[tuple[float, float, float], above(0)] = (0.8, 0.1, 0.1)
    """Shares of the rows for fitting, for choosing the epoch, and for temperature scaling."""
    decode: bool = True
    """Pass every image through the pipeline's VAE first, because the reward sees only decoded images. An oracle, if there
    is one, measures the label again."""
    num_workers: Annotated[int, at_least(1)] = 1
    """Ray Train workers that fit the classifier."""

    def __post_init__(self) -> None:
        check_fields(self, "classifier")
        require(
            abs(sum(self.split) - 1) < 1e-6,
            f"classifier split {self.split} must be three positive shares that add up to 1",
        )
        require(
            not (self.ignore_prompts and self.prompt_conditional),
            "classifier.prompt_conditional needs the prompts that classifier.ignore_prompts leaves out; give one of the two",
        )
        check_network("classifier network", self.network)
