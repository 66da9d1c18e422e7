"""README and its kin: every command is one that exists, with flags that exist, and each block is run by a test or is listed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import pytest

from ctrl_ray import command
from tests.documents import ROOT, Block, blocks, own_commands

LONG, CLUSTER, WEIGHTS, ITSELF = (
    "takes minutes to hours",
    "needs a cluster",
    "needs weights of a large model",
    "is how these tests are run",
)
_HERE, _JOB = "tests/integration/test_documents.py", "tests/integration/test_job.py"
_FIRST_RUN, _PYTHON, _PHOTOS = (
    f"{_HERE}::test_{name}" for name in ("the_first_run_says_what_to_do_next", "python", "own_photos")
)
_SAMPLES, _PLANS = (f"{_HERE}::test_{name}" for name in ("samples", "plans"))
_SUBMITTED = f"{_JOB}::test_a_job_is_stopped_resumed_and_ends_with_the_adapter_of_an_uninterrupted_run"
IS_RUN_BY = {
    "README.md: python3 -m venv": _FIRST_RUN,
    "README.md: python -m pytest": ITSELF,
    "README.md: pipe = ": _PYTHON,
    "README.md: python -m ctrl_ray.label": _PHOTOS,
    "CONTRIBUTING.md: python3 -m venv": ITSELF,
    "cluster/README.md: run=": CLUSTER,
    "cluster/README.md: export RAY_API_SERVER_ADDRESS": _SUBMITTED,
    "cluster/README.md: ray get-auth-token": CLUSTER,
    "cluster/README.md: ray attach": CLUSTER,
    "ctrl_ray/baselines/README.md: python -m ctrl_ray.sample": _SAMPLES,
    "ctrl_ray/baselines/README.md: pipe = ": _PYTHON,
    "ctrl_ray/baselines/README.md: python -m ctrl_ray.compare": LONG,
    "ctrl_ray/candidates/README.md: python -m ctrl_ray.sample": _SAMPLES,
    "ctrl_ray/offline/README.md: python -m ctrl_ray.label": _PHOTOS,
    "ctrl_ray/policy/README.md: python -m ctrl_ray.train": _PLANS,
    "ctrl_ray/policy/README.md: pipe = ": _PYTHON,
    "ctrl_ray/policy/README.md: python -m ctrl_ray.compare": WEIGHTS,
    "ctrl_ray/verification/README.md: python -m ctrl_ray.verify   ": LONG,
    "ctrl_ray/verification/README.md: python -m ctrl_ray.verify --problem": LONG,
    "ctrl_ray/verification/README.md: python -m ctrl_ray.verify --adapter": _FIRST_RUN,
    "tune_spaces/README.md: python -m ctrl_ray.tune": LONG,
    "tune_spaces/README.md: space = ": LONG,
    "tune_spaces/README.md: python -m ctrl_ray.evaluate --runs": LONG,
}
"""The test that runs a block, by the beginning of its name; or why none does."""
TAKES_OVER = {
    **dict.fromkeys(("label", "classify", "evaluate"), "run"),
    **{"train": "fit", "sample": "sample", "demo": "serve", "compare": "compare", "verify": "verify", "tune": "sweep"},
}
"""What a command calls with its flags, once they are understood."""
BASH = [block for block in blocks() if block.language == "bash"]


class Understood(Exception):
    """A command has got as far as to do something."""


@pytest.fixture(autouse=True)
def _commands_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Understood

    for name, function in TAKES_OVER.items():
        monkeypatch.setattr(importlib.import_module(f"ctrl_ray.{name}"), function, stop)
    monkeypatch.setattr("ctrl_ray.reporting.comparison.compare_runs", stop)


def _understood(name: str, arguments: Sequence[str]) -> bool:
    try:
        return not command.run(importlib.import_module(f"ctrl_ray.{name}")._main, arguments)
    except Understood:
        return True


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.name)
def test_every_flag_of_a_documented_command_is_one_of_it(block: Block) -> None:
    found = own_commands(block.commands())
    assert [name for name, arguments in found if not _understood(name, arguments)] == []
    assert len(found) == len(re.findall(r"python -m ctrl_ray\.", block.text))


def test_each_block_is_run_by_a_test_or_is_listed() -> None:
    """Each entry is of one block, and the tests are there."""
    names = [block.name for block in blocks()]
    for begin, by in IS_RUN_BY.items():
        assert [name.startswith(begin) for name in names].count(True) >= 1, begin
        if "::" in by:
            file, _, test = by.partition("::")
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), by
    assert [name for name in names if not name.startswith(tuple(IS_RUN_BY))] == []
