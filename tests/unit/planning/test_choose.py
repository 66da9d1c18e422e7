"""What 'auto' comes to on stated machines, with a plan whose memory is known by hand."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from ctrl_ray.cluster.resources import ClusterFacts, NodeFacts
from ctrl_ray.config import (
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.errors import ResourceError
from ctrl_ray.planning.choose import Decided, decide
from ctrl_ray.planning.fits import memory_fit
from ctrl_ray.planning.plan import CallPlan, MemoryPlan, RunPlan, TrafficPlan

GIB = 2**30
MACHINES = {
    "1 × 1": [NodeFacts(8.0, 1.0, None, 80 * GIB)],
    "1 × 8": [NodeFacts(64.0, 8.0, None, 80 * GIB)],
    "4 × 8": [NodeFacts(64.0, 8.0, None, 80 * GIB)] * 4,
    "3 × 8 + 1 × 4": [NodeFacts(64.0, 8.0, None, 80 * GIB)] * 3 + [NodeFacts(32.0, 4.0, None, 80 * GIB)],
}


def _plan(config: TrainConfig) -> RunPlan:
    """4 GiB a trajectory, 1 with checkpointing, 12 with kept graphs; a tenth of it in an evaluation; an image takes 6 GiB."""
    per = 1 if config.scaling.fixed_gradient_checkpointing else 12 if config.estimator.fixed_keep_graphs else 4
    training = GIB + config.fixed_micro_batch_size * per * GIB
    chunk = min(config.rewards.fixed_decode_chunk_size, config.fixed_micro_batch_size) * 6 * GIB
    zero = {field.name: 0 for field in dataclasses.fields(MemoryPlan)}
    memory = MemoryPlan(
        **zero
        | {
            "update_peak": training,
            "evaluation_peak": GIB + config.evaluation.fixed_batch_size * 4 * GIB // 10,
            "scoring_peak": 0 if config.rewards.num_actors else GIB + chunk,
        }
    )
    traffic = TrafficPlan(reduction=0, gather=0, num_reductions=1, reward_requests=0, reward_answers=0)
    calls = CallPlan(forwards=1, backwards=1, parameter_backwards=1)
    return RunPlan(memory=memory, traffic=traffic, calls=calls, actor_bytes=chunk, evaluation_bytes=GIB)


def _decide(nodes: list[NodeFacts], *, num_actors: int = 0, **changes: Any) -> Decided:
    values: dict[str, Any] = {
        "controls": {"size": ControlConfig(classes=("a", "b"))},
        "global_batch_size": 256,
        "micro_batch_size_per_worker": "auto",
        "sampler": SamplerConfig(guidance_scale=7.5),
        "evaluation": EvaluationConfig(batch_size="auto"),
        "rewards": RewardPoolConfig(
            num_actors=num_actors, cpus_per_actor=0.1, gpus_per_actor="auto", decode_chunk_size="auto"
        ),
        "scaling": ScalingConfig(
            num_workers="auto", use_gpu=True, gpus_per_worker="auto", gradient_checkpointing="auto"
        ),
    }
    return decide(TrainConfig(**values | changes), ClusterFacts("the cluster", tuple(nodes)), _plan)


@pytest.mark.parametrize("num_actors", [0, 1, 4])
@pytest.mark.parametrize(
    ("machines", "workers", "shares"),
    [("1 × 1", 1, (256, 256)), ("1 × 8", 8, (32, 32)), ("4 × 8", 32, (8, 8)), ("3 × 8 + 1 × 4", 28, (9, 10))],
)
def test_no_gpu_is_without_a_worker(machines: str, workers: int, shares: tuple[int, int], num_actors: int) -> None:
    """Also where the batch does not divide, and with a pool, which gets shares of the workers' cards."""
    decided = _decide(MACHINES[machines], num_actors=num_actors)
    config = decided.config
    assert config.scaling.num_workers == workers == sum(node.gpus for node in MACHINES[machines])
    assert config.worker_shares == shares
    facts = ClusterFacts("the cluster", tuple(MACHINES[machines]))
    assert memory_fit(_plan(config), config, facts).answer == "yes"
    assert config.scaling.gpus_per_worker == (0.75 if num_actors else 1.0)
    assert num_actors * config.rewards.fixed_gpus_per_actor == (0.25 if num_actors else 0.0)
    assert not any("have no worker" in line for line in decided.why)


@pytest.mark.parametrize(
    ("machines", "num_actors", "micro_batch", "rounds"),
    [
        # 72 GiB of the card are usable, 0.7 of them the context's: 17 trajectories at 4 GiB each, and 1 GiB
        ("1 × 1", 0, 16, 16),  # 17 would need as many rounds
        ("1 × 8", 0, 16, 2),
        ("4 × 8", 0, 8, 1),
        ("4 × 8", 1, 4, 2),  # one is scored while the next one is rolled out
        ("3 × 8 + 1 × 4", 0, 10, 1),
        ("3 × 8 + 1 × 4", 1, 5, 2),
    ],
)
def test_the_micro_batch_is_even_and_fits(machines: str, num_actors: int, micro_batch: int, rounds: int) -> None:
    config = _decide(MACHINES[machines], num_actors=num_actors).config
    assert (config.fixed_micro_batch_size, config.num_micro_batches) == (micro_batch, rounds)
    assert config.scaling.gradient_checkpointing is False


