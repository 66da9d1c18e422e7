"""When and how the table of trials is drawn."""

from __future__ import annotations

import io
import sys

import pytest

from ctrl_ray.tuning.live_table import LiveTable


def test_a_log_gets_a_table_when_something_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    table = LiveTable(log_every_s=1000)
    for text, now in (("a 0.1", False), ("a 0.2", False), ("a 0.3", True), ("a 0.3", True)):
        table.show(text, now=now)
    assert out.getvalue() == "a 0.1\n\na 0.3\n\n"


def test_a_terminal_s_table_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "5")
    table = LiveTable(every_s=0)
    table.show("one\nlong line")
    table.show("two")
    assert out.getvalue() == "one\nlong\n" + "\x1b[2F\x1b[J" + "two\n"
