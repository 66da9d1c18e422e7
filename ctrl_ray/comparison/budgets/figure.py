"""The picture of a comparison over label budgets: accuracy and distance against the number of labelled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure
from ctrl_ray.comparison.budgets.lines import LINES
from ctrl_ray.comparison.figures import UNTRAINED, plain_ticks

TITLE = "Accuracy and distance against labels"
CAPTION = (
    "Mean over seeds; the band is from the lowest to the highest. Grey: the pre-trained model. Dashed: all right, and as near "
    "as exact samples."
)
_COLOURS = {"ctrl": AFTER, "cfg": "#b5402a", "classifier_guidance": UNTRAINED}
_STYLES = ("-", "--", ":")
"""Of the lines of one method, in their order."""


def plot_budgets(path: Path, results: Mapping[str, Any]) -> Path | None:
    """Two panels; one where no oracle measures the accuracy, None where no distance is known either."""
    panels = [panel for panel in (_ACCURACY, _DISTANCE) if _known(results["rows"], panel)]
    if not panels:
        return None
    with new_figure(path, 5.0 * len(panels), 4.6) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (label, key, target, log) in zip(axes, panels, strict=True):
            axis.axhline(target, color=INK, linestyle="--", linewidth=0.8)
            _draw(axis, results, key, log=log)
            axis.set_xlabel("labelled images")
            axis.set_ylabel(label)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if len(panels) == 1 else 2)
    return path


def _accuracy(numbers: Mapping[str, Any]) -> float | None:
    value: float | None = numbers["accuracy"]
    return value


def _distance(numbers: Mapping[str, Any]) -> float | None:
    value: float | None = numbers["common_distance"]["worst"]
    return value


_Panel = tuple[str, Any, float, bool]
_ACCURACY: _Panel = ("accuracy (true class)", _accuracy, 1.0, False)
_DISTANCE: _Panel = ("distance to the target, worst class / noise floor", _distance, 1.0, True)


def _known(rows: Sequence[Mapping[str, Any]], panel: _Panel) -> bool:
    return all(panel[1](seed) is not None for row in rows for seed in row["seeds"])


def _draw(axis: Any, results: Mapping[str, Any], key: Any, *, log: bool) -> None:
    budgets = results["budgets"]
    axis.set_xscale("log")
    if log:
        axis.set_yscale("log")
    used: dict[str, int] = {}
    for name in dict.fromkeys(row["line"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["line"] == name]
        values = [[key(seed) for seed in row["seeds"]] for row in rows]
        method = LINES[name].method
        style = _STYLES[used.setdefault(method, 0) % len(_STYLES)]
        used[method] += 1
        means = [sum(each) / len(each) for each in values]
        axis.plot(budgets, means, style, color=_COLOURS[method], marker="o", markersize=3.5, label=rows[0]["title"])
        axis.fill_between(
            budgets, [min(v) for v in values], [max(v) for v in values], color=_COLOURS[method], alpha=0.12
        )
    plain = key(results["pre_trained"])
    if plain is not None:
        axis.axhline(plain, color=BEFORE, linewidth=1.2)
    axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.xaxis.set_minor_locator(NullLocator())
    if log:
        plain_ticks(axis.yaxis, *axis.get_ylim())
