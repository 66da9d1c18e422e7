"""Groups of gloo processes that run several engine configurations in turn; what every case leaves lies in a folder.

The processes are forked from a server that has imported everything, so that a group starts in a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.checkpoints import read_checkpoint, write_checkpoint
from ctrl_ray.distributed.engine import PolicyEngine, all_reduce_sum, load_parameters
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.policy.adapter import AdapterInfo, make_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.rewards.local import LocalRewards
from tests.unit.rewards.small import PROMPTS, small_model


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine and the updates that it makes."""

    config: TrainConfig
    first_update: int = 0
    load: str = ""
    """Name of the checkpoint that it goes on from."""
    save_after: int = 0
    """Updates after which it leaves a checkpoint of its own name; 0: none."""
    poisoned: bool = False
    """At the end it tries one more update, with a NaN in a parameter's gradient on the last rank."""


def make_learner(config: TrainConfig, engine: Any, rank: Rank) -> Learner:
    """A learner on the tiny pipeline; its rewards are random networks in this process."""
    backbone = load_backbone(config.base_model)
    return Learner(
        config=config,
        engine=engine,
        kernel=backbone.make_kernel(config.sampler),
        encoder=backbone.load_encoder(rank.device),
        rewards=LocalRewards(small_model(Path(config.base_model))),
        controls=config.controls,
        prompts=PROMPTS,
        rank=rank,
    )


def run_cases(cases: Mapping[str, Case], num_workers: int, folder: Path) -> None:
    """Train every case to its `num_updates` on one group of gloo processes.

    `folder`/NAME.safetensors is what it leaves, NAME.json its losses, NAME/ its checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_sharding_") as meeting:
        processes = [
            context.Process(target=_work, args=(dict(cases), folder, f"{meeting}/store", rank, num_workers))
            for rank in range(num_workers)
        ]
        for process in processes:
            process.start()
        running = list(processes)
        while running and all(process.exitcode in (None, 0) for process in processes):
            wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
        for process in running:  # the others of one that failed
            process.terminate()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * num_workers, "see the traceback above"


def _work(cases: Mapping[str, Case], folder: Path, store: str, index: int, size: int) -> None:
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(size), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=size)
    for name, case in cases.items():
        run_case(name, case, folder, Rank(index, size, torch.device("cpu")))
    dist.barrier()
    dist.destroy_process_group()


def run_case(name: str, case: Case, folder: Path, rank: Rank) -> None:
    """Train a case to its `num_updates` as one rank of this process's group; collective."""
    config = case.config
    policy = build_policy(config).to(rank.device)
    if case.load:
        state, progress = read_checkpoint(folder / case.load)
        assert progress["updates_done"] == case.first_update
        load_parameters(policy, state)
    engine = PolicyEngine(policy, config)
    if case.load:
        engine.load_state(state)
        for key, value in engine.state().items():
            assert torch.equal(value, state[key]), f"{name}: {key} is not what was saved"
    learner = make_learner(config, engine, rank)
    losses = []
    for update in range(case.first_update, config.num_updates):
        losses.append(make_method(learner.config).update(learner, update)["loss"])
        if update + 1 == case.save_after:
            (folder / name).mkdir(exist_ok=True)
            progress = {"updates_done": update + 1}
            write_checkpoint(engine, _info(config), progress, folder / name, rank.index, rank.size)
    left = engine.state()
    refused = case.poisoned and _refuses_a_nan(learner, engine, left)
    if rank.index == 0:
        left["refused"] = torch.tensor(float(refused))
        sharded = [p for p in policy.parameters() if hasattr(p, "ds_tensor") and not p.ds_persist]
        left["sharded"] = torch.tensor(float(len(sharded)))
        save_file(left, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(losses))


def _refuses_a_nan(learner: Learner, engine: PolicyEngine, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether every rank raises and no bit of the state changes; the NaN enters behind the cotangents, which are checked
    before."""
    rank, parameter = learner.rank, next(iter(engine.policy.trainable_parameters().values()))
    if rank.index == rank.size - 1:
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    raised = 0.0
    try:
        make_method(learner.config).update(learner, learner.config.num_updates)
    except NonFiniteError as error:
        raised = float("the update was not made" in str(error))
    everywhere = float(all_reduce_sum(torch.tensor([raised], dtype=torch.float64), rank.device)) == rank.size
    return everywhere and all(torch.equal(value, state[name]) for name, value in engine.state().items())


def _info(config: TrainConfig) -> AdapterInfo:
    return make_adapter_info(
        base_model=config.base_model,
        base_revision=None,
        controls=config.controls,
        sampler=config.sampler,
        lora=None if config.full_finetune else config.lora,
        kind=config.adapter.kind,
        training={},
    )


class PlainEngine:
    """The reference: torch's SGD in one process, without DeepSpeed."""

    def __init__(self, policy: ControlledPolicy, config: TrainConfig) -> None:
        self.policy, self.learning_rate = policy, config.optimizer.learning_rate
        self.latent_shape = policy.latent_shape
        self._clip = config.optimizer.gradient_clipping
        groups = policy.parameter_groups(config.optimizer.learning_rate, config.optimizer.embedding_learning_rate)
        self._optimizer = torch.optim.SGD(groups, momentum=config.optimizer.momentum)

    def __call__(self, *arguments: Any, reference: bool) -> Any:
        """The policy's forward."""
        return self.policy(*arguments, reference=reference)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self, update: int) -> float:
        """Clip, update at a constant learning rate, forget the gradients."""
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable_parameters().values(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)
