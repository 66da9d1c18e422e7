"""Rows of results.json, as tests of its readers need them."""

from __future__ import annotations

from typing import Any


def row(name: str, *, ratio: float = 1.0, worst: float | None = 2.0, **changes: Any) -> dict[str, Any]:
    """One method; `changes` are of its test numbers."""
    distance = {
        "classes": {"small": worst, "large": None if worst is None else worst / 2},
        "worst": worst,
        "range": None if worst is None else [worst, worst],
        "images": 128,
    }
    numbers = {
        "accuracy": 0.8,
        "macro_f1": 0.75,
        "prompt_fidelity": 0.9,
        "diversity": 0.2,
        "kl": 1.5,
        "gap": 0.4,
    }
    test: dict[str, Any] = {
        **numbers,
        "errors": dict.fromkeys(numbers, 0.01),
        "num_images": 128,
        "too_wide": False,
        "distance": distance,
        "common_distance": distance,
    }
    errors = changes.pop("errors", {})
    test |= changes
    test["errors"] |= errors
    return {
        "name": name,
        "title": {"ctrl": "CTRL", "plain": "pre-trained"}.get(name, name),
        "knob": None if name == "plain" else "scale",
        "chosen": 2.0,
        "trained": name == "ctrl",
        "validation": [],
        "test": test,
        "seeds": [test],
        "cost": {
            "seconds": 0.02 * ratio,
            "plain_seconds": 0.02,
            "ratio": ratio,
            "ratio_range": [ratio, ratio],
            "num_pairs": 3,
            "batch_size": 16,
            "calls": {"calls": 10, "forwards": 10.0, "backwards": 0.0, "decodes": 1.0, "decode_backwards": 0.0},
        },
        "cost_mixed": {"ratio": 1.1 * ratio} if name == "ctrl" else None,
        "training": None,
        "note": None,
    }
