"""The common end of all commands: exit statuses, Ctrl-C, tracebacks on request, closed pipes."""

from __future__ import annotations

import errno
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from ctrl_ray import command, errors
from ctrl_ray.command import run, stoppable

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = {
    getattr(errors, name): int(status)
    for status, names in re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|$", inspect.cleandoc(command.__doc__ or ""), re.M)
    for name in re.findall(r"\w+Error", names)
}
"""The table in the module's docstring."""


def _raising(error: BaseException) -> command.Body:
    def body(argv: Sequence[str]) -> None:
        raise error

    return body


def _process(code: str, **options: object) -> subprocess.Popen[str]:
    """A Python process that listens to SIGINT, also where this one was started in the background and does not."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,  # type: ignore[call-overload]
    )


def test_every_error_has_its_exit_status() -> None:
    """None is forgotten in the table; the base class is never raised by itself."""
    assert {
        **dict.fromkeys((errors.RewardError, errors.NonFiniteError, errors.ResourceError, errors.CheckpointError), 1),
        **dict.fromkeys(
            (errors.ConfigError, errors.DataError, errors.ModelError, errors.RunFolderError, errors.GpuMemoryError), 2
        ),
    } == DOCUMENTED
    own = {
        member for _, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, errors.CtrlRayError)
    }
    assert own - set(DOCUMENTED) == {errors.CtrlRayError, errors.InterruptedRunError}


@pytest.mark.parametrize(("error", "status"), [*DOCUMENTED.items(), (errors.InterruptedRunError, 130)])
@pytest.mark.parametrize("crossed_ray", [False, True])
def test_an_error_is_one_line_and_its_status(
    error: type[errors.CtrlRayError], status: int, crossed_ray: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raised here, or in a task of Ray's."""
    raised: BaseException = error("what, got, expected, fix")
    if crossed_ray:
        raised = RayTaskError("task", "Traceback of the task", raised)
    assert run(_raising(raised), []) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == ("" if status == 130 else "error: ") + "what, got, expected, fix\n"


def test_a_body_has_its_own_status_and_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is 0; without arguments those of the process are taken."""
    seen: list[Sequence[str]] = []
    assert run(seen.append, ["--flag"]) == 0
    monkeypatch.setattr(sys, "argv", ["program", "--other"])
    assert run(seen.append) == 0
    assert seen == [["--flag"], ["--other"]]
    assert run(lambda argv: 1, []) == 1


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It is nobody's fault in the code."""
    assert run(_raising(OSError(28, "No space left on device", "/data/x")), []) == 1
    assert capsys.readouterr().err.startswith(
        "error: a disk is full: [Errno 28] No space left on device: '/data/x'; make"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP])
def test_a_path_that_the_system_refuses_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_raising(OSError(number, os.strerror(number), "/data/x" + "y" * 300)), []) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: /data/xyyy") and f"… (307 characters) cannot be used: {os.strerror(number)}; " in said
    )
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(_raising(OSError(errno.EBADF, os.strerror(errno.EBADF))), [])


def test_what_nobody_expected_keeps_its_traceback() -> None:
    """And the flags' parser ends the process as it does."""
    with pytest.raises(ZeroDivisionError):
        run(_raising(ZeroDivisionError()), [])
    with pytest.raises(SystemExit, match="2"):
        run(_raising(SystemExit(2)), [])


