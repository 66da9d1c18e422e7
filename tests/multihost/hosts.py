"""Hosts on one machine: each with its own network, processes, files and SSH server, on a network that leads nowhere.

Nothing has a name outside: namespaces are those of processes that end when their stdin is closed, at the latest when the
test's process ends, however it ends. With the processes go namespaces, mounts, cables and the bridge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.multihost.switch import BRIDGE, GATEWAY, NETWORK

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESERVER = "192.0.2.53"
"""A foreign address: whoever asks for a name is noticed by it."""
_NAMESPACES = ("net", "mnt", "pid", "uts", "ipc")
_TOOLS = ("ip", "unshare", "nsenter", "mount", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd")
_SSHD_CONFIG = """\
ListenAddress {address}
HostKey {key}
AuthorizedKeysFile {home}/.ssh/authorized_keys
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
"""


def why_not() -> str:
    """Why hosts cannot be made here; '' when they can."""
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which only root can make"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing; apt-get install openssh-server rsync iproute2"
    probe = "mount -t tmpfs tmpfs /run && ip link add left type veth peer name right && ip link add middle type bridge"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", probe]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"namespaces, bridges or mounts are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclasses.dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    address: str
    folder: Path
    """etc/, home/ and tmp/ of the host; outside of it only the shared folder can be written to."""
    pid: int
    """Its process 1, as seen from here."""

    def command(self, *words: str | Path, env: Mapping[str, str] | None = None) -> list[str]:
        """What runs `words` on the host, as root in the repository's folder, with this environment's programs."""
        variables = {
            "HOME": pwd.getpwuid(0).pw_dir,
            "LANG": "C.UTF-8",
            "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TERM": "dumb",
            **(env or {}),
        }
        return [
            *("nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--uts", "--ipc", "--"),
            *("env", "--ignore-environment", f"--chdir={REPOSITORY}", *map("=".join, variables.items())),
            *map(str, words),
        ]

    def run(
        self, *words: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, without input; stdout and stderr are one text."""
        return subprocess.run(
            self.command(*words, env=env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )

    def start(self, *words: str | Path, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start in the background, in a session of its own, with all output in a file."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command("setsid", *words, env=env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def signal(self, process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """A signal for what `start` started, and for none of its children."""
        (pid,) = _children(process.pid)
        os.kill(pid, number)

    def interrupt(self, process: subprocess.Popen[bytes]) -> None:
        """Ctrl-C for what `start` started; waits for its end."""
        for pid in _children(process.pid):  # nsenter waits for the program, which leads its session
            os.killpg(pid, signal.SIGINT)
        process.wait(timeout=30)

    def processes(self) -> list[str]:
        """Command lines of what runs on the host, less its process 1, SSH server and the process that keeps it."""
        space = _namespace(self.pid, "pid")
        found = []
        for pid in _pids():
            if pid != self.pid and _namespace(pid, "pid") == space:
                line = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
                if line and line != "cat" and not line.startswith("sshd: /usr/sbin/sshd"):
                    found.append(line)
        return found


class Hosts(Mapping[str, Host]):
    """A context manager. All hosts see `folder`/shared, this Python environment and this repository at their own paths."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.shared, self._names = folder, folder / "shared", names
        self._attempts = folder / "foreign.jsonl"
        self._stack = contextlib.ExitStack()
        self._hosts: dict[str, Host] = {}
        self._namespaces: set[str] = set()
        self._before = _outside(folder)

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as stack:
            self.shared.mkdir(parents=True)
            module = [sys.executable, "-m", "tests.multihost.switch", str(self._attempts)]
            switch = stack.enter_context(_kept(["unshare", "--net", "--", *module], self.folder / "switch.log"))
            self._switch = switch.pid
            self._attempts.touch()
            key = self.folder / "id_ed25519"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            for number, name in enumerate(self._names, start=1):
                self._hosts[name] = self._add(stack, name, str(NETWORK[number]), key)
            for pid in (self._switch, *(host.pid for host in self.values())):
                self._namespaces |= {_namespace(pid, kind) for kind in _NAMESPACES}
            self._namespaces -= {_namespace(os.getpid(), kind) for kind in _NAMESPACES}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def cut_off(self, name: str) -> None:
        """Pull the host's cable."""
        self._ip(self._switch, f"link set dev {name} down")

    def plug_in(self, name: str) -> None:
        """Put it back."""
        self._ip(self._switch, f"link set dev {name} up")

    def foreign(self) -> list[dict[str, Any]]:
        """Attempts to reach an address outside of the hosts' network, so far."""
        return [json.loads(line) for line in self._attempts.read_text().splitlines()]

    def left_behind(self, timeout_s: float = 10.0) -> list[str]:
        """After the end: what there is that was not there before. Processes may take a moment to go."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = [
                f"process {pid}: {_read(Path(f'/proc/{pid}/cmdline'))!r} in {kind} namespace"
                for pid in _pids()
                for kind in _NAMESPACES
                if _namespace(pid, kind) in self._namespaces
            ]
            left += [f"new: {thing}" for thing in sorted(_outside(self.folder) - self._before)]
            left += [f"gone: {thing}" for thing in sorted(self._before - _outside(self.folder))]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def _add(self, stack: contextlib.ExitStack, name: str, address: str, key: Path) -> Host:
        folder = self.folder / name
        _write_files(folder, name, address, self._names, key)
        spaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child"]
        visible = dict.fromkeys(map(str, (sys.base_prefix, sys.prefix, REPOSITORY)))
        script = [str(Path(__file__).with_name("host.sh")), str(folder), str(self.shared), *visible]
        keeper = stack.enter_context(_kept(["unshare", *spaces, *script], folder / "host.log"))
        (pid,) = _children(keeper.pid)
        host = Host(name, address, folder, pid)
        self._ip(self._switch, f"link add name {name} type veth peer name eth0 netns {pid}")
        self._ip(self._switch, f"link set dev {name} up master {BRIDGE}")
        for command in (
            "link set lo up",
            "link set eth0 up",
            f"address add {address}/{NETWORK.prefixlen} dev eth0",
            f"route add default via {GATEWAY}",
        ):
            self._ip(pid, command)
        if Path("/proc/net/if_inet6").exists():
            self._ip(pid, "-6 route add default dev eth0")
        assert host.run("hostname", name).returncode == 0
        assert keeper.stdin is not None
        keeper.stdin.write("go\n")
        keeper.stdin.flush()
        return host

    @staticmethod
    def _ip(pid: int, command: str) -> None:
        done = subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", *command.split()], capture_output=True)
        assert done.returncode == 0, f"ip {command}: {done.stderr.decode()}"


def _write_files(folder: Path, name: str, address: str, names: Sequence[str], key: Path) -> None:
    home = pwd.getpwuid(0).pw_dir
    for part in ("etc", "tmp", "home/.ssh"):
        (folder / part).mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    table = [f"{NETWORK[number]} {host}" for number, host in enumerate(names, start=1)]
    (folder / "etc" / "hosts").write_text("\n".join(["127.0.0.1 localhost", *table, ""]))
    (folder / "etc" / "resolv.conf").write_text(f"nameserver {NAMESERVER}\noptions timeout:1 attempts:1\n")
    (folder / "etc" / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # without PAM a locked account cannot log in
    # as quick as the test itself: Ray's workers would give way to everything else on this machine
    (folder / "home" / ".bashrc").write_text("export RAY_worker_niceness=0\n")
    ssh = folder / "home" / ".ssh"
    shutil.copy(f"{key}.pub", ssh / "authorized_keys")
    shutil.copy(key, ssh / key.name)
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(address=address, key=f"{home}/.ssh/{key.name}", home=home))


@contextlib.contextmanager
def _kept(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that says `ready` and lives until its stdin is closed."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        answer = process.stdout.readline()
        assert answer == "ready\n", f"{command}: {answer!r} {log.read_text()}"
        yield process
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # a host's process 1 goes with it: --kill-child
            process.wait()
        process.stdout.close()


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _children(pid: int) -> list[int]:
    return [int(child) for child in _read(Path(f"/proc/{pid}/task/{pid}/children")).split()]


def _namespace(pid: int, kind: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    return ""


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace")
    return ""


def _outside(folder: Path) -> set[str]:
    """What a test with namespaces may leave on the machine: links, mounts, files in the places that hosts have their own
    of. The rest of the file system is read-only for them. Other tests may run meanwhile: what they mount in folders for
    temporary files, beside this test's `folder`, and clusters of other names are theirs."""
    links = [f"link {name}" for name in os.listdir("/sys/class/net")]
    points = [Path(line.split()[4]) for line in _read(Path("/proc/self/mountinfo")).splitlines()]
    temporary = Path(tempfile.gettempdir())
    mounts = [
        f"mount {point}" for point in points if point.is_relative_to(folder) or not point.is_relative_to(temporary)
    ]
    files = []
    for place in ("/run", "/run/netns", "/etc", str(Path.home()), str(Path.home() / ".ssh"), pwd.getpwuid(0).pw_dir):
        with contextlib.suppress(OSError):
            files += [f"file {place}/{name}" for name in os.listdir(place)]
    files += [
        f"file {path} of {path.stat().st_mtime_ns}"
        for path in map(Path, ("/etc/hosts", "/etc/resolv.conf", "/etc/shadow"))
        if path.exists()
    ]
    ray_state = [f"file {path}" for path in Path("/tmp").glob("ray/cluster-ctrl-ray-onprem*")]
    return {*links, *mounts, *files, *ray_state}
