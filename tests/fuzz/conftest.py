"""How many inputs a test draws, and from which seed.

In the test run 30 a test, the same each time. By hand, others: `python -m pytest tests/fuzz --hypothesis-profile by-hand`
(2000 a test), with `--hypothesis-seed N` for another set of them.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("every-time", max_examples=30, derandomize=True, **_COMMON)  # type: ignore[arg-type]
settings.register_profile("by-hand", max_examples=2000, print_blob=True, **_COMMON)  # type: ignore[arg-type]


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, which settles how many inputs each draws."""
    if config.getoption("--hypothesis-profile") is None and config.getoption("--hypothesis-seed") is None:
        settings.load_profile("every-time")
    elif config.getoption("--hypothesis-profile") is None:
        settings.load_profile("by-hand")
