"""What a row of the offline data set is, and what is wrong with one that is not.

| column | type | |
|---|---|---|
| `image` | binary | the bytes of an image file that Pillow opens; also Hugging Face's struct of `bytes` and `path` |
| `prompt` | string | optional |
| one per control | integer label, class name, or a number | a number needs thresholds in the control's config |

Further columns are ignored.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import types

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.images import FORMATS, UndecodableImageError, decode_image, to_array
from ctrl_ray.offline.storage import write_json_lines

IMAGE = "image"
"""Column of the encoded images."""

PROMPT = "prompt"
"""Optional column of the prompts."""

_CAPTIONS = ("text", "texts", "caption", "captions", "prompts", "description", "txt")
"""What other tools call the column of prompts."""

SKIP_HINT = "or set bad rows aside with --on-bad-row skip (in Python: on_bad_row='skip')"
"""How a message about a bad row ends."""
_logger = logging.getLogger("ctrl_ray")


class BadRow(NamedTuple):
    """A row that cannot be used."""

    file: str
    """The Parquet file (when labelling: the image or table file) that holds it."""
    row: int
    """Its number in that file, counted from 0."""
    reason: str
    """What is wrong, what was expected, and how to correct it."""

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (counted from 0): {self.reason}"


class RowError(ValueError):
    """One row's fault, before it is known in which file it stands."""


def value_column(control: str) -> str:
    """Name of the float64 column that holds a control's measured number beside its class."""
    return f"{control}_value"


def source_column(control: str, config: ControlConfig) -> str:
    """Name of the control's column in the Parquet file."""
    return config.column or control


def check_controls(controls: Mapping[str, ControlConfig]) -> None:
    """ConfigError when a control's name collides with a column of ours, or its number of classes is unknown."""
    for name, control in controls.items():
        if name in (IMAGE, PROMPT) or source_column(name, control) in (IMAGE, PROMPT):
            raise ConfigError(
                f"control {name!r} reads column {source_column(name, control)!r}; {IMAGE!r} and {PROMPT!r} are "
                "taken by the images and prompts; rename the control or its column"
            )
        if control.num_classes == 0:
            raise ConfigError(
                f"control {name!r} has neither thresholds nor classes, so its number of classes is unknown; give "
                "thresholds when its column holds a number, or class names when it holds integer labels"
            )


def check_columns(
    schema: pa.Schema, file: str, controls: Mapping[str, ControlConfig], *, needs_prompts: bool = False
) -> tuple[str, ...]:
    """Which columns of `file` to read: `image`, `prompt` when it is there, and the controls' columns.

    Raises DataError for a missing column or one of the wrong type; with `needs_prompts` also for a file without prompts.
    """
    wanted = [IMAGE]
    _require_type(
        schema, file, IMAGE, _is_image, "the bytes of image files (binary, or Hugging Face's struct of bytes and path)",
        "store the files' bytes, or write the data set from a folder of images with `python -m ctrl_ray.label`",
    )  # fmt: skip
    if has_prompts(schema, file):
        wanted.append(PROMPT)
    elif needs_prompts:
        raise DataError(f"{no_prompts(schema, file)}, or set classifier.prompt_conditional to False")
    for name, control in controls.items():
        column = source_column(name, control)
        if control.thresholds:
            expected, accepted = "numbers, which its thresholds make classes of", _is_number
        else:
            expected, accepted = f"integer labels from 0 to {control.num_classes - 1}, or class names", _is_label
        fix = "give the control thresholds if these are measured numbers, or convert the column"
        _require_type(schema, file, column, accepted, expected, fix, control=name)
        if column not in wanted:
            wanted.append(column)
    return tuple(wanted)


def has_prompts(schema: pa.Schema, file: str) -> bool:
    """Whether there is a column of prompts; DataError when it holds no strings."""
    if PROMPT in schema.names:
        _require_type(schema, file, PROMPT, _is_text, "strings", "convert it to strings, or drop it")
    return PROMPT in schema.names


def no_prompts(schema: pa.Schema, file: str) -> str:
    """What to say about a file without a column of prompts: which column may hold them, and how to give them."""
    hint = caption_hint([field.name for field in schema if _is_text(field.type)])
    return (
        f"{file}, every row: column {PROMPT!r} is missing; the file has {schema.names}{hint}; label again with --prompts or "
        "--prompts-file"
    )


def caption_hint(columns: Iterable[str]) -> str:
    """What to do about a column that most likely holds the prompts, "" when there is none."""
    near = next((name for name in columns if name.lower() in _CAPTIONS), None)
    return f"; if column {near!r} holds them, rename it to {PROMPT!r}" if near else ""


