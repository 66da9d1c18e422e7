"""Methods that begin to push later: which ones, with what setting, and on how many images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ctrl_ray.comparison.bench import Source
from ctrl_ray.comparison.plan import MethodPlan, make_plan
from ctrl_ray.comparison.windows import STARTS, windows_of


class _Bench:
    """Tells what it is asked to draw."""

    def __init__(self) -> None:
        names = ("dps", "tfg", "smc", "classifier_guidance", "best_of_n")
        self.question = SimpleNamespace(plan=make_plan(names, num_steps=10, num_classes=4))
        self.asked: list[tuple[str, Any]] = []

    def sources(self, plan: MethodPlan, adapters: Any) -> list[Source]:
        return [Source(noised=("size=/n",) if plan.method.noised else ())]

    def test(self, plan: MethodPlan, value: float, sources: list[Source]) -> Any:
        (source,) = sources
        setting = plan.method.setting(value, source.noised) if plan.method.noised else plan.method.setting(value)
        self.asked.append((plan.name, setting.method))
        assert plan.counts.test == 128
        numbers = {"accuracy": 0.5, "errors": {"accuracy": 0.1}, "common_distance": {"worst": 3.0}}
        return [numbers], None


def test_each_method_that_pushes_and_is_not_dear_begins_later_and_later() -> None:
    bench: Any = _Bench()
    rows = [{"name": plan.name, "chosen": 0.3} for plan in bench.question.plan.methods]
    found = windows_of(bench, rows)
    assert [method["name"] for method in found] == ["classifier_guidance", "dps"]
    assert [start["start"] for start in found[0]["starts"]] == list(STARTS)
    assert found[0]["starts"][0] == {"start": 0.0, "accuracy": 0.5, "error": 0.1, "worst": 3.0}
    of_dps = [method for name, method in bench.asked if name == "dps"]
    assert [method.window for method in of_dps] == [(start, 1.0) for start in STARTS]
    assert {(method.name, method.scale) for method in of_dps} == {("dps", 0.3)}
    assert {method.noised_classifier for name, method in bench.asked if name != "dps"} == {("size=/n",)}
