"""`ray job submit` as a user types it, on a cluster of `ray start` with token authentication: submit, stop, resume, finish."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.runs.folder import RunFolder
from tests.clusters import ROOT, Head, started_head
from tests.configs import tiny_run

_UPDATES = 40  # of a fraction of a second each: a stop has time to arrive
_WHICH_PACKAGE = "import ctrl_ray; print('the package is', ctrl_ray.__file__)"
_WITHOUT_INIT = """
import sys
import ray
from ctrl_ray.train import main
def init(*args, **kwargs): raise AssertionError("ray.init was asked")
ray.init = init
sys.exit(main())
"""
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@pytest.fixture(scope="module")
def bucket() -> Iterator[pyarrow.fs.S3FileSystem]:
    """The bucket `s3://runs` of an S3 server in a thread of this process (moto's), for it and all that it starts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ACCESS_KEY_ID", "none")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "none")
            environment.setenv("AWS_ENDPOINT_URL", url)
            filesystem = pyarrow.fs.S3FileSystem(region="us-west-2", endpoint_override=url, allow_bucket_creation=True)
            filesystem.create_dir("runs")
            yield filesystem
    finally:
        server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: pyarrow.fs.S3FileSystem) -> Iterator[Head]:
    """A head with a token and room for two jobs."""
    with started_head("--num-cpus=4", '--resources={"driver": 100}') as head:
        yield head


@pytest.fixture
def config(tiny_pipeline: Path, base_config: TrainConfig) -> TrainConfig:
    """A run whose classifier is given; a job that fits its own is in tests/multihost."""
    return dataclasses.replace(
        tiny_run(tiny_pipeline),
        controls=base_config.controls,
        num_updates=_UPDATES,
        checkpoint_every_updates=10,
        tracker="aim",
    )


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors") | load_file(folder / "control_embeddings.safetensors")


def _submit(
    cluster: Head,
    config_file: Path,
    output_dir: str,
    *more: str,
    name: str,
    wait: bool = True,
    first: Sequence[str] = (),
) -> str:
    """The README's command, after another one of the same job where there is one; what they printed."""
    entry = ["python", "-m", "ctrl_ray.train", "--config", str(config_file), "--output-dir", output_dir, *more]
    entry = ["sh", "-c", f"{shlex.join(first)} && exec {shlex.join(entry)}"] if first else entry
    flags = ["--submission-id", name, "--runtime-env", "cluster/job.yaml", "--working-dir", "."]
    flags += ["--entrypoint-resources", '{"driver": 1}', *([] if wait else ["--no-wait"])]
    return cluster.ray("job", "submit", *flags, "--", *entry, timeout=400).stdout


def _status(cluster: Head, name: str) -> str:
    return cluster.ray("job", "status", name).stdout


@pytest.mark.slow
def test_a_job_is_stopped_resumed_and_ends_with_the_adapter_of_an_uninterrupted_run(
    cluster: Head, bucket: pyarrow.fs.S3FileSystem, config: TrainConfig, tmp_path: Path
) -> None:
    """Bitwise, on CPU with a deterministic pool. The stopped one writes to S3, and goes on from what is there alone."""
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    with ThreadPoolExecutor(1) as executor:
        uninterrupted = executor.submit(_submit, cluster, file, str(tmp_path / "whole"), name="whole")
        _stop_and_resume(cluster, bucket, file)
        whole = uninterrupted.result()
    assert "succeeded" in whole, whole
    ours = [line for line in whole.splitlines() if line.startswith(("update ", "run ", "job "))]
    assert f"update {_UPDATES}/{_UPDATES} · reward" in whole
    assert not any(_CONTROL_CHARACTER.search(line) for line in ours), ours
    assert re.search(r"^run +whole, written to ", whole, re.M) and re.search(r"^job +whole: ", whole, re.M)
    assert "perhaps too few" not in whole, "cluster/job.yaml gives the stop enough time"

    pyarrow.fs.copy_files("runs/stopped", str(tmp_path / "stopped"), source_filesystem=bucket)
    assert (tmp_path / "stopped" / "report" / "report.html").is_file()
    expected, reached = _adapter(tmp_path / "whole" / "adapter"), _adapter(tmp_path / "stopped" / "adapter")
    assert expected.keys() == reached.keys()
    assert all(torch.equal(expected[name], reached[name]) for name in expected)


