"""Whether a fitted classifier can be relied on: what stops a fit, and what people must be told about its figures.

A fit with only one class to tell is an error. What may be meant (a class without rows, an accuracy no better than a constant
answer, a temperature that the held-out rows do not determine) is a doubt: a line with the figures, the same after the fit and
before a run that is given the folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.classifiers.calibration import COOLEST, HOTTEST, Temperature
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError

_STANDARD_ERRORS = 2.0
"""An accuracy counts as better than a constant answer's when it is so by more than this many standard errors."""
_USUAL_TEMPERATURES = (0.1, 10.0)
"""Where a folder does not say how well its temperature is determined, one outside is doubted."""
_SHOWN_CLASSES = 8


def check_classes(
    control: str, spec: ControlConfig, counts: Sequence[int], rows: str, span: tuple[float, float] | None
) -> None:
    """DataError unless at least two classes have rows: with one there is nothing to tell apart.

    counts: Rows of each class. rows: What they are, such as 'rows to fit on'. span: Smallest and largest measured number, where
    the control has thresholds.
    """
    filled = [name for name, number in zip(spec.class_names, counts, strict=True) if number]
    if len(filled) > 1:
        return
    total = sum(counts)
    got = f"all {total} {rows} are of class {filled[0]!r}" if filled else f"there are no {rows}"
    if spec.thresholds:
        unit = f" {spec.unit}" if spec.unit else ""
        borders = ", ".join(f"{threshold:g}" for threshold in spec.thresholds)
        lie = f": its numbers lie between {span[0]:g} and {span[1]:g}{unit}" if span else ""
        advice = f"the thresholds are {borders}; choose some between the numbers that the data has"
        raise DataError(f"control {control!r}{lie}, and {got}; expected at least two classes with rows; {advice}")
    raise DataError(
        f"control {control!r}: {got}; expected at least two of {list(spec.class_names)} with rows; give rows of other classes "
        f"too, or correct the column {spec.column or control!r}"
    )


def class_rows(labels: Tensor, num_classes: int) -> list[int]:
    """Rows of each class."""
    return torch.bincount(labels.cpu(), minlength=num_classes).tolist()


