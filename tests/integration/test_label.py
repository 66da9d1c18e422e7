"""Labelling end to end, on one local Ray, and reading back what it wrote."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from ctrl_ray import label as command
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, DataError, ResourceError
from ctrl_ray.offline.labelling import label
from ctrl_ray.offline.reading import iter_rows

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of noise, in PNG and JPEG, two of them in a sub-folder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.jpg", "c.PNG", "d.jpeg", "sub/a.png", "sub/b.png"]):
        pixels = np.random.default_rng(index).integers(0, 40 * (index + 1), (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted((path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")), key=str)


def jpeg_bytes(file: Path) -> int:
    buffer = io.BytesIO()
    Image.open(file).convert("RGB").save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue())


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def test_the_command_draws_labels_and_says_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = tmp_path / "drawn", tmp_path / "data.parquet"
    arguments = ["--images", str(folder), "--draw-shapes", "24", "--output", str(output)]
    assert command.main(arguments) == 0
    table = pq.read_table(output)
    assert table.column_names == ["image", "prompt", "jpeg_size"]
    drawn = files_of(folder)
    assert table["image"].to_pylist() == [file.read_bytes() for file in drawn]
    assert table["jpeg_size"].to_pylist() == [jpeg_bytes(file) for file in drawn]
    assert table["prompt"].to_pylist() == [file.with_suffix(".txt").read_text().strip() for file in drawn]
    printed = capsys.readouterr().out
    borders = [float(word) for word in printed.split("thresholds for 4 classes: ")[1].split(" (shares")[0].split()]
    assert borders == pytest.approx(np.quantile(table["jpeg_size"].to_numpy(), (0.25, 0.5, 0.75)), rel=1e-5)
    line = f"python -m ctrl_ray.classify --data {output} --control jpeg_size --equal-classes 4 --oracle jpeg_size"
    assert line in printed
    assert command.main(["--images", str(folder), "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_oracle_by_import_path_user_columns_and_prompts(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_oracle_module.py").write_text("def first_red(image):\n    return image.getpixel((0, 0))[0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    files = files_of(images)
    names = [str(file.relative_to(images)) for file in files]
    columns = write_csv(
        tmp_path / "labels.csv", ["file", "style", "score"], [[n, i % 3, i / 2] for i, n in enumerate(names)]
    )
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"file": name, "prompt": f"picture {name}"}) + "\n" for name in names)
    )
    data = label(
        images,
        tmp_path / "parts",
        controls=("my_oracle_module:first_red", "jpeg_size"),
        columns=columns,
        prompts_file=tmp_path / "prompts.jsonl",
        progress=False,
    )
    table = pq.read_table(tmp_path / "parts")
    assert table.column_names == ["image", "prompt", "first_red", "jpeg_size", "style", "score"]
    reds = [Image.open(file).convert("RGB").getpixel((0, 0))[0] for file in files]
    assert table["first_red"].to_pylist() == reds
    assert table["jpeg_size"].to_pylist() == [jpeg_bytes(file) for file in files]
    assert table["style"].to_pylist() == [0, 1, 2, 0, 1, 2]
    assert table["score"].to_pylist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert table["prompt"].to_pylist() == [f"picture {name}" for name in names]
    assert data.values["style"].dtype == np.int64


def test_a_corrupt_image_stops_or_is_set_aside(images: Path, tmp_path: Path) -> None:
    (images / "b.jpg").write_bytes(b"\xff\xd8\xff broken")
    output = tmp_path / "data.parquet"
    with pytest.raises(DataError, match=r"images/b.jpg, row 1 .*does not decode.*replace or remove it"):
        label(images, output, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"], "nothing half-written may stay"
    data = label(images, output, on_bad_row="skip", progress=False)
    assert (data.num_rows, data.num_bad_rows) == (5, 1)
    assert pq.read_metadata(output).num_rows == 5
    aside = [json.loads(line) for line in Path(data.bad_rows_file).read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in aside] == [(str(images / "b.jpg"), 1)]


def test_a_folder_as_people_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies, a link back to the folder, 12-bit data, EXIF that is none, a file of another program, a name of many signs."""
    folder, output = tmp_path / "my photos #1 (ä)", tmp_path / "data.parquet"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for name in ("_A.png", "_A (copy).png"):
        picture.save(folder / name)
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 16).save(folder / "scan.tif")
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "edited.png", exif=b"Exif\0\0\x00\x01 no such header")
    (folder / "IMG_1.CR2").write_bytes(b"raw")
    (folder / "again").symlink_to(folder)
    stars = write_csv(
        tmp_path / "stars.csv",
        ["file_name", "my stars"],
        [[name, number % 2] for number, name in enumerate(["_A (copy).png", "_A.png", "edited.png", "scan.tif"])],
    )
    assert command.main(["--images", str(folder), "--output", str(output), "--columns", str(stars)]) == 0
    printed = capsys.readouterr().out
    assert "left out 2 files that are no images to read: 1 .cr2, 1 there already by another path" in printed
    assert (
        "copies of another image, byte by byte: 1;" in printed and "stay below 4096 as 12-bit data does: 1;" in printed
    )
    assert f"--data {output} --control my_stars --column 'my stars' --classes 0 1" in printed
    rows = pq.read_table(output).to_pylist()
    assert [row["my stars"] for row in rows] == [0, 1, 0, 1]
    assert (
        rows[0]["image"] == (folder / "_A.png").read_bytes()
        and rows[2]["image"] != (folder / "edited.png").read_bytes()
    )
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(rows[2]["image"])))
    assert upright.tobytes() == picture.transpose(Image.Transpose.ROTATE_90).tobytes()