def _stop_and_resume(cluster: Head, bucket: pyarrow.fs.S3FileSystem, file: Path) -> None:
    """The stop leaves a checkpoint and says how to go on; the head's own copy of the run is lost in between."""
    uri = "s3://runs/stopped"
    copy = RunFolder(uri).local
    shutil.rmtree(copy, ignore_errors=True)  # of a test run that was killed: its rows would be taken for this job's
    _submit(cluster, file, uri, name="stopped", wait=False)
    _wait_for_a_checkpoint(cluster, bucket, "stopped")
    _stop(cluster, "stopped")
    log = cluster.ray("job", "logs", "stopped").stdout
    done = re.search(rf"stopped after update (\d+) of {_UPDATES}; a checkpoint is in \S+\. Go on with .* --resume", log)
    assert done and 10 <= int(done[1]) < _UPDATES, log

    shutil.rmtree(copy)

    again = _submit(cluster, file, uri, "--resume", name="resumed", first=["python", "-c", _WHICH_PACKAGE])
    package = re.search(r"^the package is (.*)$", again, re.M)
    assert package and "/working_dir_files/" in package[1], again  # what was submitted, not what is installed here
    shutil.rmtree(copy)
    assert f"resumed after update {done[1]}" in again and "succeeded" in again, again


def _stop(cluster: Head, name: str) -> None:
    """What `ray job stop` asks of the head, without its seconds of imports, in which the run might end."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    url, headers = f"{cluster.dashboard}/api/jobs/{name}/stop", {"Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="POST"), timeout=20) as answer:
        assert json.load(answer) == {"stopped": True}
    _wait(lambda: "was stopped" in _status(cluster, name), 180)  # on busy cores each look takes many seconds


def _wait_for_a_checkpoint(cluster: Head, bucket: pyarrow.fs.S3FileSystem, name: str) -> None:
    """In the bucket: the driver's rows come later, for it has Aim to start first. The command that asks for the status takes
    a core for seconds, so it is asked seldom."""
    selector, asked = pyarrow.fs.FileSelector(f"runs/{name}/checkpoints/{name}", allow_not_found=True), time.monotonic()

    def is_there() -> bool:
        nonlocal asked
        if time.monotonic() > asked + 40:
            assert "failed" not in _status(cluster, name), cluster.ray("job", "logs", name).stdout
            asked = time.monotonic()
        return any("checkpoint_20" in info.base_name for info in bucket.get_file_info(selector))

    _wait(is_there)


def _wait(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.full
def test_no_way_in_without_the_token(cluster: Head, tmp_path: Path) -> None:
    """A wrong one and none: the job CLI, the HTTP API and `ray.init` refuse; ours says why and what to do, at once."""
    with ThreadPoolExecutor(2) as executor:
        for checked in [
            executor.submit(_check_no_way_in, cluster, token, tmp_path / token) for token in ("wrong", "none")
        ]:
            checked.result()


def _check_no_way_in(cluster: Head, token: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "token").write_text("f" * 64)
    given = {
        "wrong": {"RAY_AUTH_TOKEN_PATH": str(folder / "token")},
        "none": {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""},
    }[token]
    submitted = cluster.ray("job", "submit", "--submission-id", f"bad-{token}", "--", "true", **given)
    assert submitted.returncode != 0 and re.search("401|403|[Aa]uthentication", submitted.stdout), submitted.stdout
    assert f"bad-{token}" not in cluster.ray("job", "list").stdout

    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        headers = {"Authorization": f"Bearer {'f' * 64}"} if token == "wrong" else {}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(cluster.dashboard + path, headers=headers), timeout=20)
        assert refused.value.code in (401, 403), path

    environment = {**cluster.environment, **given, "RAY_ADDRESS": cluster.address}
    bare = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1])", cluster.address]
    with ThreadPoolExecutor(1) as executor:
        init = executor.submit(subprocess.run, bare, env=environment, capture_output=True, text=True, timeout=180)
        run = _train(folder / "run", environment)
        assert init.result().returncode != 0
    assert run.returncode == 1 and "refuses the token" in run.stderr and "RAY_AUTH_TOKEN_PATH" in run.stderr, run.stderr
    assert run.stderr.count("\n") <= 2, "one clear message, no stack"


def _train(folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """The command as it is, but for `ray.init`: it would try for 20 s, and shall not be asked."""
    command = [sys.executable, "-c", _WITHOUT_INIT, "--output-dir", str(folder)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180)


@pytest.mark.full
def test_a_run_on_a_cluster_that_is_not_there_says_so(tmp_path: Path) -> None:
    """A dead address, and addresses of other services."""
    expected = {
        "127.0.0.1:1": "no Ray cluster answers",
        "http://127.0.0.1:8265": "ray job submit",
        "ray://127.0.0.1:10001": "ray job submit",
    }
    with ThreadPoolExecutor(len(expected)) as executor:
        runs = executor.map(lambda address: _train(tmp_path, {**os.environ, "RAY_ADDRESS": address}), expected)
        for run, text in zip(runs, expected.values(), strict=True):
            assert run.returncode in (1, 2) and text in run.stderr, run.stderr
