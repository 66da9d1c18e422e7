"""The session of GPU tests, without a GPU: what its file says of tests that pass, fail, hang and are not reached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.gpu import session
from tests.gpu.facts import facts
from tests.gpu.session import ROOT, Part, run_session

HEAD = "import time, pytest\npytestmark = pytest.mark.gpu\n"
RECORDS = 'import sys; from tests.gpu.reporter import record; record("benchmark", within_s=float(sys.argv[-1]))'


def _part(folder: Path, name: str, body: str, test_s: float = 30) -> Part:
    file = folder / f"test_{name}.py"
    file.write_text(HEAD + body)
    return Part(str(file), test_s)


def _read(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    content = json.loads((out / "session.json").read_text())
    return content, {test["test"].rpartition("test_")[2]: test for test in content["tests"]}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and card, which take a process that imports torch."""
    monkeypatch.setattr(session, "facts", lambda: {"cards": ["a card"]})


@pytest.mark.full
def test_versions_are_known_and_a_card_that_is_not_there_is_none() -> None:
    """Of the packages that this process has."""
    found = facts()
    assert found["torch"] == torch.__version__ and found["ray"] == ray.__version__
    assert {"driver", "cuda", "cudnn", "deepspeed", "diffusers", "peft", "commit"} <= found.keys()
    assert len(found["cards"]) == torch.cuda.device_count()


@pytest.mark.full
def test_the_file_says_what_became_of_each_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test that hangs is killed at its deadline and those behind it run in another process; figures lie by their test,
    and the first line is who and what."""
    first = _part(
        tmp_path,
        "first",
        "from tests.gpu.reporter import record\n"
        "def test_passes(request):\n    record(request.node.nodeid, kl=0.5)\n"
        "def test_fails():\n    assert 1 == 2\n"
        "def test_hangs():\n    time.sleep(600)\n"
        "def test_goes_on():\n    pass\n"
        "def test_skips():\n    pytest.skip('one card')\n"
        "def test_dies():\n    import os; os._exit(3)\n"
        "def test_last():\n    pass\n",
        test_s=4,
    )
    broken = _part(tmp_path, "broken", "raise RuntimeError('cannot be collected')\n")
    benchmark = ("-c", RECORDS)
    assert run_session(tmp_path, [first, broken], benchmark, within_s=300, command="the command") == 1
    content, tests = _read(tmp_path)
    assert {name: test["status"] for name, test in tests.items()} == {
        "passes": "passed",
        "fails": "failed",
        "hangs": "timed out",
        "goes_on": "passed",
        "skips": "skipped",
        "dies": "failed",
        "last": "passed",
        "broken.py": "failed",
    }
    assert tests["passes"]["figures"] == {"kl": 0.5}
    assert "assert 1 == 2" in tests["fails"]["tail"] and "deadline of 4 s" in tests["hangs"]["tail"]
    assert tests["hangs"]["seconds"] >= 4 and tests["skips"]["tail"] == "one card"
    assert "cannot be collected" in tests["broken.py"]["tail"]
    assert content["benchmark"]["status"] == "passed"
    assert content["benchmark"]["figures"] == [{"test": "benchmark", "within_s": pytest.approx(118, abs=1)}]
    assert content["complete"] and content["session"]["command"] == "the command"
    assert content["session"]["cards"] == ["a card"]
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == content["session"]


@pytest.mark.full
def test_when_time_is_over_the_rest_is_not_run(tmp_path: Path) -> None:
    """The test under way, those behind it, and whole files; the benchmark has its own share of the time."""
    slow = _part(
        tmp_path,
        "slow",
        "def test_quick():\n    pass\ndef test_long():\n    time.sleep(600)\ndef test_behind():\n    pass\n",
        test_s=100,
    )
    never = _part(tmp_path, "never", "def test_never():\n    pass\n")
    started = time.monotonic()
    status = run_session(tmp_path, [slow, never], ("-c", RECORDS), within_s=30, benchmark_s=15)
    assert time.monotonic() - started < 60
    content, tests = _read(tmp_path)
    assert status == 0 and content["complete"]
    assert {name: test["status"] for name, test in tests.items()} == {
        "quick": "passed",
        "long": "not run",
        "behind": "not run",
        "never.py": "not run",
    }
    assert content["benchmark"]["status"] == "passed"


@pytest.mark.full
def test_a_stop_leaves_a_whole_file(tmp_path: Path) -> None:
    """SIGTERM in the middle of a test; nothing of it goes on."""
    part = _part(
        tmp_path,
        "stopped",
        "import os, pathlib\ndef test_waits():\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n    time.sleep(600)\n",
    )
    script = (
        "import signal, sys; from pathlib import Path; from tests.gpu import session\n"
        "signal.signal(signal.SIGTERM, session._stop); session.facts = dict\n"
        f"sys.exit(session.run_session(Path({str(tmp_path)!r}), [session.Part({part.file!r}, 60)]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    file = tmp_path / "session.json"
    while not ((tmp_path / "pid").exists() and "test_waits" in file.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    content, tests = _read(tmp_path)
    assert content["complete"] and tests["waits"]["status"] == "not run"
    assert content["benchmark"]["status"] == "not run"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
