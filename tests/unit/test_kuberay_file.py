"""`cluster/kuberay.yaml` has only fields that KubeRay and Kubernetes know, and keeps to what the comments in it promise.

SCHEMA describes, in our words, what the file uses of KubeRay's RayJob and RayCluster (ray.io/v1, as in KubeRay 1.6.2 and
1.7.0) and of Kubernetes' pods. Whatever it does not name is refused: a field that is new to the file is looked up in
KubeRay's own schema and then added here. Nothing is contacted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from ctrl_ray.cluster.resources import NodeFacts
from ctrl_ray.planning.placement import place_workers, share_cards
from ctrl_ray.train import parse

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILE = CLUSTER / "kuberay.yaml"

Schema = dict[str, Any]


def _fields(required: str = "", /, **properties: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Schema = {"type": "string", "minLength": 1}
SWITCH: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(m|[KMGT]i)?$"}
NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
TEXTS_BY_NAME: Schema = {"type": "object", "additionalProperties": TEXT}
AMOUNTS: Schema = {
    "type": "object",
    "propertyNames": _one_of("cpu", "memory", "nvidia.com/gpu"),
    "additionalProperties": QUANTITY,
}

CONTAINER = _fields(
    "name",
    name=NAME,
    image=TEXT,
    command=_list(TEXT),
    env=_list(_fields("name", name=TEXT, value=TEXT)),
    ports=_list(_fields("containerPort", containerPort=PORT, name={"type": "string", "pattern": "^[-a-z0-9]{1,15}$"})),
    resources=_fields(requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=_list(_fields("mountPath name", mountPath=TEXT, name=NAME)),
    lifecycle=_fields(preStop=_fields(exec=_fields(command=_list(TEXT)))),
)
VOLUME = _fields(
    "name",
    name=NAME,
    persistentVolumeClaim=_fields("claimName", claimName=TEXT),
    emptyDir=_fields(medium=_one_of("Memory"), sizeLimit=QUANTITY),
)
POD = _fields(
    "containers",
    containers=_list(CONTAINER),
    volumes=_list(VOLUME),
    terminationGracePeriodSeconds=COUNT,
    securityContext=_fields(fsGroup=COUNT),
    tolerations=_list(
        _fields(
            key=TEXT,
            operator=_one_of("Exists", "Equal"),
            effect=_one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
)
TEMPLATE = _fields(spec=POD)
RAY_CLUSTER = _fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=_fields(mode=_one_of("disabled", "token")),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=_fields(version=_one_of("v1", "v2"), idleTimeoutSeconds=COUNT),
    headGroupSpec=_fields("template", rayStartParams=TEXTS_BY_NAME, template=TEMPLATE),
    workerGroupSpecs=_list(
        _fields(
            "groupName minReplicas maxReplicas template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS_BY_NAME,
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = _fields(
    entrypoint=TEXT,
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=RAY_CLUSTER,
)
METADATA = _fields("name", name=NAME, labels=TEXTS_BY_NAME)
SCHEMA = {
    kind: _fields(
        "apiVersion kind metadata spec",
        apiVersion=_one_of("ray.io/v1"),
        kind=_one_of(kind),
        metadata=METADATA,
        spec=spec,
    )
    for kind, spec in (("RayJob", RAY_JOB), ("RayCluster", RAY_CLUSTER))
}
_FREE = ("labels", "rayStartParams")
"""Their keys are the user's, or options of `ray start`."""


def _documents() -> dict[str, Any]:
    found = list(yaml.safe_load_all(FILE.read_text(encoding="utf-8")))
    assert [document["kind"] for document in found] == ["RayJob", "RayCluster"]
    return {document["kind"]: document["spec"] for document in found}


@pytest.fixture
def job() -> dict[str, Any]:
    return _documents()["RayJob"]


@pytest.fixture
def clusters() -> list[dict[str, Any]]:
    """Of the run, and that which stays."""
    documents = _documents()
    return [documents["RayJob"]["rayClusterSpec"], documents["RayCluster"]]


@pytest.fixture
def head(clusters: list[dict[str, Any]]) -> dict[str, Any]:
    return clusters[0]["headGroupSpec"]


@pytest.fixture
def group(clusters: list[dict[str, Any]]) -> dict[str, Any]:
    (group,) = clusters[0]["workerGroupSpecs"]
    return group