def _card(gib: float) -> list[NodeFacts]:
    """One card of which so much is usable, beside the context."""
    return [NodeFacts(8.0, 1.0, None, round((gib + 0.7) * GIB / 0.9))]


def test_checkpointing_is_taken_where_it_is_faster() -> None:
    """32 trajectories with guidance, 64 rows: two rows more for each micro-batch, or 1.3 times all of it."""
    micro = {"global_batch_size": 32, "rewards": RewardPoolConfig(num_actors=0, decode_chunk_size=1)}
    seen = {}
    for gib in (40.0, 13.0, 9.5):
        decided = _decide(_card(gib), **micro)
        seen[gib] = (decided.config.fixed_micro_batch_size, decided.config.scaling.gradient_checkpointing)
    # 13 GiB: 3 at a time in 11 rounds are 86 rows, all at once with checkpointing would be 85.8 but need 33 GiB;
    # 11 with it in 3 rounds are 91
    assert seen == {40.0: (8, False), 13.0: (3, False), 9.5: (8, True)}
    why = _decide(_card(9.5), **micro).why
    assert "micro_batch_size_per_worker 8, scaling.gradient_checkpointing True" in why[1]
    assert re.match(r"micro-batch \d+ \w+ gradient checkpointing would be faster, but does not fit: a worker: ", why[2])


_AUTO = EstimatorConfig(keep_graphs="auto")


@pytest.mark.parametrize(
    ("gib", "keep", "checkpointing", "micro_batch", "said"),
    [
        (100, True, False, 8, None),
        (90, True, False, 4, "micro-batch 8 with kept graphs would be faster, but does not fit"),  # 2 micro-batches
        (20, False, False, 4, "micro-batch 2 with kept graphs would be faster, but does not fit"),
        (12, False, True, 8, "micro-batch 3 without gradient checkpointing would be faster, but does not fit"),
    ],
)
def test_graphs_are_kept_where_they_fit(
    gib: float, keep: bool, checkpointing: bool, micro_batch: int, said: str | None
) -> None:
    decided = _decide(_card(gib), global_batch_size=8, estimator=_AUTO)
    config = decided.config
    assert (config.estimator.keep_graphs, config.scaling.gradient_checkpointing) == (keep, checkpointing)
    assert config.fixed_micro_batch_size == micro_batch
    assert "estimator.keep_graphs" in " ".join(decided.why)
    assert said is None or any(line.startswith(said) for line in decided.why)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": ScalingConfig(zero_stage=3)},
        {"scaling": ScalingConfig(precision="fp16", use_gpu=True, gpus_per_worker=1.0)},
        {"scaling": ScalingConfig(gradient_checkpointing=True)},
        {"estimator": EstimatorConfig(name="last_k", keep_graphs="auto")},
    ],
)
def test_graphs_are_not_kept_beside_what_does_not_go_with_them(changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "micro_batch_size_per_worker": 8,
        "evaluation": EvaluationConfig(),
        "scaling": ScalingConfig(),
    }
    given |= {"rewards": RewardPoolConfig(num_actors=0), "estimator": _AUTO}
    node = [NodeFacts(8.0, 1.0, 900 * GIB, 900 * GIB)]
    assert _decide(node, **given).config.estimator.keep_graphs is True
    assert _decide(node, **given | changes).config.estimator.keep_graphs is False


def test_graphs_are_not_kept_where_nobody_knows_the_memory() -> None:
    given: dict[str, Any] = {"micro_batch_size_per_worker": 8, "evaluation": EvaluationConfig(), "estimator": _AUTO}
    given |= {"rewards": RewardPoolConfig(num_actors=0), "scaling": ScalingConfig()}
    decided = _decide([NodeFacts(8.0, 0.0, None)], **given)
    assert decided.config.estimator.keep_graphs is False
    assert decided.why == ("estimator.keep_graphs False: the cluster does not say what memory it has",)


def test_what_is_given_is_left_alone() -> None:
    """A number that does not fit stays, and the verdict says no; one larger than the share becomes the share."""
    given = _decide(_card(9.0), micro_batch_size_per_worker=16, global_batch_size=32).config
    assert (given.micro_batch_size_per_worker, given.scaling.gradient_checkpointing) == (16, True)
    assert memory_fit(_plan(given), given, ClusterFacts("it", tuple(_card(9.0)))).answer == "no"
    assert _decide(MACHINES["1 × 8"], micro_batch_size_per_worker=64).config.micro_batch_size_per_worker == 32
    everything = dataclasses.replace(given, rewards=dataclasses.replace(given.rewards, decode_chunk_size=1))
    left = decide(everything, None, _plan)
    assert left.config == everything and left.why == ()


