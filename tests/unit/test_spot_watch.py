"""cluster/spot-watch.sh, run as it is: a real HTTP server on loopback speaks AWS's metadata protocol (IMDSv2).

Two things are stand-ins: `ray` on PATH is a shim that writes its arguments down, because draining takes a cluster, and the
raylet is a sleeping process with the part of a raylet's command line that the watcher reads.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "spot-watch.sh"
NODE = "0123456789abcdef" * 3 + "01234567"
HEAD = "10.0.0.1:6379"


class Metadata(ThreadingHTTPServer):
    """The instance's metadata service. Without a session token it answers 401, as AWS does under IMDSv2."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.notice: str | None = None
        self.tokens = {"token-1"}
        self.broken = False
        self.requests: list[tuple[str, str]] = []

    @property
    def looks(self) -> int:
        return self.requests.count(("GET", "/latest/meta-data/spot/instance-action"))


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        self.server.requests.append(("PUT", self.path))
        lives = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.server.broken or self.path != "/latest/api/token" or not 1 <= int(lives or 0) <= 21600:
            return self._answer(400, "")
        self._answer(200, sorted(self.server.tokens)[-1])

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path))
        if self.server.broken:
            return self._answer(500, "")
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            return self._answer(401, "")
        if self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            return self._answer(404, "<h1>404 - Not Found</h1>")
        self._answer(200, self.server.notice)

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Node:
    """A machine with a raylet, a `ray` on PATH, and the watcher."""

    def __init__(self, folder: Path, address: str) -> None:
        self.log, self.called = folder / "logs" / "spot-watch.log", folder / "called"
        shim = folder / "bin" / "ray"
        shim.parent.mkdir()
        # One refusal for each line of the file `refusals`.
        shim.write_text(
            f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" "mode ${{RAY_AUTH_MODE:-}}" >> {self.called}\n'
            f'if [[ -s {folder}/refusals ]]; then sed -i 1d {folder}/refusals; echo "not accepted"; exit 1; fi\n'
        )
        shim.chmod(0o755)
        self.refusals = folder / "refusals"
        sleep = [sys.executable, "-c", "import time; time.sleep(120)"]
        # As in Ray 2.60: one option in either spelling, others around them, and the agent's id inside another argument.
        options = ["--raylet_socket_name=/tmp/r", f"--node_id={NODE}", f"--gcs-address={HEAD}", "--head"]
        self.raylet = subprocess.Popen([*sleep, *options, "--dashboard_agent_command=agent.py --node-id=ffff"])
        self.environment = {
            **os.environ,
            "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "SPOT_WATCH_METADATA": address,
            "SPOT_WATCH_INTERVAL_S": "0.05",
            "SPOT_WATCH_LOG": str(self.log),
            "SPOT_WATCH_RAYLET_PID": str(self.raylet.pid),
        }
        self.watcher: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        self.watcher = subprocess.Popen(["bash", str(SCRIPT)], env=self.environment)
        return self.watcher

    def calls(self) -> list[str]:
        return self.called.read_text().splitlines() if self.called.exists() else []

    def end(self) -> None:
        for process in (self.watcher, self.raylet):
            if process is not None:
                process.kill()
                process.wait()


@pytest.fixture
def node(tmp_path: Path, metadata: Metadata) -> Iterator[Node]:
    made = Node(tmp_path, f"http://127.0.0.1:{metadata.server_port}")
    yield made
    made.end()