def gain_over_commonest(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """How much more often the most probable class is right than the answer that is always the commonest label: the difference
    of the two shares over the same rows, and its standard error."""
    target = labels.long().cpu()
    commonest = int(torch.bincount(target).argmax())
    gain = (logits.argmax(1).cpu() == target).double() - (target == commonest).double()
    return {
        "commonest": commonest,
        "share": float((target == commonest).double().mean()),
        "gain": float(gain.mean()),
        "standard_error": float(gain.std(correction=0)) / math.sqrt(len(target)),
    }


def evidence(
    everything: Tensor, fitting: np.ndarray, logits: Tensor, labels: Tensor, temperature: Temperature
) -> dict[str, Any]:
    """What `doubts` is told by: rows of each class, the gain over a constant answer, the temperature's interval.

    everything: Labels of all rows. fitting: Numbers of those to fit on. logits, labels: Of the held-out rows that are judged.
    """
    num_classes = logits.shape[1]
    return {
        "class_rows": {
            "all": class_rows(everything, num_classes),
            "fitting": class_rows(everything[fitting], num_classes),
            "judged": class_rows(labels, num_classes),
        },
        "commonest": gain_over_commonest(logits, labels),
        "temperature": temperature._asdict(),
    }


def doubts(classes: Sequence[str], temperature: float, calibration: Mapping[str, Any]) -> tuple[str, ...]:
    """What a classifier folder's own figures give to doubt, a sentence each; folders of earlier versions tell less."""
    try:
        return (
            *_about_classes(classes, calibration),
            *_about_accuracy(classes, calibration),
            *_about_temperature(temperature, calibration),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        return ("its classifier.json does not tell how good it is on held-out images",)


def warning_lines(control: str, found: Sequence[str]) -> list[str]:
    """Doubts as lines for people."""
    return [f"warning: classifier of {control}: {doubt}" for doubt in found]


def _about_classes(classes: Sequence[str], calibration: Mapping[str, Any]) -> list[str]:
    rows, lines = calibration.get("class_rows"), []
    if rows is None:
        return []
    named: set[int] = set()
    for key, what, means in (
        ("all", "no row at all", "nothing teaches what it looks like, and its probability means nothing"),
        ("fitting", "no row to fit on", "nothing teaches what it looks like, and its probability means nothing"),
        ("judged", "no held-out row", "the figures say nothing about it"),
    ):
        empty = [index for index, number in enumerate(rows[key]) if not number and index not in named]
        named.update(empty)
        if empty:
            names = ", ".join(repr(classes[index]) for index in empty[:_SHOWN_CLASSES])
            names += f" and {len(empty) - _SHOWN_CLASSES} more" if len(empty) > _SHOWN_CLASSES else ""
            advice = "give more rows of it, or leave it out of the classes"
            lines.append(f"{what} (of {sum(rows[key])}) is of class {names}: {means}; {advice}")
    return lines


def _about_accuracy(classes: Sequence[str], calibration: Mapping[str, Any]) -> list[str]:
    judged, accuracy = _judged(calibration)
    if judged is None:
        return []
    against = calibration.get("commonest")
    if against is None:  # at least that often the commonest class is right
        gain, error = accuracy - 1 / len(classes), math.sqrt(accuracy * (1 - accuracy) / judged)
        constant = f"of guessing among {len(classes)} classes"
    else:
        gain, error = against["gain"], against["standard_error"]
        constant = f"of always answering the commonest class {classes[against['commonest']]!r}"
    if gain > _STANDARD_ERRORS * error:
        return []
    figures = f"{accuracy:.3f} on {_counted(judged, 'held-out image')}"
    difference = f"difference {gain:+.3f}, standard error {error:.3f}"
    return [
        f"accuracy {figures} is not shown to be better than the {accuracy - gain:.3f} {constant} ({difference}): it may have "
        "learned nothing; fit for longer (classifier.epochs), or give more data"
    ]


def _about_temperature(temperature: float, calibration: Mapping[str, Any]) -> list[str]:
    advice = "give more data, or a larger third share of classifier.split"
    found = calibration.get("temperature")
    if found is not None:
        known = Temperature(**found)
        if not known.is_determined:
            return [f"the temperature {temperature:.4g} is not calibrated: {_why(known)}; {advice}"]
        if known.low <= temperature <= known.high:
            return []
    judged, accuracy = _judged(calibration)
    wrong = None if judged is None else round((1 - accuracy) * judged)
    low, high = _USUAL_TEMPERATURES
    if low <= temperature <= high and (wrong != 0 or temperature == 1):
        return []
    rows = "" if wrong is None else f" from {_counted(judged or 0, 'held-out image')}, {wrong} of them wrong,"
    return [
        f"the temperature {temperature:.4g}{rows} is unreliable (expected {low:g} to {high:g}, from images of which some are "
        f"wrong): a low one makes the probabilities too sharp, a high one says nothing; fit again; {advice}"
    ]


def _why(known: Temperature) -> str:
    rows = _counted(known.num_rows, "held-out image")
    if known.num_errors == 0:
        return f"there are no errors on {rows}, which fit every lower temperature better, so it stays at 1"
    if known.high >= HOTTEST:
        return (
            f"{rows} ({_counted(known.num_errors, 'error')}) fit every higher temperature about as well, up to the limit of "
            f"{HOTTEST:.0f}, so it stays at 1"
        )
    low = f"the limit of {COOLEST:.4f}" if known.low <= COOLEST else f"{known.low:.2g}"
    return (
        f"{rows} ({_counted(known.num_errors, 'error')}) are too few: they only place it between {low} and {known.high:.2g}, "
        "so it stays at 1"
    )


def _judged(calibration: Mapping[str, Any]) -> tuple[int | None, float]:
    """Held-out rows and the accuracy on them; (None, nan) where the folder does not tell."""
    if "num_rows" not in calibration or "after" not in calibration:
        return None, math.nan
    rows, accuracy = calibration["num_rows"].get("judged"), calibration["after"].get("accuracy")
    return (int(rows), float(accuracy)) if rows and accuracy is not None else (None, math.nan)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
