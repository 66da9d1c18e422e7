"""What a user sees of an input: it works, or exit status 2 and one message."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

from ctrl_ray import command


def works_or_is_refused(body: Callable[[], Any], *words: str) -> Any:
    """What `body` returns as a command's body, or None where the command ends with 2 and one message that holds `words`.

    Any other error is the test's failure, with its traceback."""
    found: list[Any] = []
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = command.run(lambda argv: found.append(body()), [])
    text = said.getvalue()
    if status == 0:
        return found[0]
    assert status == 2, text
    assert text.startswith("error: ") and "Traceback" not in text and len(text) < 20_000, text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    return None