def _wait(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def _notice(in_s: float, action: str = "terminate") -> str:
    at = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=in_s)
    return json.dumps({"action": action, "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_a_notice_drains_this_node_once_with_the_time_that_is_left(node: Node, metadata: Metadata) -> None:
    watcher = node.start()
    _wait(lambda: metadata.looks >= 3)
    assert node.calls() == []
    metadata.notice = _notice(118)
    assert watcher.wait(timeout=20) == 0
    (call, mode) = node.calls()
    words, left = call.rsplit(" ", 1)
    assert words == (
        f"drain-node --address {HEAD} --node-id {NODE} --reason DRAIN_NODE_REASON_PREEMPTION "
        "--reason-message AWS spot interruption notice --deadline-remaining-seconds"
    )
    assert 98 <= int(left) <= 118
    assert mode == "mode token"  # the environment of the cluster's token reaches ray
    assert "drain accepted" in node.log.read_text()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # importing Ray's command line imports Ray Serve, with pydantic's deprecations
def test_ray_knows_the_command_and_its_options(node: Node, metadata: Metadata) -> None:
    """What the shim was given, given to the parser of the real command, which is not run."""
    import click
    from ray.scripts.scripts import drain_node

    metadata.notice = _notice(60)
    assert node.start().wait(timeout=20) == 0
    command = node.calls()[0].replace("AWS spot interruption notice", "notice").split()
    assert command[0] == drain_node.name
    parsed = drain_node.make_context("drain-node", command[1:])
    assert parsed.params["node_id"] == NODE
    assert parsed.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    with pytest.raises(click.UsageError):
        drain_node.make_context("drain-node", [*command[1:], "--reason", "SPOT"])


@pytest.mark.parametrize(
    ("notice", "least", "most"),
    [
        (_notice(-30), 0, 0),  # late: no negative deadline, which ray refuses
        ('{"action": "stop"}', 110, 110),
        ('{\n "action" : "terminate",\n "time" : "soon"\n}', 110, 110),
    ],
    ids=["late", "without a time", "not a time"],
)
def test_an_odd_notice_is_passed_on_as_well(node: Node, metadata: Metadata, notice: str, least: int, most: int) -> None:
    metadata.notice = notice
    assert node.start().wait(timeout=20) == 0
    assert least <= int(node.calls()[0].rsplit(" ", 1)[1]) <= most


def test_an_expired_session_token_is_renewed(node: Node, metadata: Metadata) -> None:
    node.start()
    _wait(lambda: metadata.looks >= 2)
    metadata.tokens = {"token-2"}
    metadata.notice = _notice(100)
    _wait(lambda: len(node.calls()) == 2)
    assert metadata.requests.count(("PUT", "/latest/api/token")) == 2


def test_a_refused_drain_is_tried_again(node: Node, metadata: Metadata) -> None:
    node.refusals.write_text("1\n2\n")
    metadata.notice = _notice(100)
    assert node.start().wait(timeout=20) == 0
    assert len(node.calls()) == 2 * 3
    assert node.log.read_text().count("not accepted, trying again") == 2


def test_it_stays_through_a_broken_metadata_service(node: Node, metadata: Metadata) -> None:
    metadata.broken = True
    watcher = node.start()
    _wait(lambda: len(metadata.requests) >= 3)
    assert watcher.poll() is None
    metadata.broken = False
    metadata.notice = _notice(100)
    assert watcher.wait(timeout=20) == 0
    assert len(node.calls()) == 2


def test_it_is_quiet_without_a_notice_and_ends_with_the_raylet(node: Node, metadata: Metadata) -> None:
    """An on-demand instance: 404 for ever."""
    watcher = node.start()
    _wait(lambda: metadata.looks >= 5)
    lines = node.log.read_text().splitlines()
    assert len(lines) == 1 and NODE in lines[0]
    node.raylet.kill()
    node.raylet.wait()
    assert watcher.wait(timeout=20) == 0
    assert node.log.read_text().splitlines()[-1].endswith("has ended")
    assert node.calls() == []


def test_without_a_raylet_it_says_so_and_ends(node: Node) -> None:
    node.raylet.kill()
    node.raylet.wait()
    assert node.start().wait(timeout=20) == 1
    assert "no raylet here" in node.log.read_text()


def test_it_finds_the_raylet_by_its_name(node: Node, metadata: Metadata, tmp_path: Path) -> None:
    """Of several, the newest: earlier ones of this machine are on their way out."""
    (tmp_path / "raylet").symlink_to("/bin/bash")
    options = [f"--node-id={NODE[::-1]}", f"--gcs_address={HEAD}"]  # the other spelling of both
    raylet = subprocess.Popen(["./raylet", "-c", "while :; do sleep 0.1; done", "raylet", *options], cwd=tmp_path)
    try:
        comm = Path("/proc") / str(raylet.pid) / "comm"
        _wait(lambda: comm.read_text().strip() == "raylet")  # the kernel renames it a moment after Popen returns
        del node.environment["SPOT_WATCH_RAYLET_PID"]
        metadata.notice = _notice(100)
        assert node.start().wait(timeout=20) == 0
    finally:
        raylet.kill()
        raylet.wait()
    assert f"--node-id {NODE[::-1]} " in node.calls()[0]
