"""A comparison as people read it: one table in Markdown, and a page with the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctrl_ray.comparison.results import interval
from ctrl_ray.evaluation.metric_names import SCORES
from ctrl_ray.reporting.markup import ReportFigure, html_page, picture, table, text
from ctrl_ray.runs.files import write_whole
from ctrl_ray.wording import duration, text_table

RESULTS, PAGE, MARKDOWN = "results.json", "report.html", "report.md"
QUALITY = (
    *("method", "knob", "accuracy", "macro-F1", "fidelity", "diversity", "distance, worst class", "distance by class"),
    *("path KL / nats", "gap / nats"),
)
COST = ("s an image", "× plain", "forwards", "backwards", "decodes", "decode backwards", "training / s", "images")
HEAD = QUALITY + COST
"""Columns of the one table."""


def table_rows(methods: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row of cells under HEAD for each method, in the order of results.json."""
    return [_row(method) for method in methods]


def _row(method: Mapping[str, Any]) -> list[str]:
    test, cost = method["test"], method["cost"]
    errors, distance = test["errors"], test["common_distance"]
    calls = cost["calls"]
    return [
        method["title"],
        "–" if method["knob"] is None else f"{method['knob']} {method['chosen']:g}",
        share_text(test["accuracy"], errors["accuracy"]),
        share_text(test["macro_f1"], errors["macro_f1"]),
        number_text(test["prompt_fidelity"], errors["prompt_fidelity"], 3),
        number_text(test["diversity"], errors["diversity"], 3),
        distance_text(distance),
        " ".join("–" if ratio is None else f"{ratio:.1f}" for ratio in distance["classes"].values()),
        number_text(test["kl"], errors["kl"], 2),
        gap_text(test),
        f"{cost['seconds']:.3g}",
        f"{cost['ratio']:.2f}",
        *(f"{calls[name]:g}" for name in ("forwards", "backwards", "decodes", "decode_backwards")),
        training_text(method["training"]),
        str(test["num_images"]),
    ]


def share_text(value: float | None, error: float | None) -> str:
    """A share with its 95 % interval."""
    if value is None:
        return "–"
    bounds = interval(value, error)
    return f"{value:.3f}" + ("" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]")


