"""`python -m ctrl_ray` and `ctrl-ray`: the list of commands and the way to each."""

from __future__ import annotations

import importlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ctrl_ray
from ctrl_ray.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "tyro", "numpy", "scipy", "pyarrow", "PIL", "matplotlib", "diffusers", "transformers")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_list_names_every_command_and_the_first_one(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each."""
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, line) in COMMANDS.items():
        assert [text.split(maxsplit=1)[1] for text in lines if text.split()[:1] == [name]] == [line]
    assert "Run this first." in lines[lines.index("  python -m ctrl_ray train") - 2]


def test_the_commands_are_the_entry_points() -> None:
    """Every file of the package with a `main` is in the list, under its name."""
    files = {
        file.stem for file in (ROOT / "ctrl_ray").glob("*.py") if re.search(r"^def main\(", file.read_text(), re.M)
    }
    assert {name: module for name, (module, _) in COMMANDS.items()} == {
        name: f"ctrl_ray.{name}" for name in files - {"__main__"}
    }


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]])
def test_the_list_comes_at_once(arguments: list[str]) -> None:
    """Neither torch nor Ray nor the parser of flags is imported for it."""
    listed = _python("-X", "importtime", "-m", "ctrl_ray", *arguments)
    assert listed.returncode == 0 and listed.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listed.stderr.splitlines()}
    assert "ctrl_ray" in imported and imported.isdisjoint(HEAVY)


def test_importing_the_commands_loads_nothing_heavy() -> None:
    """Each --help comes in a moment, and Ctrl-C meets every slow import inside `command.run`."""
    imports = "; ".join(f"import {module}" for module, _ in COMMANDS.values())
    loaded = _python("-c", f"{imports}; import sys; print(*sys.modules)").stdout.split()
    assert "ctrl_ray.verify" in loaded
    assert set(loaded) & set(HEAVY) <= {"tyro"}


def test_importing_what_computes_starts_no_ray() -> None:
    """Where Ray is imported already; and the process collects garbage as before."""
    packages = "ctrl_ray.classifiers, ctrl_ray.distributed, ctrl_ray.rewards.actor"
    code = f"import gc, ray; before = gc.get_threshold(); import {packages}; "
    ended = _python("-c", code + "print(ray.is_initialized(), gc.get_threshold() == before)")
    assert ended.stdout.split() == ["False", "True"], ended.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same help, to the letter."""
    module = importlib.import_module(COMMANDS[name][0])
    texts = []
    for call in (lambda: main([name, "--help"]), lambda: module.main(["--help"])):
        with pytest.raises(SystemExit) as end:
            call()
        assert end.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and f"python -m ctrl_ray.{name}" in texts[0]


def test_a_command_is_its_module_on_the_command_line_too() -> None:
    """A refused setting: message and exit status."""
    through, direct = (
        _python("-m", *words, "--preset", "nope") for words in (("ctrl_ray", "train"), ("ctrl_ray.train",))
    )
    assert (through.returncode, through.stdout, through.stderr) == (direct.returncode, direct.stdout, direct.stderr)
    assert direct.returncode == 2 and direct.stderr.startswith(
        "error: preset 'nope' is unknown; expected one of shapes"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "error: 'trian' is not a command; did you mean 'train'?\n"),
        ("--verison", f"error: '--verison' is not a command; known are {', '.join(sorted(COMMANDS))}\n"),
    ],
)
def test_an_unknown_command_is_one_message(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the nearest name, or all."""
    assert main([name, "--resume"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", message)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ctrl_ray {ctrl_ray.__version__}\n"


def test_the_console_script_is_the_same_function() -> None:
    """As pyproject.toml declares it."""
    script = re.search(r'^ctrl-ray = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert script and getattr(importlib.import_module(script[1]), script[2]) is main


@pytest.mark.full
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    """A real signal to a real `sample`."""
    arguments = ["--base", "--base-model", "shapes", "--prompt", "a red circle", "--output-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "ctrl_ray", "sample", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a process in the background ignores it
    ) as process:
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch_cpu" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []
