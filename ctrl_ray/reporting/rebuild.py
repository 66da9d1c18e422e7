"""A run's report, made anew from the files that the run left; of one that did not finish, as far as it came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import read_train_config, to_json
from ctrl_ray.errors import DataError, RunFolderError
from ctrl_ray.reporting.facts import environment_facts
from ctrl_ray.reporting.markup import ReportFigure, html_page, picture, table, text
from ctrl_ray.reporting.page import Source, render_page
from ctrl_ray.reporting.pictures import existing_pictures, of_stage_1, reliability_pictures
from ctrl_ray.reporting.report import PAGE_FILE, REPORT, SUMMARY_FILE, draw_curves, run_facts
from ctrl_ray.reporting.tracking import METRICS_FILE, read_metrics
from ctrl_ray.runs.copies import CLASSIFIER
from ctrl_ray.runs.finished import first_prompt
from ctrl_ray.runs.folder import ADAPTER, CHECKPOINTS, CONFIG_FILE

_SHOWN = ("accuracy", "joint_accuracy", "prompt_fidelity", "kl", "gap", "diversity")


def rebuild_report(run: str | Path) -> Path:
    """Write RUN/report/report.html with the curves drawn anew; returns its path.

    A finished run's numbers are those of its summary.json, and the pictures of its samples stay as they are. A run that stopped
    has its evaluations on the way, its curves, and how to go on. RunFolderError where the folder holds no run.
    """
    root = Path(run)
    if not (root / CONFIG_FILE).is_file():
        raise RunFolderError(
            f"{root} holds no {CONFIG_FILE}; expected the local folder of a run (--output-dir of ctrl_ray.train); copy one "
            "from a remote place first"
        )
    config, rows = read_train_config(root / CONFIG_FILE), read_metrics(root)
    folder = root / REPORT
    folder.mkdir(exist_ok=True)
    curves = [figure for figure in draw_curves(folder, rows) if figure is not None]
    classifiers = {name: root / CLASSIFIER / name for name in config.controls}
    of_classifiers = of_stage_1(reliability_pictures(classifiers))
    facts = {**run_facts(rows), **{f"page {name}": value for name, value in environment_facts().items()}}
    summary = _summary(folder / SUMMARY_FILE)
    if summary is None:
        page = _unfinished(root, config, rows, [*curves, *of_classifiers], facts)
    else:
        page = render_page(
            summary,
            [*existing_pictures(folder, summary["after"]), *of_classifiers],
            controls=config.controls,
            prompt=first_prompt(root / ADAPTER, config.base_model) or "PROMPT",
            source=Source.of_adapter(str(root / ADAPTER)),
            facts=facts,
            config_json=to_json(config),
            sampler=config.sampler,
        )
    path = folder / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _summary(file: Path) -> dict[str, Any] | None:
    """Of a finished run; None where there is none."""
    if not file.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        summary["after"]["controls"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a summary of a run ({type(error).__name__}: {error}); remove it, and the page is made of "
            f"{METRICS_FILE}"
        ) from error
    return summary


def _unfinished(
    root: Path,
    config: TrainConfig,
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[ReportFigure],
    facts: Mapping[str, str],
) -> str:
    done = max((row["update"] for row in rows if row.get("kind") == "update"), default=0)
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    names = [name for name in _SHOWN if any(row.get(name) is not None for row in evaluations)]
    shown = [[str(row["update"]), *(_number(row.get(name)) for name in names)] for row in evaluations]
    resumable = (root / CHECKPOINTS).is_dir() and any((root / CHECKPOINTS).iterdir())
    go_on = (
        f"<pre>{text(f'python -m ctrl_ray.train --config {root / CONFIG_FILE} --resume')}</pre>"
        if resumable
        else "<p>It left no checkpoint to go on from.</p>"
    )
    sections = [
        f"<h1>One more control: {text(', '.join(config.controls))}</h1>",
        f"<p class='lead'>This run has made {done} of {config.num_updates} updates and has not finished.</p>",
        "<h2>Go on with it</h2>",
        go_on,
        "<h2>Evaluations on the way</h2>",
        table(shown, ["update", *(name.replace("_", " ") for name in names)])
        if shown
        else "<p>There was none yet.</p>",
        "<h2>Pictures</h2>",
        *map(picture, pictures),
        "<h2>Made with</h2>",
        table([(text(key), text(value)) for key, value in facts.items()]),
        f"<details><summary>All settings of the run</summary><pre>{text(to_json(config))}</pre></details>",
    ]
    return html_page(f"ctrl_ray: {', '.join(config.controls)}", sections)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"
