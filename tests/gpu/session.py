"""All that a card is wanted for, in one command and one file: `python -m tests.gpu.session --out DIR`.

The tests of this folder, the most telling first, then the benchmark, within nine minutes. A test, or a process, that is over
its deadline is killed and the rest go on. DIR/session.json is whole after every test, whatever ends the session.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.facts import facts
from tests.gpu.reporter import EVENTS, MEASURED, TAIL

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 540.0
_POLL_S = 0.1
_FINAL_S = 3.0
"""What is kept to write the file and end."""


@dataclass(frozen=True)
class Part:
    """A file of tests, which run in one process as long as none has to be killed."""

    file: str
    test_s: float
    """Deadline of each of its tests."""
    start_s: float = 75.0
    """Deadline of imports and collection."""


PARTS = (
    Part("tests/gpu/test_numbers.py", 40),
    Part("tests/gpu/test_ray.py", 120),
    Part("tests/gpu/test_precision.py", 60),
    Part("tests/gpu/test_host.py", 30),
    Part("tests/gpu/test_engines.py", 120),
)
BENCHMARK = ("-m", "tests.gpu.benchmark")
BENCHMARK_S = 120.0
"""What of the time is the benchmark's; it is told, and stops by itself."""


@dataclass
class Session:
    """What has been found so far; `save` writes it as a whole."""

    file: Path
    whole: dict[str, Any]
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def save(self, *, complete: bool = False) -> None:
        """Atomically."""
        content = {
            **self.whole,
            "complete": complete,
            "seconds": round(time.monotonic() - self.started, 1),
            "tests": [{"test": name, **test} for name, test in self.tests.items()],
        }
        if "benchmark" in self.whole:
            content["benchmark"] = self.whole["benchmark"]
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.file)

    def ended(self, name: str, **outcome: Any) -> None:
        """Note a test's outcome, and say it."""
        self.tests.setdefault(name, {}).update(outcome)
        self.save()
        print(f"{outcome['status']:10} {outcome.get('seconds', 0):7.1f} s  {name}", flush=True)

    @property
    def status(self) -> int:
        """0: something passed, and nothing that ran did not."""
        found = {test["status"] for test in self.tests.values()}
        if "benchmark" in self.whole:
            found.add(self.whole["benchmark"]["status"])
        return 0 if "passed" in found and not found & {"failed", "timed out"} else 1


def run_session(
    out: Path,
    parts: Sequence[Part] = PARTS,
    benchmark: Sequence[str] = BENCHMARK,
    *,
    within_s: float = WITHIN_S,
    benchmark_s: float = BENCHMARK_S,
    expression: str | None = None,
    command: str = "",
) -> int:
    """Run the parts in order, then the benchmark (none where it is empty); returns the command's exit status."""
    end = time.monotonic() + within_s - _FINAL_S
    out.mkdir(parents=True, exist_ok=True)
    first = {**facts(), "command": command, "within_s": within_s}
    print(json.dumps(first), flush=True)
    session = Session(out / "session.json", {"session": first})
    session.save()
    try:
        with tempfile.TemporaryDirectory(prefix="ctrl_ray_gpu_session_") as folder:
            for index, part in enumerate(parts):
                place = Path(folder) / str(index)
                _run_part(session, part, place, end - (benchmark_s if benchmark else 0), expression)
            if benchmark:
                _run_benchmark(session, benchmark, Path(folder) / "benchmark", min(end, time.monotonic() + benchmark_s))
    finally:
        for part in parts:
            if not any(name.partition("::")[0] == part.file for name in session.tests):
                session.tests[part.file] = {"status": "not run"}
        for test in session.tests.values():
            test.setdefault("status", "not run")
        if benchmark:
            session.whole.setdefault("benchmark", {"status": "not run", "figures": []})
        session.save(complete=True)
    return session.status


def _run_part(session: Session, part: Part, place: Path, until: float, expression: str | None) -> None:
    """The tests of a file; those that were left by a process that had to be killed go on in another."""
    chosen, round_ = [part.file], 0
    while chosen and time.monotonic() < until:
        round_ += 1
        lines = _Lines(
            place.with_name(f"{place.name}-{round_}-events"), place.with_name(f"{place.name}-{round_}-figures")
        )
        arguments = ["-m", "pytest", "-p", "tests.gpu.reporter", "-m", "gpu", "-q", "-p", "no:cacheprovider", *chosen]
        if expression and round_ == 1:
            arguments += ["-k", expression]
        with _process(arguments, lines, place.with_name(f"{place.name}-{round_}-output")) as (process, output):
            left = _follow(session, part, process, lines, output, until)
        chosen = [_selected(part, name) for name in left]


