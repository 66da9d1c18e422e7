"""ZeRO 0 to 3, LoRA and full fine-tuning: the same answer as one process, true shapes, state that moves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ctrl_ray
from ctrl_ray.config import (
    AdapterConfig,
    ControlConfig,
    EstimatorConfig,
    LoraConfig,
    OptimizerConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.distributed.learner import Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.policy.build import build_policy
from tests.integration.sharding import Case, PlainEngine, make_learner, run_cases
from tests.tiny import make_tiny_pipeline

pytestmark = pytest.mark.full

STAGES = {f"stage{stage}": ScalingConfig(zero_stage=stage, zero3_persistence_threshold=0) for stage in (0, 1, 2, 3)}
OFFLOADED = {
    "stage2-offloaded": ScalingConfig(zero_stage=2, offload="optimizer"),
    "stage3-offloaded": ScalingConfig(zero_stage=3, zero3_persistence_threshold=0, offload="optimizer_and_parameters"),
}
SGD_CASES = {(False, name): scaling for name, scaling in STAGES.items()} | {
    (True, name): scaling for name, scaling in (STAGES | OFFLOADED).items()
}
"""By (all weights are trained, name)."""
KEEPING = ("stage0", "stage2")
"""Where the rollout keeps its graphs, several forwards of the engine before the first backward."""
PAST_THE_ENGINE = ("stage0", "stage3")
"""Where an estimator asks for gradients of the latents alone, which the engine may not take for its backward."""


ASKING = ("sticking_the_landing", "adjoint_matching")


@pytest.fixture(scope="module")
def base_config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two controls on a tiny pipeline."""
    return TrainConfig(
        base_model=str(make_tiny_pipeline(tmp_path_factory.mktemp("pipeline"), shallow=True)),
        global_batch_size=8,
        micro_batch_size_per_worker=2,
        controls={
            name: ControlConfig(classes=tuple(f"class {index}" for index in range(count)), guidance_strength=2.0)
            for name, count in (("jpeg_size", 4), ("colourfulness", 3))
        },
        adapter=AdapterConfig(kind="gains"),
        lora=LoraConfig(rank=2, alpha=2.0),
    )


def _config(config: TrainConfig, full: bool, scaling: ScalingConfig, optimizer: OptimizerConfig) -> TrainConfig:
    """Updates of eight trajectories of three steps; a constant learning rate.

    The last step is the reference's: its noise is so small that the gradient of its KL is the difference of two nearly
    equal numbers, and rounding alone (one process, another micro-batch) changes five such updates by 5e-4.
    """
    optimizer = dataclasses.replace(optimizer, warmup_updates=0, final_learning_rate_fraction=1.0)
    return dataclasses.replace(
        config,
        full_finetune=full,
        num_updates=2 if optimizer.name == "sgd" else 3,
        micro_batch_size_per_worker=2,
        kl_coef=0.1,
        sampler=SamplerConfig(num_steps=3, reference_steps=1),
        optimizer=optimizer,
        scaling=dataclasses.replace(scaling, threads_per_worker=1),
    )


def _sgd(config: TrainConfig, full: bool, scaling: ScalingConfig) -> TrainConfig:
    """Two updates of SGD with momentum, with clipped gradients."""
    rate = 1e-2 if full else 4e-1
    optimizer = OptimizerConfig(name="sgd", learning_rate=rate, embedding_learning_rate=rate, gradient_clipping=1.0)
    return _config(config, full, scaling, optimizer)


def _asking(config: TrainConfig, name: str) -> TrainConfig:
    return dataclasses.replace(config, estimator=EstimatorConfig(name=name))  # type: ignore[arg-type]


def _embedding(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, adapter=AdapterConfig(kind="embedding"))


def _keeping(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, estimator=EstimatorConfig(keep_graphs=True))