def number_text(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def gap_text(test: Mapping[str, Any]) -> str:
    """The gap with its standard error, and whether it is too wide to say more."""
    return number_text(test["gap"], test["errors"]["gap"], 2) + (" (loose)" if test["too_wide"] else "")


def distance_text(distance: Mapping[str, Any]) -> str:
    if distance["worst"] is None:
        return "–"
    low, high = distance["range"]
    return f"{distance['worst']:.2f}" + (f" ({low:.2f} to {high:.2f})" if high > low else "")


def training_text(runs: Sequence[Mapping[str, Any]] | None) -> str:
    """Mean over runs; '≥' where a run was resumed, and 'given' for adapters that were trained elsewhere."""
    if runs is None:
        return "0"
    if not runs:
        return "given"
    mean = sum(run["seconds"] for run in runs) / len(runs)
    return ("" if all(run["whole"] for run in runs) else "≥ ") + f"{mean:.0f}"


class Table(NamedTuple):
    """One of the smaller tables."""

    title: str
    head: list[str]
    rows: list[list[str]]


def several_controls(methods: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What several controls are judged by besides; nothing where there is one, or of an older results.json."""
    tests = [method["test"] for method in methods]
    controls = list(tests[0].get("control_accuracies", {}))
    if len(controls) < 2:
        return []
    titles = [method["title"] for method in methods]
    shares = [
        [
            share_text(test["joint_accuracy"], test["errors"]["joint_accuracy"]),
            *(number_text(test["control_accuracies"].get(name), None, 3) for name in controls),
        ]
        for test in tests
    ]
    gaps = [
        [name, *(number_text(test["class_gaps"].get(name), None, 1) for test in tests)]
        for name in tests[0]["common_distance"]["classes"]
    ]
    return [
        Table(
            "Each control, and all of them",
            ["method", "all right", *(f"{name} right" for name in controls)],
            [[title, *row] for title, row in zip(titles, shares, strict=True)],
        ),
        Table("Nats from the target, of each joint class", ["joint class", *titles], gaps),
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """The whole comparison as Markdown: table, verdicts, how it was made."""
    lines = [f"# {title_of(results)}", "", *table_lines(HEAD, table_rows(results["methods"])), ""]
    lines += [f"- {line}" for line in notes(results)]
    for part in several_controls(results["methods"]):
        lines += ["", f"## {part.title}", "", *table_lines(part.head, part.rows)]
    if results["verdicts"]:
        lines += ["", "## Where CTRL wins and where it loses", ""]
        lines += [f"- {verdict_text(verdict)}" for verdict in results["verdicts"]]
    for heading, found in _parts(results):
        lines += ["", f"## {heading}", "", *(f"- {line}" for line in found)]
    for kind, file in results["figures"].items():
        lines += ["", f"![{kind}]({file})"]
    return "\n".join(lines) + "\n"


TERMINAL = ("method", "knob", "accuracy", "fidelity", "diversity", "distance, worst class", "gap / nats", "× plain")
"""Columns of what is printed."""


def write(
    folder: Path,
    results: Mapping[str, Any],
    as_markdown: Callable[[Mapping[str, Any]], str],
    as_page: Callable[[Mapping[str, Any], Path], str],
) -> dict[str, Any]:
    """Write results.json, and the report in both forms; returns what results.json holds."""
    as_json = json.dumps(results, indent=2) + "\n"
    found: dict[str, Any] = json.loads(as_json)
    write_whole(folder / RESULTS, as_json)
    write_whole(folder / MARKDOWN, as_markdown(found))
    write_whole(folder / PAGE, as_page(found, folder))
    return found


def terminal_text(results: Mapping[str, Any]) -> str:
    """The columns that a terminal has room for, and the verdicts."""
    columns = [HEAD.index(name) for name in TERMINAL]
    rows = [[row[column] for column in columns] for row in [list(HEAD), *table_rows(results["methods"])]]
    return "\n".join([text_table(rows, left=(0, 1)), *map(verdict_text, results["verdicts"])])


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    every = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in every]


def title_of(results: Mapping[str, Any]) -> str:
    """What was compared."""
    return f"{len(results['methods'])} methods on {task_text(results)}"


def task_text(results: Mapping[str, Any]) -> str:
    """The preset, and the exponent of each control."""
    exponents = ", ".join(f"{name} λ = {exponent:g}" for name, exponent in results["exponents"].items())
    return f"{results['preset']} ({exponents})"


def made_with(results: Mapping[str, Any]) -> str:
    """Command, machine, date and time."""
    facts = results["facts"]
    return f"made with `{results['command']}` on {facts['processor']}, {facts['written']}, in {duration(results['seconds'])}"


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """'wins' or 'loses', the bar, and by what."""
    return f"{'wins' if verdict['met'] else 'loses'}: {verdict['bar']}. {verdict['text']}."


def notes(results: Mapping[str, Any]) -> list[str]:
    """What stands under the table."""
    pool, together = results["pool"], results["runs_at_a_time"]
    lines = [
        f"knobs: chosen by the {results['criterion']}; {results['num_values']} values of each; judged on images with noise "
        "that was used for nothing else",
        f"distance: the first {results['common_test']} test images of each method against exact samples by rejection, of which "
        f"{pool['samples']} pre-trained samples gave {_counts(pool['exact'])}; 1 is as good as exact",
        "intervals of accuracy and macro-F1 are 95 %, ± is a standard error, of several seeds that of their mean",
        "gap: nats of a path's law to the target's; it and the path KL exist where a path's density is known",
        "cost: seconds in one process, beside plain sampling on the same images, in pairs; rows of the denoiser and decodes "
        f"of an image, the final decode among them; {results['batch_size']} images at a time, those of an adapter all for one "
        f"class, as `sample` draws them{_mixed(results['methods'])}",
        *([f"training: seconds of a run while {together} train side by side, one thread each"] if together > 1 else []),
        made_with(results),
    ]
    return lines + [row["note"] for row in results["methods"] if row.get("note")]


def _mixed(methods: Sequence[Mapping[str, Any]]) -> str:
    """What adapters cost where the classes of a batch differ."""
    mixed = [f"{row['title']} {row['cost_mixed']['ratio']:.2f} ×" for row in methods if row["cost_mixed"]]
    return f" (of several classes: {', '.join(mixed)})" if mixed else ""


def _counts(exact: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in exact.items())


def _parts(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The smaller sections that there are, with a line for each of their facts."""
    parts = []
    if results["classifiers"]:
        parts.append(("The shipped classifier beside the comparison's own", classifier_lines(results["classifiers"])))
    if lines := score_lines(results["methods"]):
        parts.append(("Scores of the images", lines))
    if results["held_out"]:
        parts.append(("CTRL on prompts that it was not trained on", held_out_lines(results["held_out"])))
    if results["windows"]:
        parts.append(("When the push begins later", window_lines(results["windows"])))
    parts.append(("Values of the knobs on the validation images", validation_lines(results["methods"])))
    return parts


def classifier_lines(classifiers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of each control how far the two classifiers differ."""
    lines = []
    for name, found in classifiers.items():
        own, shipped = found["own"], found["shipped"]
        line = (
            f"{name}: on {found['num_images']} pre-trained images the two differ by {found['total_variation']:.3f} in total "
            "variation"
        )
        if "nll" in own:
            line += (
                f"; accuracy {own['accuracy']:.3f} (own) and {shipped['accuracy']:.3f} (shipped), NLL {own['nll']:.3f} and "
                f"{shipped['nll']:.3f}, ECE {own['ece']:.3f} and {shipped['ece']:.3f}"
            )
        z = ", ".join(f"{key} {value:.2f} and {shipped['log_z'][key]:.2f}" for key, value in own["log_z"].items())
        lines.append(f"{line}; log Z {z}")
    return lines


def score_lines(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each method those of `metric_names.SCORES` that were measured."""
    lines = []
    for method in methods:
        test = method["test"]
        known = [name for name in SCORES if test.get(name) is not None]
        words = [f"{name.replace('_', ' ')} {number_text(test[name], test['errors'][name], 3)}" for name in known]
        lines += [f"{method['title']}: {', '.join(words)}"] if words else []
    return lines


def held_out_lines(held_out: Mapping[str, Any]) -> list[str]:
    """Accuracy, gap and fidelity, on the prompts that were held back and on those it was trained on."""
    lines = [f"held back: {', '.join(held_out['prompts'])}"]
    for side, words in (("held_out", "held back"), ("trained", "trained on")):
        row = held_out[side]
        lines.append(
            f"{words}: accuracy {share_text(row['accuracy'], row['errors']['accuracy'])}, gap "
            f"{number_text(row['gap'], row['errors']['gap'], 2)} nats, fidelity "
            f"{number_text(row['prompt_fidelity'], row['errors']['prompt_fidelity'], 3)} ({row['num_images']} images)"
        )
    return lines


def window_lines(windows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each method that pushes steps: accuracy and distance by the share of the steps, noise first, that it leaves alone."""
    lines = []
    for method in windows:
        cells = []
        for row in method["starts"]:
            worst = "–" if row["worst"] is None else f"{row['worst']:.2f}"
            accuracy = "–" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
            cells.append(f"from {row['start']:.0%} of the steps on {accuracy}, {worst} floors")
        lines.append(f"{method['title']}: {'; '.join(cells)}")
    return lines


def validation_lines(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each method with a knob: its values, each with the worst class's distance, and which was chosen."""
    lines = []
    for method in methods:
        if not method["validation"]:
            continue
        cells = []
        for row in method["validation"]:
            worst = "–" if row["worst"] is None else f"{row['worst']:.2f}"
            cell = f"{row['value']:g}: {worst}"
            cells.append(f"{cell} (chosen)" if row["value"] == method["chosen"] else cell)
        lines.append(f"{method['title']} ({method['knob']}): {', '.join(cells)}")
    return lines


def page(results: Mapping[str, Any], folder: Path) -> str:
    """The same as one HTML file, with the pictures inside."""
    rows = table_rows(results["methods"])
    wins = [f"<li>{text(verdict_text(verdict))}</li>" for verdict in results["verdicts"]]
    sections = [
        f"<h1>{text(title_of(results))}</h1>",
        f"<ul class='findings'>{''.join(wins)}</ul>" if wins else "",
        _columns_html(rows, [*QUALITY, "× plain"]),
        list_html(notes(results)),
        *(f"<h2>{text(part.title)}</h2>{_table_html(part)}" for part in several_controls(results["methods"])),
        *(
            picture(ReportFigure(kind, caption, folder / results["figures"][kind], wide=True))
            for kind, caption in CAPTIONS.items()
            if kind in results["figures"]
        ),
        "<h2>What an image costs, and the training</h2>",
        _columns_html(rows, ["method", *COST]),
        *(f"<h2>{text(heading)}</h2>{list_html(found)}" for heading, found in _parts(results)),
        "<h2>Made with</h2>",
        table([(text(key), text(value)) for key, value in results["facts"].items()]),
    ]
    return html_page(title_of(results), sections)


def _columns_html(rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """Some columns of the one table, which is wider than a page."""
    columns = [HEAD.index(name) for name in names]
    return _table_html(Table("", list(names), [[row[column] for column in columns] for row in rows]))


def _table_html(part: Table) -> str:
    return table([[text(cell) for cell in row] for row in part.rows], part.head)


CAPTIONS = {
    "Accuracy against cost": "Share of images truly of the class asked for, with 95 % intervals. Blue: trained methods.",
    "Distance against cost": "Of the worst class, over the distance of exact samples to exact samples (dashed: 1). Bars: range "
    "over seeds.",
    "Samples": "The number is the measured one; ✓ or ✗ says whether it is in the class asked for.",
}
"""Title of each picture, and what it shows."""


def list_html(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""
