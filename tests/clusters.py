"""Rays of their own for tests: `ray start --head` on this machine, with a token, ended by its processes' mark."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")


@dataclasses.dataclass(frozen=True)
class Head:
    """The head of a cluster on this machine."""

    address: str
    dashboard: str
    environment: Mapping[str, str]
    """Of a user who has the token."""

    def ray(self, *arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        """The `ray` command, as a user in the repository's root would call it."""
        return self.run(RAY, *arguments, timeout=timeout, **environment)

    def python(self, *arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        """Python as a driver of this cluster."""
        return self.run(sys.executable, *arguments, timeout=timeout, RAY_ADDRESS=self.address, **environment)

    def run(self, *command: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in the repository's root; both streams in `stdout`."""
        return subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )


@contextlib.contextmanager
def started_head(*flags: str, port: int | None = None, **environment: str) -> Iterator[Head]:
    """`ray start --head` with token authentication and `flags`; at the end all its processes are killed.

    They are found by a variable that every process of the cluster inherits: `ray stop` would end other Rays too.
    """
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_head_", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # short, as Ray's sockets need it
        (folder / "token").write_text(secrets.token_hex(32))
        known = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_worker_niceness": "0",
            "CTRL_RAY_TEST_CLUSTER": name,
            **environment,
        }
        head, dashboard, agent, client = free_ports(4)
        command = [
            *(RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port or head}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", "--dashboard-host=127.0.0.1"),
            *(
                f"--ray-client-server-port={client}",
                "--object-store-memory=150000000",
                f"--temp-dir={name}/ray",
                *flags,
            ),
        ]
        try:
            done = subprocess.run(
                command, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
            )
            assert done.returncode == 0, done.stdout
            url = f"http://127.0.0.1:{dashboard}"
            yield Head(f"127.0.0.1:{port or head}", url, {**known, "RAY_API_SERVER_ADDRESS": url})
        finally:
            kill_marked(f"CTRL_RAY_TEST_CLUSTER={name}")
            shutil.rmtree(folder / "ray", ignore_errors=True)


@contextlib.contextmanager
def growing_head(file: Path, **environment: str) -> Iterator[Head]:
    """A head without CPUs and an autoscaler that may add two nodes of two CPUs (`cpu_worker`), which are processes of this
    machine; `file` is written for it."""
    (port,) = free_ports(1)
    empty: dict[str, object] = {name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")}
    empty |= {name: [] for name in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")}
    empty |= {name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
    node: dict[str, object] = {"node_config": {}}
    config: dict[str, object] = {
        **empty,
        "cluster_name": "growing",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "head": {**node, "resources": {"CPU": 0}, "max_workers": 0},
            "cpu_worker": {**node, "resources": {"CPU": 2}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "head",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        "docker": {},
    }
    file.write_text(json.dumps(config))
    flags = ("--num-cpus=0", f"--autoscaling-config={file}")
    with started_head(*flags, port=port, AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_FAKE_CLUSTER="1", **environment) as head:
        yield head


def free_ports(count: int) -> list[int]:
    """Free now, and below the ports that Ray gives to its workers."""
    found: list[int] = []
    for port in range(9100 + os.getpid() % 500, 10_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def kill_marked(mark: str) -> None:
    """SIGKILL to every other process whose environment has the line `mark`."""
    for _ in range(3):
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                lines = (entry / "environ").read_bytes().split(b"\0")
                if mark.encode() in lines and int(entry.name) != os.getpid():
                    os.kill(int(entry.name), signal.SIGKILL)
        time.sleep(0.3)