def check_row(
    raw: Mapping[str, Any],
    controls: Mapping[str, ControlConfig],
    *,
    image_size: tuple[int, int] | None = None,
    expected_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The validated row.

    raw: column -> Python value, as Arrow gives it. image_size (height, width): scale and crop to it. expected_size:
    refuse an image of another size (after image_size). Returns `image` uint8 (H, W, 3), `prompt` ("" without the
    column) and for each control whose column is there its class (int), plus `<control>_value` (float) when the column
    holds a number. Raises RowError with the reason.
    """
    row: dict[str, Any] = {IMAGE: _check_image(raw[IMAGE], image_size, expected_size), PROMPT: raw.get(PROMPT, "")}
    if row[PROMPT] is None:
        raise RowError(f"{PROMPT} is missing; expected a string (it may be empty); fill it in, {SKIP_HINT}")
    for name, control in controls.items():
        column = source_column(name, control)
        if column not in raw:
            continue
        row[name] = check_label(name, column, control, raw[column])
        if control.thresholds:
            row[value_column(name)] = float(raw[column])
    return row


def _check_image(data: Any, image_size: tuple[int, int] | None, expected_size: tuple[int, int] | None) -> Any:
    if isinstance(data, dict):
        if not data["bytes"] and data.get("path"):
            raise RowError(
                f"{IMAGE} names a file ({data['path']!r}) and does not hold its bytes; label the folder of images with "
                f"`python -m ctrl_ray.label`, {SKIP_HINT}"
            )
        data = data["bytes"]
    if not data:
        raise RowError(f"{IMAGE} is empty; expected the bytes of an image file; fill it in, {SKIP_HINT}")
    try:
        pixels = to_array(decode_image(data, image_size))
    except UndecodableImageError as error:
        raise RowError(
            f"the image ({len(data)} bytes) does not decode: {error}; expected the bytes of a {', '.join(FORMATS)} "
            f"file, or another that Pillow opens; replace the image or remove the row, {SKIP_HINT}"
        ) from error
    if expected_size is not None and pixels.shape[:2] != expected_size:
        raise RowError(
            f"the image is {pixels.shape[0]} × {pixels.shape[1]} pixels (height × width), the first image of the set "
            f"is {expected_size[0]} × {expected_size[1]}; expected one size; give image_size to scale and crop all of "
            f"them, {SKIP_HINT}"
        )
    return pixels


def check_label(name: str, column: str, control: ControlConfig, value: Any) -> int:
    """The class that a cell of a control's column means; RowError for one that is no label."""
    place = f"control {name!r} (column {column!r})"
    if value is None:
        raise RowError(f"{place} has no value; fill it in, {SKIP_HINT}")
    if control.thresholds:
        if not math.isfinite(value):
            raise RowError(f"{place} is {value}; expected a finite number; correct it, {SKIP_HINT}")
        return control.classify(float(value))
    if isinstance(value, float) and math.isnan(value):  # what pandas makes of a missing label
        raise RowError(f"{place} has no value; fill it in, {SKIP_HINT}")
    if value in control.class_names:
        return control.class_names.index(value)
    if isinstance(value, str) or value not in range(control.num_classes):
        number = ", give the control thresholds if it is a measured number" if isinstance(value, float) else ""
        raise RowError(
            f"{place} is {value!r}, which is out of range; expected an integer label from 0 to "
            f"{control.num_classes - 1} ({', '.join(control.class_names)}); correct the label or name more "
            f"classes{number}, {SKIP_HINT}"
        )
    return int(value)


def _require_type(
    schema: pa.Schema, file: str, column: str, accepted: Any, expected: str, fix: str, control: str | None = None
) -> None:
    user = f" of control {control!r}" if control is not None else ""
    if column not in schema.names:
        near = difflib.get_close_matches(column, schema.names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{file}, every row: column {column!r}{user} is unknown; the file has {schema.names}; {hint}Rename the "
            f"column, name it in the control's config, or write the file with `python -m ctrl_ray.label`"
        )
    if schema.names.count(column) > 1:
        raise DataError(f"{file}, every row: column {column!r} is there twice; remove one")
    found = schema.field(column).type
    if not accepted(found):
        raise DataError(f"{file}, every row: column {column!r}{user} is of type {found}; expected {expected}; {fix}")


def _is_image(found: pa.DataType) -> bool:
    if types.is_struct(found):
        index = found.get_field_index("bytes")
        return index >= 0 and _is_bytes(found.field(index).type)
    return _is_bytes(found)


def _is_bytes(found: pa.DataType) -> bool:
    return types.is_binary(found) or types.is_large_binary(found)


def _is_text(found: pa.DataType) -> bool:
    inner = found.value_type if types.is_dictionary(found) else found
    return types.is_string(inner) or types.is_large_string(inner)


def _is_label(found: pa.DataType) -> bool:
    return types.is_boolean(found) or _is_number(found) or _is_text(found)


def _is_number(found: pa.DataType) -> bool:
    return types.is_integer(found) or types.is_floating(found)


def handle_bad_rows(bad_rows: Sequence[BadRow], num_rows: int, on_bad_row: str, side_file: str, *, source: str) -> None:
    """Raise DataError for the first bad row ('error'), or write all to `side_file` and log their number ('skip').

    num_rows: rows looked at, good and bad. Without a row, or without a good one, it is a DataError in either case.
    """
    if num_rows == 0:
        raise DataError(f"{source} is an empty set: it holds no row; expected at least one; check the path")
    if not bad_rows:
        return
    if on_bad_row == "error":
        more = f" ({len(bad_rows)} of {num_rows} rows are bad; this is the first)" if len(bad_rows) > 1 else ""
        raise DataError(f"{bad_rows[0]}{more}")
    write_json_lines(side_file, (bad._asdict() for bad in bad_rows))
    if len(bad_rows) == num_rows:
        raise DataError(
            f"{source}: no row is left, all {num_rows} are bad (reasons in {side_file}); the first: {bad_rows[0]}"
        )
    _logger.warning(
        "%d of %d rows of %s are bad and were set aside, with the reasons, in %s",
        len(bad_rows), num_rows, source, side_file,
    )  # fmt: skip


def check_on_bad_row(on_bad_row: str) -> None:
    """ConfigError unless it is 'error' or 'skip'."""
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; expected 'error' or 'skip'")