def _follow(session: Session, part: Part, process: Any, lines: _Lines, output: Path, until: float) -> list[str]:
    """Note what a process of pytest tells, until it ends or has to; returns the tests that are left for another one."""
    left: list[str] | None = None
    running, since = None, time.monotonic()
    while True:
        over = process.poll() is not None
        for event in lines.events():
            since = time.monotonic()
            if "collected" in event:
                left = [_named(part, name) for name in event["collected"]]
                for name in left:
                    session.tests.setdefault(name, {})
                session.save()
            elif "started" in event:
                running = _named(part, event["started"])
            else:
                name, running = _named(part, event.pop("finished")), None
                assert left is not None
                left.remove(name)
                session.ended(name, **event, **_figures(part, lines.figures(), name))
        now, limit = time.monotonic(), part.start_s if left is None else part.test_s
        if not over and now < until and now - since <= limit:
            time.sleep(_POLL_S)
            continue
        waited, subject = round(now - since, 1), running or part.file
        if running is not None and left is not None:
            left.remove(running)
        if over and running is None and process.returncode in (0, 1):
            return []  # pytest ended of its own will
        figures = _figures(part, lines.figures(), subject)
        if over:
            status = "skipped" if process.returncode == 5 else "failed"  # 5: there is no such test
            session.ended(subject, status=status, seconds=waited, tail=_tail(output), **figures)
        elif now < until:
            tail = f"over its deadline of {limit:g} s\n{_tail(output)}"
            session.ended(subject, status="timed out", seconds=waited, tail=tail, **figures)
        elif running is not None:
            session.ended(subject, status="not run", seconds=waited, tail="cut off: the session's time was over")
        return left if left and running is not None and now < until else []


def _run_benchmark(session: Session, command: Sequence[str], place: Path, until: float) -> None:
    """Its figures are kept as they come."""
    found: dict[str, Any] = {"status": "not run", "figures": []}
    session.whole["benchmark"] = found
    started, lines = time.monotonic(), _Lines(place.with_suffix(".events"), place.with_suffix(".figures"))
    seconds = until - started - 2
    if seconds < 5:
        return
    with _process([*command, "--within-s", f"{seconds:.0f}"], lines, place.with_suffix(".output")) as (process, output):
        while process.poll() is None and time.monotonic() < until:
            found["figures"] += lines.figures()
            session.save()
            time.sleep(_POLL_S)
        found["figures"] += lines.figures()
        ended = process.poll()
        found["status"] = "timed out" if ended is None else "failed" if ended else "passed"
        found["seconds"] = round(time.monotonic() - started, 1)
        if found["status"] != "passed":
            found["tail"] = _tail(output)
    print(f"{found['status']:10} {found['seconds']:7.1f} s  benchmark", flush=True)
    session.save()


@contextmanager
def _process(arguments: Sequence[str], lines: _Lines, output: Path) -> Iterator[tuple[Any, Path]]:
    """A process of Python in a group of its own, of which nothing is left at the end."""
    environment = {**os.environ, EVENTS: str(lines.event_file), MEASURED: str(lines.figure_file)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, output
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Lines:
    """JSON lines of two files, each told once."""

    def __init__(self, event_file: Path, figure_file: Path) -> None:
        self.event_file, self.figure_file = event_file, figure_file
        self._read = {event_file: 0, figure_file: 0}

    def events(self) -> list[dict[str, Any]]:
        """New ones of the reporter."""
        return self._new(self.event_file)

    def figures(self) -> list[dict[str, Any]]:
        """New ones of `tests.gpu.reporter.record`."""
        return self._new(self.figure_file)

    def _new(self, file: Path) -> list[dict[str, Any]]:
        if not file.exists():
            return []
        whole = file.read_bytes()[self._read[file] :].rpartition(b"\n")[0]
        self._read[file] += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]


def _figures(part: Part, lines: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """What a test measured, as part of its entry."""
    mine = [line for line in lines if _named(part, line["test"]) == name]
    return {"figures": {key: value for line in mine for key, value in line.items() if key != "test"}} if mine else {}


def _named(part: Part, node: str) -> str:
    """A test's name in the file: pytest's, behind the part's own path."""
    return f"{part.file}::{node.partition('::')[2]}"


def _selected(part: Part, name: str) -> str:
    return name if name.startswith(part.file) else part.file


def _tail(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace")[-TAIL:]


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the session; SIGTERM and Ctrl-C leave a whole file too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of session.json")
    parser.add_argument("--within-s", type=float, default=WITHIN_S, help="seconds for all")
    parser.add_argument("-k", dest="expression", help="pytest's: only these tests")
    parser.add_argument("--no-benchmark", action="store_true", help="tests alone")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    return run_session(
        arguments.out,
        benchmark=() if arguments.no_benchmark else BENCHMARK,
        within_s=arguments.within_s,
        expression=arguments.expression,
        command=" ".join(["python -m tests.gpu.session", *(sys.argv[1:] if argv is None else argv)]),
    )


if __name__ == "__main__":
    sys.exit(main())
