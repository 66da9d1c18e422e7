"""Which tests are run when: the newcomer's tier, and those that are left out unless they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

TIERS = ("full", "multihost", "slow", "gpu")
"""Marks. A test without one of them is in the tier that `python -m pytest` runs."""


def tier_of(marks: Iterable[str]) -> str | None:
    """The tier of a test with these marks, None for the newcomer's; ValueError when they name several."""
    found = sorted(set(marks) & set(TIERS))
    if len(found) > 1:
        raise ValueError(f"a test has one tier, but this one is marked {' and '.join(found)}")
    return found[0] if found else None
