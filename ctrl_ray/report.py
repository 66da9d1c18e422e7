"""`python -m ctrl_ray.report`: make a run's report anew from its files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ctrl_ray import command


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Make a run's report again from its files, for a run that stopped or an old one."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run, such as runs/shapes."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    options = tyro.cli(ReportOptions, args=argv, prog="python -m ctrl_ray.report")
    from ctrl_ray.reporting.rebuild import rebuild_report

    print(f"report   {rebuild_report(options.run)}")


if __name__ == "__main__":
    sys.exit(main())