def test_annotations_that_do_not_fit(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "data.parquet"
    names = [str(file.relative_to(images)) for file in files_of(images)]
    short = write_csv(tmp_path / "short.csv", ["file", "style"], [[name, 0] for name in names[1:]])
    with pytest.raises(DataError, match=r"a.png, row 0 .*has no row in .*short.csv; add one"):
        label(images, output, columns=short, progress=False)
    wrong = write_csv(tmp_path / "wrong.csv", ["file", "style"], [[*names[:1], 0], ["typo.png", 1]])
    with pytest.raises(DataError, match=r"wrong.csv, row 1 .*'typo.png', which is no image of the folder"):
        label(images, output, columns=wrong, progress=False)
    words = write_csv(tmp_path / "words.csv", ["file", "style"], [[name, "cubist"] for name in names])
    with pytest.raises(DataError, match=r"words.csv, row 0 .*column 'style' is 'cubist'; expected an integer label"):
        label(images, output, columns=words, progress=False)
    with pytest.raises(DataError, match=r"a.png, row 0 .*a.txt does not exist; write the prompt into it"):
        label(images, output, prompts="sidecar", progress=False)
    with pytest.raises(ConfigError, match="prompts are given twice"):
        label(images, output, prompts="sidecar", prompts_file=_prompts(tmp_path, names), progress=False)
    assert not output.exists()


def _prompts(folder: Path, names: list[str]) -> Path:
    return write_csv(folder / "prompts.csv", ["file", "prompt"], [[name, "x"] for name in names])


@pytest.fixture
def parts(images: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of two Parquet files, one of whose rows is broken and one out of range."""
    names = [str(file.relative_to(images)) for file in files_of(images)]
    labels = write_csv(tmp_path / "labels.csv", ["file", "style"], [[name, i % 3] for i, name in enumerate(names)])
    folder = tmp_path / "parts"
    label(images, folder, columns=labels, progress=False)
    whole = pq.read_table(folder)
    pq.write_table(whole, folder / "part-00000.parquet", row_group_size=2)
    pixels = whole.slice(0, 4).to_pydict()
    pixels["image"][2], pixels["style"][3] = b"broken", 9
    pq.write_table(type(whole).from_pydict(pixels, schema=whole.schema), folder / "part-00001.parquet")
    return folder


def test_labelled_parts_are_read_row_by_row(parts: Path, images: Path, tmp_path: Path) -> None:
    """What was labelled comes back: the first part whole, the second without its two bad rows, which are set aside."""
    controls = {"jpeg_size": ControlConfig(thresholds=(900.0, 1000.0)), "style": ControlConfig(classes=("a", "b", "c"))}
    with pytest.raises(DataError, match=r"part-00001.parquet, row 2 .*does not decode"):
        list(iter_rows(parts, controls))
    aside = tmp_path / "aside.jsonl"
    rows = list(iter_rows(parts, controls, "skip", bad_rows_file=str(aside)))
    assert [json.loads(line)["row"] for line in aside.read_text().splitlines()] == [2, 3]
    files = files_of(images)
    expected = [(index % 3, file) for part in (files, files[:2]) for index, file in enumerate(part)]
    assert len(rows) == len(expected) == 8
    for row, (style, file) in zip(rows, expected, strict=True):
        assert np.array_equal(row["image"], np.asarray(Image.open(file).convert("RGB")))
        assert (row["prompt"], row["style"], row["jpeg_size_value"]) == ("", style, jpeg_bytes(file))
        assert row["jpeg_size"] == sum(jpeg_bytes(file) >= border for border in (900.0, 1000.0))


def test_a_damaged_file_is_a_plain_data_error(parts: Path) -> None:
    file = parts / "part-00000.parquet"
    start = pq.read_metadata(file).row_group(1).column(0)
    offset = min(start.data_page_offset, start.dictionary_page_offset or start.data_page_offset)
    data = bytearray(file.read_bytes())
    data[offset : offset + 40] = b"\xff" * 40
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00000.parquet cannot be read from row 2 on"):
        list(iter_rows(parts, {}))


def test_an_oracle_that_ends_its_process_ends_the_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_oracle.py").write_text("import os\n\n\ndef ends(image):\n    os._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ResourceError, match=r"measures images died 3 times \(WorkerCrashedError\): an oracle that ends"
    ):
        label(images, tmp_path / "data.parquet", controls=("deadly_oracle:ends",), progress=False)
    assert not (tmp_path / "data.parquet").exists()