def test_verbose_shows_the_traceback_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The status stays the same."""
    monkeypatch.setenv("CTRL_RAY_VERBOSE", "1")
    assert run(_raising(errors.DataError("row 3")), []) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "error: row 3"
    assert any("in body" in line for line in lines)
    assert run(_raising(KeyboardInterrupt()), []) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "interrupted"


def test_ctrl_c_is_one_line_and_130() -> None:
    """In a real process, with a real signal."""
    code = (
        "import sys, time\n"
        "from ctrl_ray.command import run\n"
        "def body(argv):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "sys.exit(run(body))"
    )
    with _process(code, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_ctrl_c_in_code_made_from_a_string_is_130_too(tmp_path: Path) -> None:
    """As while dataclasses are made; `python -m` would end by the signal, for which a caller sees -2."""
    code = "import sys\nfrom ctrl_ray.command import run\nsys.exit(run(lambda argv: exec('raise KeyboardInterrupt')))"
    (tmp_path / "from_a_string.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path)))}
    command_line = [sys.executable, "-m", "from_a_string"]
    ended = subprocess.run(command_line, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("lambda argv: print('short')", 0),  # all is done when the text is written out
        ("lambda argv: [print('x' * 1000) for _ in range(1000)] and None", 1),
        ("lambda argv: [print('x', flush=True), 1 / 0]", 1),
    ],
)
def test_nobody_reads_the_output(body: str, status: int) -> None:
    """As with `| head`, which has gone: the command ends in silence."""
    read, write = os.pipe()
    os.close(read)
    code = f"import sys\nfrom ctrl_ray.command import run\nsys.exit(run({body}))"
    with _process(code, stdout=write, env={**os.environ, "PYTHONUNBUFFERED": ""}) as process:
        os.close(write)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (status, "")


def test_a_sign_that_the_terminal_lacks_does_not_end_the_command() -> None:
    """As in a container, whose output is ASCII; a stream that has its own way keeps it."""
    code = (
        "import sys\nfrom ctrl_ray.command import run\nfrom ctrl_ray.errors import ConfigError\n"
        "def body(argv):\n    print('2 × 3 größe 好')\n    raise ConfigError('größe')\n"
        "sys.exit(run(body))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with _process(code, stdout=subprocess.PIPE, env=environment) as process:
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (2, "2 ? 3 gr??e ?\n", "error: gr\\xf6\\xdfe\n")


def test_matplotlib_has_a_folder_where_there_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it complains in three lines; what the user set stays, and with a home nothing is changed."""
    (tmp_path / "home").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", "restored in the end")
    del os.environ["MPLCONFIGDIR"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(lambda argv: 0, []) == 0 and "MPLCONFIGDIR" not in os.environ
    monkeypatch.setenv("HOME", "/proc/nobody")
    run(lambda argv: 0, [])
    folder = Path(os.environ["MPLCONFIGDIR"])
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MPLCONFIGDIR", "/mine")
    run(lambda argv: 0, [])
    assert os.environ["MPLCONFIGDIR"] == "/mine"


def test_another_pipe_that_breaks_is_a_failure() -> None:
    """Only a reader of the command's own output may leave."""
    with pytest.raises(BrokenPipeError):
        run(_raising(BrokenPipeError("a worker's pipe")), [])


def test_sigterm_says_how_to_go_on() -> None:
    """As Ctrl-C does, inside `stoppable` only; the handler before it is there again."""
    before = signal.getsignal(signal.SIGTERM)
    says = r"what was finished is in runs/x\. .*--resume"
    with pytest.raises(errors.InterruptedRunError, match=says), stoppable("runs/x"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(errors.InterruptedRunError, match="after update 3"), stoppable("runs/x"):
        raise errors.InterruptedRunError("after update 3")


def test_nothing_finished_is_nothing_to_go_on_from() -> None:
    """Asked when the signal has come."""
    with (
        pytest.raises(
            errors.InterruptedRunError, match=r"^stopped; nothing was finished\. Give the same command again$"
        ),
        stoppable("runs/x", lambda: False),
    ):
        raise KeyboardInterrupt


def test_sigterm_ends_every_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    """One line; the handler before it is there again."""
    before = signal.getsignal(signal.SIGTERM)

    def body(argv: Sequence[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    assert run(body, []) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_gets_no_signals() -> None:
    """So that `fit` and `sweep` can run in one, as in a notebook."""
    before, inside = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with stoppable("runs/x"):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [before]


def test_values_by_name() -> None:
    """A value may hold the sign itself."""
    assert command.named_values("--classifier", ["a=x/y", "b=C=1/z"], "a=B") == {"a": "x/y", "b": "C=1/z"}
    assert command.named_values("--classifier", [], "a=B") == {}
    for texts in (["folder"], ["=folder"], ["name="], ["a=x", "a=y"]):
        with pytest.raises(errors.ConfigError, match=f"--classifier '{texts[-1]}' is not NAME=VALUE, once .* a=B"):
            command.named_values("--classifier", texts, "a=B")
