"""The report of a run as one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrl_ray.config import ControlConfig, SamplerConfig
from ctrl_ray.evaluation.findings import findings_text
from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS, METRICS, definition
from ctrl_ray.reporting.distance import distance_section
from ctrl_ray.reporting.markup import ReportFigure, html_page, picture, plus_minus, table, text
from ctrl_ray.reporting.summary import baseline_of
from ctrl_ray.reporting.summary_text import number_of, rows_by_control
from ctrl_ray.wording import floor_text, gap_text, measured_text


def render_page(
    summary: Mapping[str, Any],
    figures: Sequence[ReportFigure],
    *,
    controls: Mapping[str, ControlConfig],
    prompt: str,
    source: Source,
    facts: Mapping[str, str],
    config_json: str | None,
    sampler: SamplerConfig | None = None,
) -> str:
    """The page's text (UTF-8). `summary` is that of `make_summary`; every text from outside is escaped. `sampler`: the one
    that the policy was trained for, where it is known."""
    sections = [
        _headline(summary, controls),
        "<h2>Before and after</h2>",
        _metrics_table(summary),
        distance_section(summary["after"], sampler),
        *(_control_section(name, summary) for name in controls),
        _notes(summary),
        "<h2>Pictures</h2>",
        *(picture(figure) for figure in figures),
        "<h2>Sample from it</h2>",
        sampling_commands(controls, prompt, source),
        "<h2>What the numbers mean</h2>",
        _definitions(),
        "<h2>Made with</h2>",
        table([(text(key), text(value)) for key, value in facts.items()]),
    ]
    if config_json is not None:
        sections.append(f"<details><summary>All settings of the run</summary><pre>{text(config_json)}</pre></details>")
    return html_page(f"ctrl_ray: {', '.join(controls)}", sections)


def _headline(summary: Mapping[str, Any], controls: Mapping[str, ControlConfig]) -> str:
    after, names = summary["after"], ", ".join(controls)
    if after["accuracy"] is None:
        sentence = f"{after['num_samples']} samples; their accuracy could not be measured (see the notes)."
    else:
        sentence = f"Of {after['num_samples']} samples, {_accuracies(summary)}."
        if after["kl"] is not None:
            floor = _floor(summary, " (floor {})")
            sentence += f" {_who(summary)} is {after['kl']:.2f} nats from the pre-trained model{floor}."
    if after.get("gap") is not None:
        sentence += f" It is {gap_text(after)}."
    found = "".join(
        f"<li>{text(words)}</li>" for words in findings_text(after.get("not_learned", ()), baseline_of(summary))
    )
    return f"<h1>One more control: {text(names)}</h1><p class='lead'>{text(sentence)}</p>" + (
        f"<ul class='findings'>{found}</ul>" if found else ""
    )


def _who(summary: Mapping[str, Any]) -> str:
    return f"Method {summary['method']}" if "method" in summary else "The policy"


def _accuracies(summary: Mapping[str, Any]) -> str:
    """What share hit the class asked for, before and after: of every judged control, with several of them the mean beside."""
    names = [name for name, control in summary["after"]["controls"].items() if control["accuracy"] is not None]
    if len(names) == 1:
        return _share(summary, "accuracy", None, "are truly of the class that was asked for")
    words = ["are truly of the {} class asked for", *["of the {} class"] * (len(names) - 1)]
    each = [_share(summary, "accuracy", name, part.format(name)) for name, part in zip(names, words, strict=True)]
    parts = [", ".join(each), f"the mean is {_share(summary, 'accuracy', None)}"]
    if summary["after"]["joint_accuracy"] is not None:
        parts.append(_share(summary, "joint_accuracy", None, "have every class asked for"))
    return "; ".join(parts)


def _share(summary: Mapping[str, Any], name: str, control: str | None, words: str = "") -> str:
    was, now = (number_of(summary[side], name, control) if side in summary else None for side in ("before", "after"))
    assert now is not None
    when = "before training" if "method" not in summary else "of the pre-trained model's"
    earlier = "" if was is None else f"({was:.1%} {when})"
    return " ".join(part for part in (f"{now:.1%}", words, earlier) if part)


def _metrics_table(summary: Mapping[str, Any]) -> str:
    sides = [side for side in ("before", "after") if side in summary]
    head = ["<th></th>", *(f"<th class='n'>{side}</th>" for side in sides)]
    if "changes" in summary:
        head.append("<th class='n'>change</th>")
    rows = []
    controls = list(summary["after"]["controls"])
    for name in EVALUATION_METRICS:
        if name == "joint_accuracy" and len(controls) == 1:
            continue
        for label, control in rows_by_control(name, controls):
            if any(number_of(summary[side], name, control) is not None for side in sides):
                rows.append(_metrics_row(summary, sides, name, label, control))
    return (
        f"<div class='scroll'><table><tr>{''.join(head)}</tr>{''.join(rows)}</table></div>"
        + (
            "<p class='note'>± is one standard error. The truth is measured on the decoded samples, never by the classifier "
            "that was the reward. Before and after share prompts and noise; where a change has a ±, it comes from the "
            "paired differences.</p>"
            if "before" in summary
            else "<p class='note'>± is one standard error. The truth is measured on the images themselves.</p>"
        )
        + _floor(summary, "<p class='note'>A KL below its floor, {} nats, cannot be told from rounding.</p>")
    )


def _metrics_row(summary: Mapping[str, Any], sides: Sequence[str], name: str, label: str, control: str | None) -> str:
    """One number, of all controls or of one, with its change where both sides are there."""
    words = _label(name, label) + (_floor(summary, " (floor {})") if name == "kl" else "")
    cells = [f"<td>{text(words)}</td>"]
    for side in sides:
        part = summary[side] if control is None else summary[side]["controls"][control]
        cells.append(_cell(name, part[name], part["standard_errors"][name]))
    if "changes" in summary:
        cells.append(_change(name, summary, control))
    return f"<tr>{''.join(cells)}</tr>"


def _floor(summary: Mapping[str, Any], sentence: str) -> str:
    """The sentence with the KL's noise floor in it; '' where that is not known."""
    floor = summary.get("kl_noise_floor")
    return "" if floor is None else sentence.format(floor_text(floor))


