"""HTML that needs nothing else: pictures are inside, no script, no address outside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class ReportFigure(NamedTuple):
    """One picture of the page."""

    title: str
    caption: str
    path: Path
    """An existing PNG."""
    wide: bool = False
    """On a narrow screen it is scrolled sideways rather than shrunk until nothing can be read."""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #22272e; background: #fff;
  max-width: 60rem; margin: 0 auto; padding: 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2em 0 .6em; }
h2 { font-size: 1.15rem; margin: 2.2em 0 .5em; border-bottom: 1px solid #d9dde3; padding-bottom: .2em; }
h3 { font-size: 1rem; margin: 1.6em 0 .4em; }
.lead { font-size: 1.08rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32em .9em .32em 0; border-bottom: 1px solid #e8ebef; vertical-align: top;
  overflow-wrap: normal; }
td:first-child { white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td small { color: #5a6370; white-space: nowrap; }
figure { margin: 1.2em 0 2em; }
img { max-width: 100%; height: auto; }
img.wide { max-width: none; width: max(100%, 46rem); }
figcaption, .note { color: #5a6370; font-size: .9rem; }
pre { background: #f4f6f8; padding: .8em; overflow-x: auto; font-size: .85rem; overflow-wrap: normal; }
summary { cursor: pointer; }
.findings { border-left: 3px solid #b5402a; padding: .1em 0 .1em 1.6em; margin: 1em 0; }
"""


def html_page(title: str, sections: Sequence[str]) -> str:
    """The whole page around sections of HTML; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_CSS}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def picture(figure: ReportFigure) -> str:
    """The figure with its title and caption, the PNG inside."""
    data = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    title, caption, kind = text(figure.title), text(figure.caption), "wide" if figure.wide else "fit"
    return (
        f'<figure><h3>{title}</h3><div class="scroll"><img class="{kind}" alt="{title}" '
        f'src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Cells are HTML already."""
    header = "<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table>{header}{body}</table></div>"


def text(value: str) -> str:
    """`value` as HTML shows it."""
    return html.escape(str(value), quote=True)


def plus_minus(error: float | None) -> str:
    """A standard error behind its number; '' where it is not known."""
    return "" if error is None else f" <small>± {error:.3f}</small>"
