"""Engines on a card or a CPU: `python -m tests.gpu.engines CASE PIPELINE FOLDER DEVICE RANK RANKS` is one rank of a group.

`tests.gpu.support.run_engines` starts the ranks. The last line that rank 0 prints is what the case found, as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctrl_ray.config import (
    ControlConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.distributed import engine as engine_module
from ctrl_ray.distributed.engine import PolicyEngine, all_reduce_sum
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.worker_group import process_group_backend
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from tests.gpu.support import difference, set_tf32
from tests.integration.sharding import Case, PlainEngine, make_learner, run_case
from tests.integration.test_planner_memory import CONTROLS, PROMPTS, StandardNormal
from tests.integration.test_planner_memory import _planned as planned

STAGES = (0, 1, 2, 3)
OFFLOADED = {1: "optimizer", 2: "optimizer", 3: "optimizer_and_parameters"}


def backends(rank: Rank, pipeline: Path, folder: Path) -> dict[str, Any]:
    """Sums of tensors on the CPU and on the device, and objects, over one group."""
    there, here = torch.ones(3, device=rank.device), torch.ones(3, dtype=torch.float64)
    dist.all_reduce(there)
    dist.all_reduce(here)
    told: list[Any] = [{"stop": rank.index} if rank.index == 0 else None]
    dist.broadcast_object_list(told, src=0)
    # a group of one is not asked for sums of the workers' figures; here it is
    engine_module.dist = SimpleNamespace(  # type: ignore[assignment]
        is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=dist.all_reduce
    )
    figures = all_reduce_sum(torch.full((2,), 1.5, dtype=torch.float64), rank.device)
    return {
        "backend": dist.get_backend_config(),
        "on the device": there.tolist(),
        "on the CPU": here.tolist(),
        "told": told[0],
        "figures": [str(figures.device), str(figures.dtype), figures.tolist()],
    }


def zero(rank: Rank, pipeline: Path, folder: Path, precision: str) -> dict[str, float]:
    """Two updates of SGD with momentum under every stage, offloaded or not: how far the parameters' change is from that of
    plain torch in float32 on the same device (relative L2). 'plain': that of plain torch in this precision."""
    config, alone = _config(pipeline, rank, precision=precision), Rank(0, 1, rank.device)
    expected = _change(_config(pipeline, rank), alone, PlainEngine)[1]
    plain = expected if precision == "fp32" else _change(config, alone, PlainEngine)[1]
    found = {"plain": difference(plain, expected)}
    for stage in STAGES:
        for offload in dict.fromkeys(("none", OFFLOADED.get(stage, "none"))):
            scaling = dataclasses.replace(config.scaling, zero_stage=stage, offload=offload)  # type: ignore[arg-type]
            name = f"stage {stage}" + (", offloaded" if offload != "none" else "")
            engine, got = _change(dataclasses.replace(config, scaling=scaling), rank, PolicyEngine)
            devices = {p.device.type for p in engine.policy.parameters() if p.numel()}
            assert offload == "optimizer_and_parameters" or devices <= {rank.device.type}, (name, devices)
            found[name] = difference(got, expected)
    return found


def resume(rank: Rank, pipeline: Path, folder: Path) -> dict[str, Any]:
    """A checkpoint after two of four updates of AdamW, and the updates after it on an engine of another stage: the losses.
    That the state is what was saved, to the bit, is asserted on the way."""
    losses = {}
    adamw = OptimizerConfig(learning_rate=3e-3, warmup_updates=0, final_learning_rate_fraction=1.0)
    for precision, saved, loaded, full in (("fp32", 1, 3, False), ("bf16", 1, 2, False), ("fp32", 3, 1, True)):
        configs = [
            dataclasses.replace(
                _config(pipeline, rank, precision=precision, zero_stage=stage),
                full_finetune=full,
                num_updates=4,
                optimizer=adamw,
            )
            for stage in (saved, loaded)
        ]
        whole = f"{'all weights' if full else 'LoRA'}, {precision}"
        rest = f"{whole}, resumed"
        run_case(whole, Case(config=configs[0], save_after=2), folder, rank)
        dist.barrier()
        run_case(rest, Case(config=configs[1], first_update=2, load=whole), folder, rank)
        dist.barrier()
        losses[whole] = [json.loads((folder / f"{file}.json").read_text()) for file in (whole, rest)]
    return losses


def memory(rank: Rank, pipeline: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Bytes of a worker's second update on the shipped pipeline: planned, and (on a card) the most that was allocated."""
    found = {}
    large = 128 if rank.device.type == "cuda" else 2
    for precision, stage, micro_batch, checkpointing in (
        ("fp32", 0, large, False),
        ("fp32", 1, large // 2, False),
        ("fp32", 1, large, True),
        ("bf16", 1, large, False),
    ):
        scaling = ScalingConfig(
            use_gpu=rank.device.type == "cuda",
            zero_stage=stage,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
            gradient_checkpointing=checkpointing,
        )
        config = TrainConfig(
            base_model="shapes",
            controls=CONTROLS,
            sampler=SamplerConfig(num_steps=3, guidance_scale=2.0),
            global_batch_size=2 * micro_batch,
            micro_batch_size_per_worker=micro_batch,
            scaling=scaling,
            evaluation=EvaluationConfig(batch_size=1),  # what an update takes is measured
        )
        name = f"{precision}, stage {stage}, {micro_batch}" + (", checkpointed" if checkpointing else "")
        found[name] = {"planned": planned(config).peak, "measured": _allocated(config, rank)}
    return found


def _allocated(config: TrainConfig, rank: Rank) -> int:
    """Most bytes during the second update, beyond what the libraries keep for themselves; 0 on a CPU."""
    on_card = rank.device.type == "cuda"
    before = 0
    if on_card:
        for dtype in (torch.float32, torch.bfloat16):  # cuBLAS takes its workspace
            torch.ones(64, 64, device=rank.device, dtype=dtype) @ torch.ones(64, 64, device=rank.device, dtype=dtype)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(rank.device)
    backbone = load_backbone(config.base_model)
    learner = Learner(
        config=config,
        engine=PolicyEngine(build_policy(config, CONTROLS).to(rank.device), config),
        kernel=backbone.make_kernel(config.sampler),
        encoder=backbone.load_encoder(rank.device).only(PROMPTS),
        rewards=StandardNormal(),  # type: ignore[arg-type]
        controls=CONTROLS,
        prompts=PROMPTS,
        rank=rank,
    )
    make_method(config).update(learner, 0)
    if on_card:
        torch.cuda.reset_peak_memory_stats(rank.device)
    make_method(config).update(learner, 1)
    return torch.cuda.max_memory_allocated(rank.device) - before if on_card else 0


def _config(pipeline: Path, rank: Rank, **scaling: Any) -> TrainConfig:
    """Two updates of eight trajectories of three steps, the last of them the reference's; every parameter is sharded."""
    return TrainConfig(
        base_model=str(pipeline),
        controls={
            name: ControlConfig(classes=tuple(f"class {index}" for index in range(count)), guidance_strength=2.0)
            for name, count in (("jpeg_size", 4), ("colourfulness", 3))
        },
        num_updates=2,
        global_batch_size=8,
        micro_batch_size_per_worker=4,
        kl_coef=0.1,
        sampler=SamplerConfig(num_steps=3, reference_steps=1),
        lora=LoraConfig(rank=2, alpha=2.0),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=0.4,
            embedding_learning_rate=0.4,
            gradient_clipping=1.0,
            warmup_updates=0,
            final_learning_rate_fraction=1.0,
        ),
        scaling=ScalingConfig(
            use_gpu=rank.device.type == "cuda", threads_per_worker=1, zero3_persistence_threshold=0, **scaling
        ),
    )


