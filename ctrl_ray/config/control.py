"""A control and what is asked of its classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctrl_ray.config.values import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """One control y: its classes, what measures it, and how hard it pulls."""

    guidance_strength: float = 1.0
    """gamma, how hard this control pulls. The target is p_pre(x|c) p(y|x,c)^(guidance_strength / kl_coef), so with
    kl_coef = 1 it is the exponent itself. Higher: more accurate, more KL, less diverse."""
    oracle: str | None = None
    """What measures the true value of an image: 'jpeg_size', 'colourfulness' or 'my_module:my_oracle' (a function
    from a PIL image to a number). None: nothing does; then only a classifier can judge the accuracy after training."""
    thresholds: tuple[float, ...] = ()
    """Class borders of a measured number, ascending: class i is [thresholds[i-1], thresholds[i]). Empty: the data
    column already holds integer labels."""
    classes: tuple[str, ...] = ()
    """Class names, one for each output of the classifier. Empty with thresholds: the names are made from the
    thresholds."""
    unit: str = ""
    """Unit of the measured number, such as 'bytes'. Pictures show it."""
    column: str | None = None
    """Column of the offline data set. None: the control's name."""
    classifier: str | None = None
    """Folder of a fitted classifier. None: stage 1 fits one from `data`."""
    label_weights: tuple[float, ...] = ()
    """How often training draws each class, as relative weights. Empty: all classes equally often."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.guidance_strength) and self.guidance_strength >= 0,
            f"guidance_strength is {self.guidance_strength}; expected a finite number >= 0 (0 switches the control off)",
        )
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
        if self.label_weights:
            require(
                len(self.label_weights) == self.num_classes
                and min(self.label_weights) >= 0
                and sum(self.label_weights) > 0,
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
    """Give the classifier the prompt too. It needs the prompt when y depends on it even for a given image."""
    epochs: int = 12
    """Passes over the fitting split. The epoch with the lowest negative log-likelihood on the selection split is
    kept."""
    learning_rate: float = 2e-3
    """Peak learning rate of the one-cycle schedule (AdamW)."""
    weight_decay: float = 0.01
    """AdamW weight decay of the network."""
    batch_size: int = 128
    """Images per optimizer update, over all workers."""
    max_images: int | None = None
    """Use at most this many rows of the data set. None: all."""
    num_pipeline_samples: int = 0
    """Also fit on this many samples of the pre-trained pipeline, labelled by the oracle, because the reward will
    judge images of this kind. The control needs an oracle for it."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the rows for fitting, for choosing the epoch, and for temperature scaling."""
    decode: bool = True
    """Pass every image through the pipeline's VAE first, and measure its label again where there is an oracle. The
    reward sees only decoded images."""
    num_workers: int = 1
    """Ray Train workers that fit the classifier."""

    def __post_init__(self) -> None:
        require(
            len(self.split) == 3 and min(self.split) > 0 and abs(sum(self.split) - 1) < 1e-6,
            f"classifier split {self.split} must be three positive shares that add up to 1",
        )
        for name in ("epochs", "batch_size", "num_workers"):
            require(getattr(self, name) >= 1, f"classifier {name} is {getattr(self, name)}; expected at least 1")
        kind = self.network.partition(":")[0]
        require(
            self.network == "cnn" or (kind in ("clip", "transformers") and ":" in self.network),
            f"classifier network {self.network!r} is unknown; expected 'cnn', 'clip:NAME_OR_FOLDER' or "
            "'transformers:NAME_OR_FOLDER'",
        )
