"""Text files as people have them: UTF-8 with or without a byte order mark, or UTF-16 with one; lines end at line ends only."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from ctrl_ray.errors import DataError

_CODE_PAGE = "cp1252"


def read_text(file: Path) -> str:
    """The text of a file; see `decode_text`."""
    return decode_text(file.read_bytes(), str(file))


def decode_text(data: bytes, source: str) -> str:
    """DataError names the source, the line and the byte that is not UTF-8, and what it is in the commonest code page."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{source} begins as UTF-16 and is not ({error}); save it as UTF-8") from error
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = len(lines_of(data[: error.start].decode() + "."))
        byte = data[error.start : error.start + 1]
        guess = byte.decode(_CODE_PAGE, errors="ignore")
        meant = f", which is {guess!r} in the Windows code page {_CODE_PAGE}" if guess else ""
        raise DataError(f"{source}, line {line}: not UTF-8 (byte 0x{byte.hex()}{meant}); save it as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{source} holds zero bytes, as UTF-16 without a byte order mark does; save it as UTF-8")
    return text


def json_line(row: object) -> str:
    """A row of a .jsonl file with its line end; whatever a reader may take for a line end is escaped."""
    text = json.dumps(row, ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def lines_of(text: str) -> list[str]:
    """Its lines, ended by \\n, \\r\\n or \\r alone: other separators of Unicode are part of a line."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]
