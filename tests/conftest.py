"""What every test stands on: a quiet environment, one tiny pipeline, one local Ray, and marks by folder.

The environment is set when pytest imports this file, before torch or Ray is imported by a test.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiers import tier_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TESTS = Path(__file__).resolve().parent
_FOLDER_MARKS = ("unit", "fuzz", "integration", "gpu", "multihost")


def _prepare_environment() -> None:
    """No foreign address is asked for anything, nothing is written to the user's home, two cores are enough.

    HOME becomes a private folder whose `ray_bootstrap_config.yaml` keeps Ray's dashboard from asking cloud metadata
    addresses who the provider is. matplotlib's list of fonts stays in the real home's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))
    home = Path(tempfile.mkdtemp(prefix="ctrl-ray-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "ray_bootstrap_config.yaml").write_text("{}\n")
    fixed = {
        "HOME": str(home),
        "AWS_EC2_METADATA_DISABLED": "true",
        "CXX": "/bin/false",  # nothing is compiled: users need no compiler, and wait for none
        # DeepSpeed decides when it is imported, for good; GPU tests run their engines in processes of their own.
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "Agg",
        # Ray's log monitor would look ten times a second for new files among the hundreds of a session.
        "LOG_NAME_UPDATE_INTERVAL_S": "2",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
        # Bounds for every Ray that a test, or a command that it runs, starts without saying more.
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(300 * 2**20),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each worker group; tests that need it say so
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.update(fixed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Whoever runs the tests inside a cluster job still gets a Ray of their own.
    os.environ.pop("RAY_ADDRESS", None)
    # A shell lets its background jobs ignore Ctrl-C, which some tests send to this process.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _runs_gpu_tests() -> bool:
    """Whether there is a card, or whoever works on the tests of one wants to see their code run on the CPU."""
    import torch

    return torch.cuda.is_available() or os.environ.get("CTRL_RAY_GPU_TESTS_ON") == "cpu"


_prepare_environment()


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder is its mark, it has one tier, and GPU tests are skipped where there is none."""
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    runs_gpu_tests = _runs_gpu_tests()
    for item in items:
        if not item.path.is_relative_to(_TESTS):
            continue
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _FOLDER_MARKS:
            item.add_marker(folder)
        try:
            tier_of(mark.name for mark in item.iter_markers())
        except ValueError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from None
        if item.get_closest_marker("gpu") and not runs_gpu_tests:
            item.add_marker(skip_gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now lives to the end: Python's garbage collector need not look at it again (a tenth of the
    unit tests' time)."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Warnings of ctrl_ray's loggers, as they come (pytest's own plugin for logs costs a seventh of the unit tests' time)."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ctrl_ray")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline in the diffusers format: 32-px images, latents (4, 4, 4). Read only."""
    from tests.tiny import make_tiny_pipeline

    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_xl_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Stable Diffusion XL. Read only."""
    from tests.tiny import make_tiny_xl_pipeline

    return make_tiny_xl_pipeline(tmp_path_factory.mktemp("tiny_xl") / "pipeline")


@pytest.fixture(scope="session")
def tiny_3_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Stable Diffusion 3. Read only."""
    from tests.tiny import make_tiny_3_pipeline

    return make_tiny_3_pipeline(tmp_path_factory.mktemp("tiny_3") / "pipeline")


@pytest.fixture(scope="session")
def tiny_aura_flow_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of AuraFlow. Read only."""
    from tests.tiny import make_tiny_aura_flow

    return make_tiny_aura_flow(tmp_path_factory.mktemp("tiny_aura_flow") / "pipeline")


@pytest.fixture
def figures() -> Iterator[dict[str, Figure]]:
    """The matplotlib figures that the test saves, by the name of their files."""
    from tests.pictures import recorded

    with recorded() as saved:
        yield saved


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all integration tests: four logical CPUs (reward actors beside two workers), no dashboard."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()
