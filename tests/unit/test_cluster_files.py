"""The cluster files pass Ray's own validation, and keep to what the comments in them promise. Nothing is contacted.

cluster/aws.yaml goes through Ray's AWS provider in tests/integration/test_aws_provider.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = [file for file in sorted(CLUSTER.glob("*.yaml")) if "\ncluster_name:" in file.read_text(encoding="utf-8")]
"""What `ray up` takes."""


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture
def aws() -> dict[str, Any]:
    return _read(CLUSTER / "aws.yaml")


def _bash_reads(command: str) -> None:
    done = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stderr}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_accepts_the_file_as_it_is(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(_read(file))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_bash_reads_every_command(file: Path) -> None:
    """Whole: a ' #' in a plain YAML scalar begins a comment and cuts the rest off; then its quotes do not match."""
    commands = [line for key, lines in _read(file).items() if key.endswith("_commands") for line in lines]
    assert commands
    for command in commands:
        _bash_reads(command)
        assert shlex.split(command), command


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda file: file.name)
def test_bash_reads_every_script(script: Path) -> None:
    _bash_reads(script.read_text(encoding="utf-8"))
    assert os.access(script, os.X_OK)


# -- aws.yaml


def test_gpu_workers_start_when_asked_for_and_spot_is_preferred(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    assert types.keys() == {"head", "gpu_worker_spot", "gpu_worker_on_demand"}
    spot, on_demand = types["gpu_worker_spot"], types["gpu_worker_on_demand"]
    assert spot["min_workers"] == on_demand["min_workers"] == on_demand["max_workers"] == 0
    assert 0 < spot["max_workers"] <= aws["max_workers"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == on_demand["node_config"]  # an alternative: the market is the only difference
    assert re.match(r"[gp]\d", on_demand["node_config"]["InstanceType"])
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["head"]["resources"] == {"GPU": 0, "driver": 100}


def test_nothing_that_ray_would_choose_too_openly_is_left_to_it(aws: dict[str, Any]) -> None:
    for name, node in aws["available_node_types"].items():
        settings = node["node_config"]
        assert settings["ImageId"].startswith("ami-"), name
        assert settings["SecurityGroupIds"], name
        assert settings["MetadataOptions"]["HttpTokens"] == "required", name
    profiles = {name: n["node_config"]["IamInstanceProfile"]["Name"] for name, n in aws["available_node_types"].items()}
    assert profiles["head"] == f"{aws['cluster_name']}-head"
    # A worker must not be able to start instances.
    assert {profiles[name] for name in profiles if name != "head"} == {f"{aws['cluster_name']}-worker"}
    assert not any("0.0.0.0" in line for line in aws["head_start_ray_commands"])
    assert not aws["provider"].get("security_group")


def test_the_token_is_mounted_and_switched_on_everywhere(aws: dict[str, Any], tmp_path: Path) -> None:
    assert aws["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (line,) = [line for line in aws["setup_commands"] if ".bashrc" in line]
    show = 'echo "$RAY_AUTH_MODE ${PATH%%:*} $RAY_USAGE_STATS_REPORT_URL"; wc -l < ~/.bashrc'
    script = f'for i in 1 2; do eval "$LINE"; done; . ~/.bashrc; {show}'
    done = subprocess.run(
        ["bash", "-c", script],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "LINE": f"touch ~/.bashrc; {line}"},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [
        "token",
        f"{tmp_path}/venv/bin",
        "http://127.0.0.1:9/",
        "1",
    ]  # once, however often setup runs


def test_workers_install_this_project_with_the_versions_of_the_head(aws: dict[str, Any]) -> None:
    (remote,) = [there for there, here in aws["file_mounts"].items() if here == "."]
    head, worker = (
        [shlex.split(line) for line in aws[key] if "pip install" in line]
        for key in ("head_setup_commands", "worker_setup_commands")
    )
    assert [words[-1] for words in head + worker] == [remote, remote]
    (versions,) = aws["cluster_synced_files"]
    assert aws["head_setup_commands"][-1].endswith(f"pip freeze --exclude ctrl-ray > {versions}")
    assert worker[0][worker[0].index("--constraint") + 1] == versions
    assert (ROOT / "pyproject.toml").is_file()


def test_in_an_image_nothing_is_installed(aws: dict[str, Any], tmp_path: Path) -> None:
    """The setup commands, run with a home in which every one of them would fail."""
    assert _image()["ENV"]["CTRL_RAY_IMAGE"] == "1"
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        for line in (line for line in aws[key] if "venv" in line and ".bashrc" not in line):
            environment = {"HOME": str(tmp_path), "PATH": str(tmp_path), "CTRL_RAY_IMAGE": "1"}
            assert subprocess.run(["/bin/bash", "-c", line], env=environment).returncode == 0, line
            assert list(tmp_path.iterdir()) == []


def test_efa_variables_are_set_where_there_is_an_interface_only(aws: dict[str, Any]) -> None:
    (start,) = [line for line in aws["worker_start_ray_commands"] if "ray start" in line]
    for there, expected in (("exit 1", ["", ""]), ("echo rdmap0s31", ["efa", "^lo,docker"])):
        show = 'echo "${FI_PROVIDER:-}|${NCCL_SOCKET_IFNAME:-}"'
        script = f"ls() {{ {there}; }}; ulimit() {{ :; }}; ray() {{ {show}; }}; {start}"
        done = subprocess.run(
            ["bash", "-c", script], env={"PATH": ""}, text=True, capture_output=True, executable="/bin/bash"
        )
        assert done.stdout.strip().split("|") == expected, done.stderr


def test_workers_watch_for_spot_notices(aws: dict[str, Any]) -> None:
    (there,) = [there for there, here in aws["file_mounts"].items() if here == "cluster/spot-watch.sh"]
    last = aws["worker_start_ray_commands"][-1]
    assert shlex.split(last)[:4] == ["setsid", "--fork", "bash", there]  # it outlives the SSH connection
    assert not any("spot-watch" in line for line in aws["head_start_ray_commands"])


def test_the_commented_choice_of_an_image_is_accepted(aws: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    lines = (CLUSTER / "aws.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("# docker:")
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("# "))
    chosen = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[start:end]))
    prepared = prepare_config({**aws, **chosen})
    validate_config(prepared)
    assert prepared["docker"]["container_name"] and prepared["docker"]["image"].endswith("ctrl-ray:0.1")
    # Anything that is not replaced is no image name.
    assert re.search(r"[A-Z]", prepared["docker"]["image"].split("/")[0])


@pytest.mark.parametrize("address", ["0.0.0.0/0", "10.0.0.0/8", "203.0.113.7", "203.0.113.7/320", ""])
def test_the_account_template_refuses_to_open_ssh_wide(address: str) -> None:
    pattern = _read(CLUSTER / "aws-account.yaml")["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.fullmatch(pattern, "203.0.113.7/32")
    assert not re.fullmatch(pattern, address)


# -- job.yaml


def test_ray_takes_the_runtime_environment_beside_a_working_directory(tmp_path: Path) -> None:
    """As `ray job submit --runtime-env cluster/job.yaml --working-dir DIR` reads, checks and packs it."""
    from ray._private.runtime_env.packaging import create_package
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
    from ray.runtime_env import RuntimeEnv

    folder = tmp_path / "project"
    for name in (
        "ctrl_ray/train.py",
        "ctrl_ray/runs/kept.py",
        "runs/a/x",
        ".git/HEAD",
        "venv/x",
        "a/__pycache__/x.pyc",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    parsed = parse_runtime_env_args(runtime_env=str(CLUSTER / "job.yaml"), working_dir=str(folder))
    checked = RuntimeEnv(**parsed)
    assert checked["env_vars"] == parsed["env_vars"]  # strings all: Ray refuses numbers
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True, excludes=checked["excludes"])
    names = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert names == {"ctrl_ray/train.py", "ctrl_ray/runs/kept.py"}


def test_the_variables_of_a_job_are_ones_that_ray_reads() -> None:
    """A misspelt variable would go unnoticed. The supervisor, which stops a job, has the job's own variables."""
    from ray.dashboard.modules.job import job_supervisor
    from ray.dashboard.modules.job.job_manager import JobManager
    from ray.train.v2._internal import constants

    variables = _read(CLUSTER / "job.yaml")["env_vars"]
    in_train = {constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR, constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR}
    assert variables.keys() == in_train | {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert '"RAY_JOB_STOP_WAIT_TIME_S"' in Path(job_supervisor.__file__).read_text(encoding="utf-8")
    given = JobManager._get_supervisor_runtime_env(None, {"env_vars": variables}, "job-1")  # type: ignore[arg-type]
    assert given["env_vars"].items() >= variables.items()


# -- Dockerfile. Without a Docker engine this is as far as it goes: that it parses, that what it copies is there and in
# -- the build context, that bash reads its commands, and that it names the Ray it was written for. Not that it builds.

INSTRUCTIONS = {"ARG", "FROM", "USER", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}


def _instructions() -> list[tuple[str, str]]:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def _image() -> dict[str, Any]:
    """What the Dockerfile leaves: its variables, its last user, its base."""
    found = _instructions()
    variables = dict(pair.split("=", 1) for name, rest in found if name == "ENV" for pair in shlex.split(rest))
    arguments = dict(rest.split("=", 1) for name, rest in found if name == "ARG" and "=" in rest)
    (base,) = [rest for name, rest in found if name == "FROM"]
    for key, value in arguments.items():
        base = base.replace(f"${{{key}}}", value)
    return {"ENV": variables, "USER": [rest for name, rest in found if name == "USER"][-1], "FROM": base, **arguments}


def test_the_dockerfile_has_instructions_that_exist_in_an_order_that_works() -> None:
    found = _instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert [name for name, _ in found][:2] == ["ARG", "FROM"]
    # An argument from before FROM is empty after it, unless it is named again.
    used = [rest for name, rest in found[2:] if "${RAY_VERSION}" in rest]
    assert used and ("ARG", "RAY_VERSION") in found[2:]
    for name, rest in found:
        if name == "RUN":
            _bash_reads(rest)
    (command,) = [json.loads(rest) for name, rest in found if name == "CMD"]
    assert command == ["bash"]  # `ray up` starts containers with bash
    installs = [rest for name, rest in found if name == "RUN" and "apt-get install" in rest]
    assert {"rsync", "openssh-client", "curl"} <= set(" ".join(installs).split())


def test_the_image_is_ray_of_the_version_here_and_not_root() -> None:
    import ray

    image = _image()
    assert image["USER"] == "ray"
    assert image["FROM"] == f"rayproject/ray:{image['RAY_VERSION']}-py311-gpu"
    ours, here = (version.split(".")[:2] for version in (image["RAY_VERSION"], ray.__version__))
    assert ours <= here  # the tests' Ray may be newer than the image, not older


def test_what_the_dockerfile_copies_is_in_the_repository_and_in_the_build_context() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True)
    files = tracked.stdout.split() if tracked.returncode == 0 and tracked.stdout else None
    sources = []
    for name, rest in _instructions():
        if name == "COPY":
            *words, target = [word for word in rest.split() if not word.startswith("--")]
            assert target.startswith("/home/ray/ctrl_ray/")
            sources += words
    assert "ctrl_ray" in sources and "pyproject.toml" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert files is None or any(file == source or file.startswith(f"{source}/") for file in files), source
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in patterns if line and not line.startswith("#")]
    assert rules[0] == "*"  # nothing but what is named
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources)


def test_the_project_builds_from_what_the_dockerfile_copies() -> None:
    """setuptools reads README and LICENSE by the names in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    copied = {word for name, rest in _instructions() if name == "COPY" for word in rest.split()}
    (readme,) = re.findall(r'^readme = "(.*)"$', text, re.M)
    (licence,) = re.findall(r'^license-files = \["(.*)"\]$', text, re.M)
    assert {readme, licence} <= copied