@pytest.fixture(scope="module")
def two_workers(base_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers leave: two SGD updates of every stage, and AdamW runs with a checkpoint half-way."""
    folder = tmp_path_factory.mktemp("two_workers")
    cases = {
        f"{'full' if full else 'lora'}-{name}": Case(config=_sgd(base_config, full, scaling), poisoned=True)
        for (full, name), scaling in SGD_CASES.items()
    } | {
        f"{estimator}-{name}": Case(config=_asking(_sgd(base_config, False, STAGES[name]), estimator))
        for estimator in ASKING
        for name in PAST_THE_ENGINE
    }
    cases["embedding-stage3"] = Case(config=_embedding(_sgd(base_config, False, STAGES["stage3"])))
    cases |= {f"kept-{name}": Case(config=_keeping(_sgd(base_config, False, STAGES[name]))) for name in KEEPING}
    for name, full, stage in (("saved-lora", False, 2), ("saved-full1", True, 1), ("saved-full3", True, 3)):
        config = _config(base_config, full, STAGES[f"stage{stage}"], OptimizerConfig(learning_rate=3e-3))
        cases[name] = Case(config=config, save_after=2)
    run_cases(cases, 2, folder)
    return folder


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_two_workers_take_the_steps_of_one_process(
    full: bool,
    two_workers: Path,
    base_config: TrainConfig,
) -> None:
    """Every stage, offloaded or not: the parameters' change after two SGD-with-momentum updates differs by at most 1e-4
    (relative L2) from plain torch's in this process."""
    config, kind = _sgd(base_config, full, ScalingConfig()), "full" if full else "lora"
    _check_steps(config, two_workers, [f"{kind}-{name}" for trained_full, name in SGD_CASES if trained_full == full])


@pytest.mark.parametrize("estimator", ASKING)
def test_two_workers_go_past_the_engine_as_one_process_does(
    two_workers: Path, base_config: TrainConfig, estimator: str
) -> None:
    """The cotangent goes through the policy without its parameters, or through the reference alone, between the engine's
    backwards."""
    config = _asking(_sgd(base_config, False, ScalingConfig()), estimator)
    _check_steps(config, two_workers, [f"{estimator}-{name}" for name in PAST_THE_ENGINE])


def test_one_lora_for_all_labels_is_sharded_too(two_workers: Path, base_config: TrainConfig) -> None:
    """Its products are our own; ZeRO-3 gathers A and B for them."""
    _check_steps(_embedding(_sgd(base_config, False, ScalingConfig())), two_workers, ["embedding-stage3"])


def test_graphs_kept_by_two_workers_are_those_of_one_process(two_workers: Path, base_config: TrainConfig) -> None:
    """Which computes them again, policy and reference apart."""
    _check_steps(_sgd(base_config, False, ScalingConfig()), two_workers, [f"kept-{name}" for name in KEEPING])


def _check_steps(config: TrainConfig, folder: Path, cases: list[str]) -> None:
    """Of each case against plain torch's in this process."""
    policy = build_policy(config)
    start = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
    learner = make_learner(config, PlainEngine(policy, config), Rank(0, 1, torch.device("cpu")))
    for update in range(config.num_updates):
        make_method(learner.config).update(learner, update)
    change = {name: p.detach() - start[name] for name, p in policy.trainable_parameters().items()}
    size = float(torch.cat([value.flatten() for value in change.values()]).norm())
    for name in cases:
        state = load_file(folder / f"{name}.safetensors")
        assert {key: state[key].shape for key in start} == {key: value.shape for key, value in start.items()}
        difference = float(torch.cat([(state[key] - start[key] - change[key]).flatten() for key in start]).norm())
        print(f"{name}: {difference / size:.2e} of a change of {size:.3g}")
        assert difference / size <= 1e-4, name
        assert int(state["step"]) == config.num_updates
        # ZeRO-3 shards every parameter of the policy, frozen and reference weights included; the others none
        expected = len(list(policy.parameters())) if "-stage3" in name else 0
        assert int(state["sharded"]) == expected, name


def test_a_nan_on_one_worker_is_refused_by_both_and_changes_nothing(two_workers: Path) -> None:
    """Every stage, offloaded or not: parameters, moments and step count are bit for bit those before."""
    for full, name in SGD_CASES:
        state = load_file(two_workers / f"{'full' if full else 'lora'}-{name}.safetensors")
        assert float(state["refused"]) == 1, (full, name)


def _resumed(base: TrainConfig, load: str, stage: int) -> Case:
    full, optimizer = "full" in load, OptimizerConfig(learning_rate=3e-3)
    return Case(config=_config(base, full, STAGES[f"stage{stage}"], optimizer), first_update=2, load=load)


def _check_losses(folder: Path, saved: str, names: list[str]) -> None:
    whole = json.loads((folder / f"{saved}.json").read_text())
    assert abs(whole[2] - whole[0]) > 1e-3 * abs(whole[0])  # a loss that tells one update from another
    for name in names:
        assert json.loads((folder / f"{name}.json").read_text()) == pytest.approx(whole[2:], rel=2e-5), name


def test_a_checkpoint_of_two_workers_resumes_on_one(two_workers: Path, base_config: TrainConfig) -> None:
    """LoRA and all weights, from ZeRO 1, 2 and 3 to other stages: the state is what was saved bit for bit, and the
    losses of the next updates are those of the run that went on."""
    loads = {"saved-lora": 0, "saved-full1": 0, "saved-full3": 1}
    run_cases({f"{load}-at-1": _resumed(base_config, load, stage) for load, stage in loads.items()}, 1, two_workers)
    for load in loads:
        _check_losses(two_workers, load, [f"{load}-at-1"])


def test_a_lora_checkpoint_of_two_workers_resumes_on_three(
    two_workers: Path,
    base_config: TrainConfig,
) -> None:
    """Neither the batch nor the tensors divide by three."""
    cases = {f"saved-lora-at-3-stage{stage}": _resumed(base_config, "saved-lora", stage) for stage in (1, 3)}
    run_cases(cases, 3, two_workers)
    _check_losses(two_workers, "saved-lora", list(cases))


def test_a_full_checkpoint_of_two_workers_resumes_on_four(two_workers: Path, base_config: TrainConfig) -> None:
    """Saved under ZeRO-1, resumed under ZeRO-3, and the other way round."""
    loads = {"saved-full1": 3, "saved-full3": 2}
    run_cases({f"{load}-at-4": _resumed(base_config, load, stage) for load, stage in loads.items()}, 4, two_workers)
    for load in loads:
        _check_losses(two_workers, load, [f"{load}-at-4"])


@pytest.mark.parametrize("saved", ["saved-lora", "saved-full1", "saved-full3"])
def test_the_adapter_in_a_checkpoint_of_two_workers_loads(
    saved: str,
    two_workers: Path,
    base_config: TrainConfig,
) -> None:
    """Tensors have their true shapes and the values of the state; plain diffusers code loads them."""
    adapter = two_workers / saved / "adapter"
    state: dict[str, torch.Tensor] = {}
    for file in (two_workers / saved).glob("training_state*.safetensors"):
        part = load_file(file)
        assert not (part.keys() & state.keys()) - {"step"}
        state |= part
    policy = build_policy(dataclasses.replace(base_config, init_adapter=str(adapter), full_finetune="full" in saved))
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(parameter, state[name]), name
    ctrl_ray.ControlledPipeline.from_pretrained(str(adapter))
    if "full" in saved:
        files = sorted(path.name for path in (adapter / "unet").glob("*.safetensors"))
        assert files == [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        sizes = [(adapter / "unet" / name).stat().st_size for name in files]
        assert max(sizes) < 0.6 * sum(sizes)  # no rank wrote, or held, much more than its half
