"""The report of a sweep as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_ray.reporting.facts import environment_facts
from ctrl_ray.reporting.markup import ReportFigure, html_page, picture, table, text
from ctrl_ray.reporting.page import Source, sampling_commands
from ctrl_ray.tuning.results.findings import SweepFindings
from ctrl_ray.tuning.results.trials import (
    SweepTrial,
    equal_exponents,
    exponent_correlation,
    result_columns,
    short_names,
    shown,
)


def sweep_page(findings: SweepFindings, figures: Sequence[ReportFigure]) -> str:
    """The page's text (UTF-8); every text from outside is escaped."""
    prompt = findings.before.samples.prompts[0] if len(findings.before.samples) else "PROMPT"
    sections = [
        _headline(findings),
        "<h2>Trials</h2>",
        _trials_table(findings),
        "<h2>Is it the exponent?</h2>",
        _ratio_section(findings),
        "<h2>Pictures</h2>",
        *(picture(figure) for figure in figures),
    ]
    if findings.adapter:
        sections += [
            "<h2>Sample from the best</h2>",
            sampling_commands(findings.controls, prompt, Source.of_adapter(findings.adapter)),
            "<p>A weaker pull without training again: add <code>--adapter-scale 0.6</code>.</p>",
        ]
    facts = {**findings.facts, **environment_facts()}
    sections += ["<h2>Made with</h2>", table([(text(key), text(value)) for key, value in facts.items()])]
    return html_page(f"ctrl_ray sweep: {findings.name}", sections)


def _headline(findings: SweepFindings) -> str:
    counts = {
        status: sum(trial.status == status for trial in findings.trials)
        for status in ("finished", "stopped early", "failed")
    }
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    sentence = f"{len(findings.trials)} trials: {words}."
    if findings.best is not None:
        names = short_names(list(findings.knobs))
        knobs = ", ".join(f"{names[path]} {shown(value)}" for path, value in findings.best.knobs.items())
        value = findings.best.metric(findings.metric)
        sentence += f" The best by {findings.metric} is trial {findings.best.name} ({knobs}): {shown(value)}"
        kl = findings.best.metric("kl")
        each = [
            f"{title} {_result(findings.best, name, digits)}" for title, name, digits in _of_controls(findings.trials)
        ]
        sentence += f" ({', '.join(each)})" if each else ""
        sentence += (
            f", {kl:.2f} nats from the pre-trained model." if kl is not None and findings.metric != "kl" else "."
        )
    return f"<h1>Sweep: {text(findings.name)}</h1><p class='lead'>{text(sentence)}</p>"


def _of_controls(trials: Sequence[SweepTrial]) -> list[tuple[str, str, str]]:
    """The columns of single controls; none with one control."""
    return [column for column in result_columns(trials) if column[1].startswith("accuracy/")]


def _trials_table(findings: SweepFindings) -> str:
    names, columns = short_names(list(findings.knobs)), result_columns(findings.trials)
    titles = [title for title, _, _ in columns]
    head = ["trial", *names.values(), "exponent", "updates", *titles, "minutes", "state"]
    rows = []
    for trial in findings.trials:
        mark = " ★" if findings.best is not None and trial.name == findings.best.name else ""
        cells = [trial.name + mark, *(shown(trial.knobs.get(path)) for path in findings.knobs)]
        cells += [shown(trial.exponent), str(trial.updates_done)]
        cells += [_result(trial, name, digits).replace(" ", "\N{NO-BREAK SPACE}") for _, name, digits in columns]
        cells += [f"{trial.seconds / 60:.1f}", f"failed: {trial.error}" if trial.status == "failed" else trial.status]
        rows.append([text(cell) for cell in cells])
    note = "★ the best; ± is one standard error. A trial that did not finish shows its last evaluation."
    if "gap" in [name for _, name, _ in columns]:
        note += " The gap is to a trial's own target, which its exponents make: compare it where those are equal."
    return table(rows, head) + f"<p class='note'>{note}</p>"


def _result(trial: SweepTrial, name: str, digits: str) -> str:
    value, error = trial.metric(name), trial.metric(f"{name}_error")
    return "–" if value is None else f"{value:{digits}}" + ("" if error is None else f" ± {error:{digits}}")


def _ratio_section(findings: SweepFindings) -> str:
    correlation, pairs = exponent_correlation(findings.trials), equal_exponents(findings.trials)
    if correlation is None and not pairs:
        return "<p>Fewer than three exponents guidance_strength / kl_coef finished.</p>"
    html = ""
    if correlation is not None:
        html += f"<p>Rank correlation of log(guidance_strength / kl_coef) and KL over the finished trials: {correlation:.3f}."
        html += "</p>"
    if pairs:
        rows = [
            (
                f"{pair.exponent:.3g}",
                text(", ".join(pair.names)),
                ", ".join(f"{kl:.2f}" for kl in pair.kl),
                f"{max(pair.kl) - min(pair.kl):.2f}",
                f"{pair.allowed:.2f}",
                "yes" if pair.agree else "no",
            )
            for pair in pairs
        ]
        html += table(rows, ["exponent", "trials", "KL / nats", "difference", "allowed: 30 % or 0.3 nats", "agree"])
    return html