def _change(
    config: TrainConfig, rank: Rank, make_engine: Callable[[Any, TrainConfig], Any]
) -> tuple[Any, dict[str, Tensor]]:
    """The engine after all updates, and what they changed, float32 on the CPU."""
    policy = build_policy(config).to(rank.device)
    before = {name: p.detach().float().cpu().clone() for name, p in policy.trainable_parameters().items()}
    engine = make_engine(policy, config)
    learner = make_learner(config, engine, rank)
    for update in range(config.num_updates):
        make_method(config).update(learner, update)
    after = engine.state() if isinstance(engine, PolicyEngine) else policy.trainable_parameters()
    return engine, {name: after[name].detach().float().cpu() - value for name, value in before.items()}


CASES: dict[str, Callable[[Rank, Path, Path], Any]] = {
    "backends": backends,
    "zero_fp32": functools.partial(zero, precision="fp32"),
    "zero_bf16": functools.partial(zero, precision="bf16"),
    "resume": resume,
    "memory": memory,
}


def main(argv: list[str]) -> int:
    """Run one case as one rank."""
    case, pipeline, folder, kind, index, size = argv
    rank = Rank(int(index), int(size), torch.device(kind, int(index)) if kind == "cuda" else torch.device(kind))
    if kind == "cuda":
        torch.cuda.set_device(rank.device)
    set_tf32(False)
    torch.set_num_threads(1)
    dist.init_process_group(
        process_group_backend(use_gpu=kind == "cuda"),
        init_method=f"file://{folder}/{case}-{size}-ranks",
        rank=rank.index,
        world_size=rank.size,
    )
    found = CASES[case](rank, Path(pipeline), Path(folder))
    dist.barrier()
    dist.destroy_process_group()
    if rank.index == 0:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
