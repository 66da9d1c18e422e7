"""A run on a cluster that has to grow: Ray's autoscaler, with nodes that are processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrl_ray import ray_internals
from tests.clusters import Head, growing_head

pytestmark = pytest.mark.full

_WAITS = """
import sys, time
from ctrl_ray.config import RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.cluster.autoscaler import growth
from ctrl_ray.cluster.resources import check_cluster, needed_resources
from ctrl_ray.cluster.connection import connected
from ctrl_ray.runs.folder import RunFolder
from ctrl_ray.cluster.shared_storage import check_shared, several_hosts
from ctrl_ray.cluster.waiting import ClusterWait
from ctrl_ray.errors import CtrlRayError
import ray
from ray.util import placement_group

def config(cpus):
    scaling = ScalingConfig(num_workers=2, cpus_per_worker=cpus)
    return TrainConfig(global_batch_size=64, scaling=scaling, rewards=RewardPoolConfig(num_actors=0))

def refusal(function, *arguments):
    try:
        function(*arguments)
    except CtrlRayError as error:
        return f"{type(error).__name__}: {error}"

with connected():
    print("GROWTH", growth().most("CPU"), several_hosts())
    print("FITS", refusal(check_cluster, config(2)))
    print("TOO LARGE", refusal(check_cluster, config(30)))
    print("LOCAL FOLDER", refusal(check_shared, config(2), RunFolder(sys.argv[1])))
    group = placement_group([{"CPU": 50}])
    short = ClusterWait(needed_resources(config(2)), 3, lambda line: None, patience_s=1)
    limit = time.monotonic() + 60
    while (text := refusal(short.poll)) is None and time.monotonic() < limit: time.sleep(0.1)
    print("ENDS", text)
    ray.util.remove_placement_group(group)
    group = placement_group([{"CPU": 2}, {"CPU": 2}], strategy="STRICT_SPREAD")
    wait = ClusterWait(needed_resources(config(2)), 600, lambda line: print("SAYS", line, flush=True), patience_s=0, every_s=2)
    limit = time.monotonic() + 180
    while not ray.wait([group.ready()], timeout=0.3)[0] and time.monotonic() < limit:
        wait.poll()
    print("PLACED", ray.cluster_resources()["CPU"])
"""


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Head]:
    with growing_head(tmp_path / "cluster.json") as head:
        yield head


def test_a_growing_cluster_is_waited_for_in_words(growing: Head, tmp_path: Path) -> None:
    """What may come counts as room, what cannot come is refused, and while nodes start the run says what is missing."""
    folder = tmp_path / "run"
    done = growing.python("-c", _WAITS, str(folder))
    lines = [line for line in done.stdout.splitlines() if line.split(" ")[0].isupper()]
    found = {line.split(" ")[0]: line for line in reversed(lines)}
    assert found["GROWTH"] == "GROWTH 4.0 True", done.stdout
    assert found["FITS"] == "FITS None"
    assert "needs 60 CPUs" in found["TOO"] and "has 0, and its autoscaler may add 4" in found["TOO"]
    assert "RunFolderError" in found["LOCAL"] and "the autoscaler has yet to start" in found["LOCAL"]
    assert not folder.exists(), "a refused run leaves nothing"
    assert "ResourceError: waiting for machines (" in found["ENDS"] and "placement_timeout_s (3)" in found["ENDS"]
    said = [line for line in lines if line.startswith("SAYS")]
    assert any("asks for 4 CPUs; there: 1 node with 0 CPUs (0 free); missing: 4 CPUs" in line for line in said), said
    # of which type depends on whether Ray's autoscaler publishes its status while it starts a node
    assert any("starting: " in line and " × " in line for line in said), said
    assert found["PLACED"] == "PLACED 4.0"
    stranger = ray_internals.ask_head(growing.address, 10.0)
    assert stranger.token_refused and not stranger.alive
