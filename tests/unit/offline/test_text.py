"""Text files as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.prompts import read_prompts
from ctrl_ray.offline.text import decode_text, json_line, lines_of

WANTED = "a red circle\r\na café at dusk\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_say_what_they_are(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(WANTED.encode(encoding))
    assert read_prompts(tmp_path / "prompts.txt") == ("a red circle", "a café at dusk")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_code_page_is_named_with_file_line_and_byte(mark: bytes) -> None:
    with pytest.raises(
        DataError,
        match=r"prompts\.txt, line 2: not UTF-8 \(byte 0xe9, which is 'é' in .* cp1252\); .*, or give --encoding cp1252",
    ):
        decode_text(mark + WANTED.encode("cp1252"), "prompts.txt")
    with pytest.raises(DataError, match=r"line 1: not UTF-8 \(byte 0x81\)"):
        decode_text(b"\x81", "prompts.txt")


def test_utf_16_that_does_not_say_so_or_is_cut() -> None:
    with pytest.raises(DataError, match="zero bytes, as UTF-16 without"):
        decode_text("a red circle".encode("utf-16-le"), "prompts.txt")
    with pytest.raises(DataError, match=r"prompts\.txt holds zero bytes; save it"):
        decode_text("a\0b".encode("utf-16"), "prompts.txt")
    with pytest.raises(DataError, match=r"is not idna \("):
        decode_text(b"xn--0", "prompts.txt", "idna")
    with pytest.raises(DataError, match="begins as UTF-16 and is not"):
        decode_text("a red circle".encode("utf-16")[:-1], "prompts.txt")


def test_lines_end_at_line_ends_only(tmp_path: Path) -> None:
    assert lines_of("a\nb\r\nc\rd\u2028e\u0085f\x0bg\x0ch\n") == ["a", "b", "c", "d\u2028e\u0085f\x0bg\x0ch"]
    assert lines_of("") == [] and lines_of("a") == ["a"] and lines_of("\n\na") == ["", "", "a"]
    (tmp_path / "prompts.txt").write_text("a red\u2028circle\na blue\u0085cross\n", encoding="utf-8")
    assert [prompt.split() for prompt in read_prompts(tmp_path / "prompts.txt")] == [
        ["a", "red", "circle"],
        ["a", "blue", "cross"],
    ]


def test_a_json_line_is_one_line_for_every_reader() -> None:
    text = "naïve\u2028red\u2029blue\u0085green\x0b"
    (line,) = json_line({"prompt": text}).splitlines()
    assert json.loads(line) == {"prompt": text} and "naïve" in line


def test_a_folder_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; expected a text file"):
        read_prompts(tmp_path)


def test_another_encoding_is_read_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(WANTED.encode("cp1252"))
    assert read_prompts(tmp_path / "prompts.txt", "cp1252") == ("a red circle", "a café at dusk")
    (tmp_path / "marked.txt").write_bytes(WANTED.encode("utf-8-sig"))
    assert read_prompts(tmp_path / "marked.txt", "cp1252") == ("a red circle", "a café at dusk"), (
        "the mark says it better"
    )
    with pytest.raises(
        DataError, match=r"line 1: not ascii \(byte 0xe9\); save it as UTF-8, or give another --encoding"
    ):
        decode_text("é".encode("cp1252"), "prompts.txt", "ascii")


@pytest.mark.parametrize("encoding", ["latin-99", "hex", "", "a\0b"])
def test_an_encoding_that_makes_no_text_is_refused(encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"encoding is .*expected utf-8, cp1252"):
        decode_text(b"a", "prompts.txt", encoding)