def test_evaluation_and_decoding_get_what_training_leaves() -> None:
    """Training is decided first; then 0.4 GiB for each sample of an evaluation, 6 for each image decoded, and 1."""
    small = _decide(_card(13.1), global_batch_size=3, group_size=3).config
    assert (small.fixed_micro_batch_size, small.evaluation.batch_size, small.rewards.decode_chunk_size) == (3, 16, 1)
    large = _decide(_card(40.0), global_batch_size=4).config
    assert (large.evaluation.batch_size, large.rewards.decode_chunk_size) == (
        16,
        2,
    )  # 4 fit, but would need the most of all
    tight = _decide(_card(7.0), global_batch_size=1).config
    assert (tight.evaluation.batch_size, tight.rewards.decode_chunk_size) == (8, 1)


def test_groups_stay_whole() -> None:
    config = _decide(MACHINES["3 × 8 + 1 × 4"], group_size=4, global_batch_size=128).config
    assert (config.scaling.num_workers, config.worker_shares, config.micro_batch_size_per_worker) == (28, (4, 8), 8)
    few = _decide(MACHINES["1 × 8"], group_size=4, global_batch_size=16)
    assert few.config.scaling.num_workers == 4 and "4 is one for each group of the global batch (16)" in few.why[0]


def test_on_cpus_a_node_is_shared() -> None:
    """2 GiB and the process a worker; as many as there are CPUs beside the pool."""
    cpu = ScalingConfig(num_workers="auto", gradient_checkpointing=True)
    pool = RewardPoolConfig(num_actors=1, decode_chunk_size=1)
    nodes = [NodeFacts(7.0, 0.0, 64 * GIB)]
    config = _decide(nodes, scaling=cpu, rewards=pool, global_batch_size=16).config
    assert (config.scaling.num_workers, config.worker_shares) == (6, (2, 3))
    assert config.micro_batch_size_per_worker == 2


def test_what_cannot_be_decided_says_why() -> None:
    with pytest.raises(ResourceError, match=r"no room for a worker of one GPU .*--machines 4x8x80GB"):
        _decide([NodeFacts(8.0, 0.0, None)])
    with pytest.raises(ResourceError, match=r"micro_batch_size_per_worker, .*does not say what its GPUs have\. Give"):
        _decide([NodeFacts(8.0, 2.0, None, None)])
    config = TrainConfig(scaling=ScalingConfig(num_workers="auto"))
    with pytest.raises(ResourceError, match="no cluster can be asked"):
        decide(config, None, _plan)


def test_a_choice_is_counted_before_it_is_made() -> None:
    """The estimate is too low by half a trajectory's memory: the next smaller micro-batch is taken."""

    def low(config: TrainConfig) -> RunPlan:
        plan = _plan(config)
        memory = dataclasses.replace(plan.memory, update_peak=plan.memory.update_peak - 2 * GIB)
        return dataclasses.replace(plan, memory=memory)

    scaling = ScalingConfig(num_workers=1, use_gpu=True, gpus_per_worker="auto")
    config = TrainConfig(
        global_batch_size=64,
        micro_batch_size_per_worker="auto",
        scaling=scaling,
        rewards=RewardPoolConfig(num_actors=0, decode_chunk_size=1),
        evaluation=EvaluationConfig(batch_size=1),
    )
    facts = ClusterFacts("it", tuple(_card(64.0)))  # 16 need 65 GiB, and are estimated at 63
    assert decide(config, facts, low).config.micro_batch_size_per_worker == 16
    assert decide(config, facts, _plan, low).config.micro_batch_size_per_worker == 13


def test_a_better_estimate_is_searched_again() -> None:
    """Half as much again as it takes, until something has been counted: the choice is not too small in the end."""
    counted = []

    def exact(config: TrainConfig) -> RunPlan:
        counted.append(config)
        return _plan(config)

    def high(config: TrainConfig) -> RunPlan:
        plan = _plan(config)
        peak = plan.memory.update_peak * (1 if counted else 3 / 2)
        return dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, update_peak=round(peak)))

    decided = _decide(_card(66.0), global_batch_size=64, rewards=RewardPoolConfig(num_actors=0, decode_chunk_size=1))
    config = dataclasses.replace(decided.config, micro_batch_size_per_worker="auto")
    assert decided.config.micro_batch_size_per_worker == 16
    again = decide(config, ClusterFacts("it", tuple(_card(66.0))), exact, high).config
    assert again.micro_batch_size_per_worker == 16
    assert [config.micro_batch_size_per_worker for config in counted] == [10, 16, 16]