def _label(name: str, label: str) -> str:
    """`label` is `name`, or `name` with more behind it, which stays as it is."""
    unit = definition(name).unit
    words = name.replace("_", " ").replace("kl", "KL").replace("f1", "F1") + (f" / {unit}" if unit != "1" else "")
    return words + label.removeprefix(name).replace("/", " of ", 1)


def _cell(name: str, value: float | None, error: float | None) -> str:
    if value is None:
        return "<td class='n'>not measured</td>"
    if name == "num_samples":
        return f"<td class='n'>{value:.0f}</td>"
    return f"<td class='n'>{value:.3f}{plus_minus(error)}</td>"


def _change(name: str, summary: Mapping[str, Any], control: str | None) -> str:
    changes, key = summary["changes"], name if control is None else f"{name}/{control}"
    before, after = (number_of(summary[side], name, control) for side in ("before", "after"))
    if name == "diversity" and changes["diversity_ratio"] is not None:
        return f"<td class='n'>× {changes['diversity_ratio']:.2f}</td>"
    if key in changes and changes[key]["mean"] is not None:
        paired = changes[key]
        return f"<td class='n'>{paired['mean']:+.3f}{plus_minus(paired['standard_error'])}</td>"
    if name == "num_samples" or before is None or after is None:
        return "<td></td>"
    return f"<td class='n'>{after - before:+.3f}</td>"


def _control_section(name: str, summary: Mapping[str, Any]) -> str:
    control = summary["after"]["controls"][name]
    title = f"<h3>{text(name)}</h3>"
    if control["judged_by"] is None:
        return title + "<p>Not measured; see the notes.</p>"
    low, high = control["accuracy_interval"] or (None, None)
    interval = "" if low is None else f", 95 % interval {low:.1%} to {high:.1%}"
    sentence = f"Judged by {control['judged_by']} on {control['num_samples']} samples that ask for a class{interval}."
    if control["belief_gap"] is not None:
        believed = f" The reward classifier believes {control['believed_accuracy']:.1%}"
        sentence += f"{believed}; the truth is {control['accuracy']:.1%}."
    values = ""
    if control["values"] is not None:
        unit = f" / {control['unit']}" if control["unit"] else ""
        head = ["class asked for" + unit, "samples", "lower quartile", "median", "upper quartile", "accuracy"]
        rows = []
        for row, counts in zip(control["values"], control["confusion"], strict=True):
            quartiles = [_number(row[key]) for key in ("lower_quartile", "median", "upper_quartile")]
            share = f"{counts[row['class']] / row['count']:.1%}" if row["count"] else ""
            rows.append((text(control["classes"][row["class"]]), str(row["count"]), *quartiles, share))
        values = table(rows, head)
    return f"{title}<p>{text(sentence)}</p>{values}"


def _number(value: float | None) -> str:
    return "" if value is None else measured_text(value)


def _notes(summary: Mapping[str, Any]) -> str:
    notes = [f"{side}: {note}" for side in ("before", "after") for note in summary.get(side, {}).get("notes", ())]
    return "<ul class='note'>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>" if notes else ""


@dataclass(frozen=True)
class Source:
    """How more samples are made, for the commands on the page."""

    flags: tuple[str, ...]
    """Of `python -m ctrl_ray.sample`, beside prompt and controls."""
    loading: str
    """Python that makes the pipeline."""
    options: str = ""
    """Python: further arguments of its call, beginning with a comma."""
    method: str | None = None
    """Of `ctrl_ray.baselines`, where nothing was trained."""

    @classmethod
    def of_adapter(cls, adapter: str) -> Source:
        """An adapter's folder."""
        return cls(("--adapter", adapter), f"ctrl_ray.ControlledPipeline.from_pretrained({adapter!r})")


def sampling_commands(controls: Mapping[str, ControlConfig], prompt: str, source: Source) -> str:
    """How to sample more, from the shell and in Python."""
    asked = {name: control.num_classes - 1 for name, control in controls.items()}
    flags = [*source.flags, "--prompt", prompt]
    flags += [part for name, index in asked.items() for part in ("--control", f"{name}={index}")]
    command = f"python -m ctrl_ray.sample {shlex.join(flags)} --num-images 16 --seed 7 --output-dir samples"
    code = (
        "import ctrl_ray\n\n"
        f"pipeline = {source.loading}\n"
        f"images = pipeline({prompt!r}, controls={asked!r}{source.options}).images"
    )
    classes = "; ".join(
        f"{name}: " + ", ".join(f"{index} = {label}" for index, label in enumerate(control.class_names))
        for name, control in controls.items()
    )
    return f"<pre>{text(command)}</pre><p>or in Python:</p><pre>{text(code)}</pre><p class='note'>{text(classes)}</p>"


def _definitions() -> str:
    ways = {True: "higher", False: "lower", None: ""}
    rows = [
        (text(name), text(m.meaning), text("" if m.unit == "1" else m.unit), ways[m.higher_is_better])
        for name, m in METRICS.items()
    ]
    names = table(rows, ["name", "meaning", "unit", "better"])
    return f"<details><summary>All {len(rows)} metrics of metrics.jsonl</summary>{names}</details>"
