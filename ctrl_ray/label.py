"""`python -m ctrl_ray.label --images DIR --output data.parquet`: from images to the offline data set of stage 1."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ctrl_ray import command
from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from ctrl_ray.offline.labelling import LabelledData


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """Measure the images below a folder and write the Parquet data set that the classifier is fitted on."""

    images: str
    """Folder of PNG, JPEG, WebP, TIFF or other files that Pillow opens (HEIC with the plugin pillow-heif), with its
    sub-folders. It is local, or any path that pyarrow.fs opens. Files that are left out are counted."""
    output: str
    """What to write: a Parquet file when the name ends in .parquet, else a folder of Parquet files."""
    controls: tuple[str, ...] = ("jpeg_size",)
    """What to measure: 'jpeg_size' (bytes at JPEG quality 95), 'colourfulness', 'clip_head:FILE' (a score by a head on CLIP's
    features, `ctrl_ray.classifiers.clip_head`), or your own 'my_module:my_oracle', a function from a PIL image to a number
    (if it has a parameter `prompt`, it gets the prompt too). Each becomes a column."""
    columns: str | None = None
    """Table (.csv or .jsonl) of labels that you already have. Its column 'file' names the image, relative to the
    folder; the other columns hold integer labels or numbers, and may include 'prompt'."""
    prompts: Literal["none", "sidecar"] = "none"
    """'sidecar': the prompt of photo.png is in photo.txt beside it. 'none': there are no prompts, or a table has
    them."""
    prompts_file: str | None = None
    """Table (.csv or .jsonl) with the columns 'file' and 'prompt'."""
    image_size: Annotated[tuple[int, int] | None, at_least(1)] = None
    """Height and width. Before an image is measured, it is scaled to cover this size and cropped around the centre.
    Give the size that the base model makes. The stored image stays as it is. None: measure it as it is."""
    classes: Annotated[int, at_least(2)] = 4
    """The command suggests thresholds for this many classes."""
    encoding: str = "utf-8"
    """Encoding of the tables and of the prompts beside the images, such as cp1252. A file's byte order mark has priority."""
    on_bad_row: Literal["error", "skip"] = "error"
    """'error': stop at the first image or label that cannot be used. 'skip': set it aside in OUTPUT.bad_rows.jsonl
    with the reason, and go on."""
    overwrite: bool = False
    """Replace an output that already exists."""
    draw_shapes: Annotated[int | None, at_least(1)] = None
    """First draw this many images of the built-in example, with their prompts beside them, into --images, to try the
    command on. The folder must be new or empty."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the drawn images."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    import tyro

    run(tyro.cli(LabelConfig, args=argv, prog="python -m ctrl_ray.label"))


def run(config: LabelConfig) -> LabelledData:
    """Label, and print what came out and what to do next."""
    from ctrl_ray.cluster.connection import connected
    from ctrl_ray.offline.labelling import label
    from ctrl_ray.runs.claim import claimed
    from ctrl_ray.runs.outputs import check_output

    output = check_output(config.output, "--output", kind="file" if config.output.endswith(".parquet") else "folder")
    own = nullcontext() if "://" in output else claimed(Path(output).parent, Path(output).name)
    prompts = config.prompts
    if config.draw_shapes is not None:
        draw_shapes(Path(config.images), config.draw_shapes, config.seed)
        prompts = "sidecar" if config.prompts_file is None else prompts
    with own, connected():
        data = label(
            config.images,
            config.output,
            controls=config.controls,
            prompts=prompts,
            prompts_file=config.prompts_file,
            columns=config.columns,
            image_size=config.image_size,
            encoding=config.encoding,
            on_bad_row=config.on_bad_row,
            overwrite=config.overwrite,
        )
    print(describe(data, config.classes))
    return data


def draw_shapes(folder: Path, num_images: int, seed: int) -> None:
    """Write drawn images as shape_000000.png with the prompt in shape_000000.txt; the folder must be new or empty."""
    from ctrl_ray.offline.shapes import draw_dataset
    from ctrl_ray.runs.outputs import check_output

    folder = Path(check_output(folder, "--images"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"images {folder} is not empty; expected a new or empty folder to draw into; give another")
    folder.mkdir(parents=True, exist_ok=True)
    for index, (image, prompt) in enumerate(draw_dataset(num_images, seed)):
        image.save(folder / f"shape_{index:06d}.png")
        (folder / f"shape_{index:06d}.txt").write_text(prompt + "\n", encoding="utf-8")
    print(f"drew {num_images} images with their prompts into {folder}")


def describe(data: LabelledData, num_classes: int) -> str:
    """The distribution of each control, thresholds that would split it evenly, and the next command."""
    from ctrl_ray.config.control import control_name_of
    from ctrl_ray.offline.statistics import class_shares, equal_share_thresholds, summarise
    from ctrl_ray.oracles import UNITS, is_told_prompt

    lines = [f"wrote {data.num_rows} rows to {data.output}"]
    if data.num_bad_rows:
        lines.append(f"set {data.num_bad_rows} bad rows aside in {data.bad_rows_file}")
    if data.num_copies:
        lines.append(
            f"copies of another image, byte by byte: {data.num_copies}; each counts, and a fit keeps equal images on the same "
            "side of its splits"
        )
    if data.num_unscaled:
        lines.append(
            f"nearly black images, whose 16-bit values stay below 4096 as 12-bit data does: {data.num_unscaled}; scale them "
            "to 16 bits and label again"
        )
    commands: list[str] = []
    for name, values in data.values.items():
        summary = summarise(values)
        unit = UNITS.get(data.oracles.get(name, ""), "")
        quartiles = " / ".join(f"{value:.6g}" for value in summary.quartiles)
        lines.append(
            f"\n{name}{f' ({unit})' if unit else ''}: {summary.count} values, smallest {summary.minimum:.6g}, "
            f"quartiles {quartiles}, largest {summary.maximum:.6g}"
        )
        control = control_name_of(name)
        words = ["python", "-m", "ctrl_ray.classify", "--data", data.output, "--control", control]
        words += [] if control == name else ["--column", name]
        oracle = data.oracles.get(name)
        if summary.class_counts and oracle is None:
            counts = ", ".join(f"{label}: {count}" for label, count in summary.class_counts.items())
            lines.append(f"  integer labels, rows of each: {counts} (below, write your names of them after --classes)")
            words += ["--classes", *map(str, summary.class_counts)]
        else:
            thresholds = equal_share_thresholds(values, num_classes)
            if not thresholds:
                lines.append("  every value is the same: there is nothing to control")
                continue
            borders = [f"{threshold:.10g}" for threshold in thresholds]
            shares = " / ".join(f"{share:.1%}" for share in class_shares(values, thresholds))
            lines.append(f"  thresholds for {len(borders) + 1} classes: {' '.join(borders)} (shares {shares})")
            if len(borders) + 1 < num_classes:
                why = "so many values are equal" if summary.count >= 2 * num_classes else "there are so few values"
                lines.append(f"  {why} that {num_classes} classes of equal share do not exist")
            # an oracle measures again what the model's VAE makes of the images, and what the model draws
            words += ["--thresholds", *borders] if oracle is None else ["--equal-classes", str(len(borders) + 1)]
        if oracle is not None:
            words += ["--oracle", oracle, *(["--classifier.prompt-conditional"] if is_told_prompt(oracle) else [])]
        else:  # what the pipeline draws cannot be labelled
            words += ["--classifier.num-pipeline-samples", "0"]
        if summary.minimum < summary.maximum:  # one label has nothing to be told from
            commands.append(shlex.join(words))
    if commands:
        lines += ["\nnext, fit a classifier (add --base-model MODEL and --output-dir DIR as you need):"]
        lines += [f"  {line}" for line in commands]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
