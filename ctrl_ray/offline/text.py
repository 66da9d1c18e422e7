"""Text files as people have them: UTF-8 with or without a byte order mark, or UTF-16 with one; lines end at line ends only."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from ctrl_ray.errors import ConfigError, DataError

UTF_8 = "utf-8"
_UTF_16 = "utf-16"
_CODE_PAGE = "cp1252"


def read_text(file: Path, encoding: str = UTF_8) -> str:
    """The text of a file; see `decode_text`."""
    return decode_text(file.read_bytes(), str(file), encoding)


def decode_text(data: bytes, source: str, encoding: str = UTF_8) -> str:
    """The text of `data` in that encoding (a byte order mark says it better).

    DataError names the source, the line and the byte that is not of it, and where UTF-8 was expected what the byte is in the
    commonest code page; ConfigError for an encoding that is unknown.
    """
    _check_encoding(encoding)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = _UTF_16
    elif data.startswith(codecs.BOM_UTF8):
        data, encoding = data.removeprefix(codecs.BOM_UTF8), UTF_8
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        raise DataError(_what_is_wrong(data, source, encoding, error)) from error
    if "\0" in text:
        why = "" if encoding == _UTF_16 else ", as UTF-16 without a byte order mark does"
        raise DataError(f"{source} holds zero bytes{why}; save it as UTF-8")
    return text


def _what_is_wrong(data: bytes, source: str, encoding: str, error: UnicodeError) -> str:
    if encoding == _UTF_16:
        return f"{source} begins as UTF-16 and is not ({error}); save it as UTF-8"
    no_place = f"{source} is not {encoding} ({error}); save it as UTF-8, or give another --encoding"
    if not isinstance(error, UnicodeDecodeError):  # codecs that are no code pages, such as idna before Python 3.13
        return no_place
    try:
        before = data[: error.start].decode(encoding, errors="replace")
    except UnicodeError:  # since then, idna replaces nothing
        return no_place
    byte = data[error.start : error.start + 1]
    guess = byte.decode(_CODE_PAGE, errors="ignore") if encoding == UTF_8 else ""
    meant = f", which is {guess!r} in the Windows code page {_CODE_PAGE}" if guess else ""
    option = f", or give --encoding {_CODE_PAGE}" if guess else ", or give another --encoding"
    name = "UTF-8" if encoding == UTF_8 else encoding
    line = len(lines_of(before + "."))
    return f"{source}, line {line}: not {name} (byte 0x{byte.hex()}{meant}); save it as UTF-8{option}"


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)
    except (LookupError, ValueError) as error:  # also codecs of Python that make no text, such as hex
        raise ConfigError(
            f"encoding is {encoding!r} ({error}); expected utf-8, cp1252, gb18030 or another of Python's"
        ) from error


def json_line(row: object) -> str:
    """A row of a .jsonl file with its line end; whatever a reader may take for a line end is escaped."""
    text = json.dumps(row, ensure_ascii=False)
    return re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def lines_of(text: str) -> list[str]:
    """Its lines, ended by \\n, \\r\\n or \\r alone: other separators of Unicode are part of a line."""
    lines = re.split(r"\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]