def _errors(document: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA[document["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def _hook(group: dict[str, Any]) -> list[str]:
    return list(_container(group)["lifecycle"]["preStop"]["exec"]["command"])


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


# -- what KubeRay reads


def test_every_field_is_one_that_kuberay_knows() -> None:
    for document in yaml.safe_load_all(FILE.read_text(encoding="utf-8")):
        assert _errors(document) == []


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        if isinstance(key, str):
            yield (*path, key)
        yield from _places(below, (*path, key))


def test_any_misspelt_field_is_noticed() -> None:
    """Every key of both documents in turn, except where any key may stand."""
    tried = 0
    for document in yaml.safe_load_all(FILE.read_text(encoding="utf-8")):
        validator, whole = jsonschema.Draft202012Validator(SCHEMA[document["kind"]]), json.dumps(document)
        for *path, key in _places(document):
            if key == "kind" or (path and path[-1] in _FREE):
                continue
            place = wrong = json.loads(whole)  # what several anchors share is no longer the same
            for step in path:
                place = place[step]
            place[f"{key}s"] = place.pop(key)
            assert not validator.is_valid(wrong), ".".join(map(str, (*path, key)))
            tried += 1
    assert tried > 200


def test_both_documents_make_the_same_pods(clusters: list[dict[str, Any]]) -> None:
    run, stays = clusters
    for same in ("rayVersion", "authOptions", "headGroupSpec"):
        assert run[same] == stays[same]
    (one,), (other,) = run["workerGroupSpecs"], stays["workerGroupSpecs"]
    assert one | {"maxReplicas": 0} == other | {"maxReplicas": 0}
    for group in (one, other):
        assert 1 <= group["minReplicas"] <= group["replicas"] < 4 <= group["maxReplicas"]
    # A run counts the GPUs that are there: an autoscaler would take nodes away from it, or come too late.
    assert stays["enableInTreeAutoscaling"] and "enableInTreeAutoscaling" not in run


def test_one_document_is_applied_by_its_label() -> None:
    labels = [document["metadata"]["labels"] for document in yaml.safe_load_all(FILE.read_text(encoding="utf-8"))]
    told = re.findall(r"kubectl apply -f cluster/kuberay.yaml -l ([\w-]+)=(\w+)", FILE.read_text(encoding="utf-8"))
    assert labels == [dict([pair]) for pair in told]


# -- image and versions


def test_image_and_ray_are_those_of_the_other_files(clusters: list[dict[str, Any]]) -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    (tag,) = re.findall(r"--tag (\S+)", dockerfile)
    (version,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", dockerfile, re.M)
    (image,) = re.findall(r"image: (\S+)", (CLUSTER / "aws.yaml").read_text(encoding="utf-8"))
    (pin,) = re.findall(r'"(ray\[[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for cluster in clusters:
        assert cluster["rayVersion"] == version and version in Requirement(pin).specifier
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert _container(group)["image"] == image
    assert image.endswith(f"/{tag}")


# -- the run


def test_the_command_of_the_job_is_one_that_train_takes(job: dict[str, Any], head: dict[str, Any]) -> None:
    python, flag, module, *words = shlex.split(job["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "ctrl_ray.train")
    config = parse(words).config
    assert config.scaling.use_gpu and config.scaling.num_workers == "auto"
    mounts = {mount["name"]: mount["mountPath"] for mount in _container(head)["volumeMounts"]}
    (control,) = config.controls.values()
    for path in (config.output_dir, config.data, control.classifier):
        assert str(path).startswith(f"{mounts['runs']}/")
    assert parse([*words, "--resume"]).resume and parse([*words, "--dry-run"]).dry_run
    assert job["backoffLimit"] == 0  # without --resume a second try is refused
    assert job["shutdownAfterJobFinishes"]


def test_the_driver_runs_on_the_head_which_has_no_gpu(job: dict[str, Any], head: dict[str, Any]) -> None:
    asked, parameters = json.loads(job["entrypointResources"]), head["rayStartParams"]
    offered = json.loads(json.loads(parameters["resources"]))  # KubeRay puts it into a shell command as it is
    assert asked.keys() == offered.keys() and all(0 < asked[kind] <= offered[kind] for kind in asked)
    assert parameters["num-cpus"] == parameters["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in _container(head)["resources"]["limits"]


def test_the_environment_of_the_job_is_that_of_job_yaml(job: dict[str, Any]) -> None:
    ours = yaml.safe_load((CLUSTER / "job.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(job["runtimeEnvYAML"]) == {"env_vars": ours["env_vars"]}


def test_a_node_has_cpus_for_all_its_gpus(job: dict[str, Any], group: dict[str, Any]) -> None:
    """CPUs of a worker and of a reward actor for each of them."""
    resources = _container(group)["resources"]
    assert resources["requests"] == resources["limits"]
    cpus, gpus = float(resources["limits"]["cpu"]), float(resources["limits"]["nvidia.com/gpu"])
    config = parse(shlex.split(job["entrypoint"])[3:]).config
    assert gpus == 8 and cpus >= gpus * (config.scaling.cpus_per_worker + config.rewards.cpus_per_actor)
    nodes = [NodeFacts(cpus, gpus, _bytes(resources["limits"]["memory"]))] * group["replicas"]
    assert place_workers(share_cards(config), nodes) == gpus * group["replicas"]  # a worker on every one
    (toleration,) = group["template"]["spec"]["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu"


def test_shared_memory_is_memory_of_the_pod(head: dict[str, Any], group: dict[str, Any]) -> None:
    for each in (head, group):
        volumes = {volume["name"]: volume for volume in each["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in _container(each)["volumeMounts"]}
        memory = _bytes(_container(each)["resources"]["limits"]["memory"])
        space = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert space["medium"] == "Memory"
        # Ray takes three tenths of the pod's memory for its object store.
        assert 0.3 * memory <= _bytes(space["sizeLimit"]) <= 0.5 * memory


# -- what keeps to itself


def test_nobody_outside_is_told_or_asked(clusters: list[dict[str, Any]], tmp_path: Path) -> None:
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token"}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            variables = {pair["name"]: pair["value"] for pair in _container(group)["env"]}
            assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
            assert variables["RAY_USAGE_STATS_REPORT_URL"] == "http://127.0.0.1:9/"
        # KubeRay puts its `ray start` behind it.
        (before,) = _container(cluster["headGroupSpec"])["command"]
        script, home = f"{before} && cat ~/ray_bootstrap_config.yaml", {"HOME": str(tmp_path)}
        done = subprocess.run(["bash", "-c", script], env={**os.environ, **home}, capture_output=True)
        assert done.stdout == b"{}\n"


def test_a_lost_node_is_noticed_as_soon_as_on_machines_of_your_own(head: dict[str, Any]) -> None:
    onprem = (CLUSTER / "onprem.yaml").read_text(encoding="utf-8")
    expected = dict(re.findall(r"(RAY_(?:health_check|gcs_rpc)_\w+)=(\d+)", onprem))
    variables = {pair["name"]: pair["value"] for pair in _container(head)["env"]}
    assert len(expected) == 5 and expected.items() <= variables.items()


# -- the end of a pod


@pytest.mark.full
def test_a_worker_pod_is_drained_before_it_ends(group: dict[str, Any], tmp_path: Path) -> None:
    """The hook, with a stand-in for /proc and one for `ray`."""
    bash, flag, script = _hook(group)
    assert (bash, flag) == ("bash", "-c")
    raylet = subprocess.Popen(["sleep", "30"])
    folder, called, ray = tmp_path / "proc" / str(raylet.pid), tmp_path / "called", tmp_path / "bin" / "ray"
    for file, text in (
        (tmp_path / "proc" / "1" / "comm", "bash\n"),
        (folder / "comm", "raylet\n"),
        (folder / "cmdline", "/raylet\0--raylet_socket_name=/x\0--node_id=0123abcd\0--agent=agent.py --node-id=ffff\0"),
        (ray, f'#!/bin/bash\nprintf "%s\\n" "$@" > {called}\nexit ${{REFUSES:-0}}\n'),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    ray.chmod(0o755)
    command = ["bash", "-c", script.replace("/proc/", f"{tmp_path}/proc/")]
    environment = {"PATH": f"{ray.parent}:{os.environ['PATH']}", "RAY_ADDRESS": "head:6379"}
    try:
        hook = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 20
        while not (called.is_file() and called.read_text().count("\n") > 8):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        words = called.read_text().splitlines()
        assert words[:5] == ["drain-node", "--address", "head:6379", "--node-id", "0123abcd"]
        given = dict(zip(words[1::2], words[2::2]))
        assert given["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"
        # Kubernetes counts the hook's time as part of the grace period.
        assert (
            int(given["--deadline-remaining-seconds"]) + 20 < group["template"]["spec"]["terminationGracePeriodSeconds"]
        )
        assert hook.poll() is None  # as long as something runs on the node
        # A head that is gone takes no drains: the pod need not wait.
        assert subprocess.run(command, env={**environment, "REFUSES": "1"}, timeout=20).returncode == 0
        raylet.kill()
        raylet.wait()
        assert hook.wait(timeout=20) == 0
    finally:
        raylet.kill()


@pytest.mark.full
def test_the_head_goes_when_its_jobs_have_ended(head: dict[str, Any], tmp_path: Path) -> None:
    """The hook, with a stand-in for Ray's client of jobs."""
    python, flag, script = _hook(head)
    assert (python, flag) == ("python", "-c")
    package = tmp_path / "ray"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "job_submission.py").write_text(
        "import types\n"
        "looks = iter([False, True, True, True])\n"
        "def status(ended): return types.SimpleNamespace(is_terminal=lambda: ended)\n"
        "class JobSubmissionClient:\n"
        "    def __init__(self, address): print(address)\n"
        "    def list_jobs(self):\n"
        "        rows = [('run', False), ('done', True), (None, False)]  # the last is of no `ray job submit`\n"
        "        return [types.SimpleNamespace(submission_id=name, status=status(ended)) for name, ended in rows]\n"
        "    def stop_job(self, name): print('stop', name)\n"
        "    def get_job_status(self, name): print('look', name); return status(next(looks))\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", script], env=environment, text=True, capture_output=True, timeout=20)
    assert done.stdout.splitlines() == ["http://127.0.0.1:8265", "stop run", "look run", "look run"], done.stderr
    stops_within = int(yaml.safe_load((CLUSTER / "job.yaml").read_text())["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    assert stops_within < head["template"]["spec"]["terminationGracePeriodSeconds"]
