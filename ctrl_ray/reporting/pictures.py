"""The report's pictures: their files, titles and captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ctrl_ray.reporting.markup import ReportFigure


class _Words(NamedTuple):
    title: str
    caption: str
    wide: bool = False


_OF_RUN = {
    "distance": _Words(
        "Distance to the target",
        "The line from the objective to log Z is the gap; no training makes it negative. The red marks bound log Z. A hollow "
        "bar: bounds and weights say too little about it.",
        wide=True,
    ),
    "curves": _Words(
        "Curves", "Over the run's updates. Accuracy is by the true measure, never by the reward classifier."
    ),
    "kl_against_accuracy": _Words(
        "KL against accuracy",
        "One point for each evaluation of the run: what accuracy has cost in distance from the pre-trained model.",
    ),
    "kl_per_step": _Words("KL along the trajectory", "Where the policy departs from the pre-trained model."),
}
_OF_CONTROL = {
    "samples": _Words(
        "Samples by {name}",
        "Each column is one prompt and one noise. The number is the measured one; ✓ or ✗ says whether it is in the class asked "
        "for. The pre-trained model is not told the class.",
        wide=True,
    ),
    "confusion": _Words(
        "Confusion matrix of {name}",
        "Rows: class asked for. Columns: class measured by {judged_by}. Share of the row.",
    ),
    "values": _Words("Measured {name}", "Dashed: the thresholds. Shaded: the range asked for."),
    "calibration": _Words(
        "Belief and truth, {name}",
        "Samples in bins of what the reward classifier believes, against the share truly of the class asked for. Below the "
        "dashed line it believes too much. A dot's area grows with its count; bars are 95 % intervals.",
    ),
}


def picture_file(folder: Path, kind: str, control: str | None = None) -> Path:
    """Where a picture of the report lies; control: of those that each control has."""
    if control is None:
        return folder / f"{kind}.png"
    return folder / f"{kind}_{''.join(c if c.isalnum() or c in '-_' else '_' for c in control)}.png"


def described(path: Path | None, kind: str, control: str | None = None, judged_by: str = "") -> ReportFigure | None:
    """A picture with its words; None where it was not drawn."""
    if path is None:
        return None
    words = _OF_RUN[kind] if control is None else _OF_CONTROL[kind]
    title, caption = (part.format(name=control, judged_by=judged_by) for part in words[:2])
    return ReportFigure(title, caption, path, words.wide)


def reliability_pictures(classifiers: Mapping[str, Path]) -> dict[str, Path]:
    """Title to an existing picture of stage 1; classifiers: a folder of each control."""
    places = {
        f"Calibration of the classifier of {name}": folder / "reliability.png" for name, folder in classifiers.items()
    }
    return {title: path for title, path in places.items() if path.is_file()}


def of_stage_1(pictures: Mapping[str, Path]) -> list[ReportFigure]:
    """Pictures of the classifiers, by title, with their words."""
    return [ReportFigure(title, "Stage 1, on held-out data.", path) for title, path in pictures.items()]


def existing_pictures(folder: Path, after: Mapping[str, Any]) -> list[ReportFigure]:
    """Those that a report left in its folder, in the report's order. after: of its summary."""
    found = [described(picture_file(folder, "distance"), "distance")]
    for name, judged in after.get("controls", {}).items():
        found += [
            described(picture_file(folder, kind, name), kind, name, str(judged.get("judged_by")))
            for kind in _OF_CONTROL
        ]
    found += [described(picture_file(folder, kind), kind) for kind in _OF_RUN if kind != "distance"]
    return [figure for figure in found if figure is not None and figure.path.is_file()]
