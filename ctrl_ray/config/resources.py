"""Processes, cards, threads and memory: the reward pool, and the training workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ctrl_ray.config.fields import above, at_least, check_fields
from ctrl_ray.config.values import Auto, Precision, fixed, require


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardPoolConfig:
    """The Ray actors that decode latents and answer log p(y|x,c) with its gradient."""

    num_actors: Annotated[int, at_least(0)] = 1
    """Actors at the start. 0: there is no pool, and each training worker computes its own rewards."""
    min_actors: Annotated[int | None, at_least(0)] = None
    """The pool never shrinks below this number. None: num_actors."""
    max_actors: Annotated[int | None, at_least(0)] = None
    """The pool never grows above this number. None: num_actors. Leave room for these actors: a growing pool takes
    what is free."""
    grow_after_s: Annotated[float, above(0)] = 5.0
    """Add an actor when requests have waited for busy actors for this long without a break."""
    shrink_after_s: Annotated[float, above(0)] = 60.0
    """Stop an actor when there have been fewer open requests than actors for this long without a break."""
    cpus_per_actor: Annotated[float, at_least(0)] = 1.0
    """CPUs (fractions allowed) that Ray reserves for an actor."""
    threads_per_actor: Annotated[int | None, at_least(1)] = None
    """torch threads of an actor on the CPU. None: cpus_per_actor, rounded up."""
    gpus_per_actor: Annotated[float | Auto, at_least(0)] = 0.0
    """GPUs that Ray reserves for an actor. With a fraction, several actors share one GPU, or an actor shares it with a
    worker (scaling.gpus_per_worker). 'auto': a share so small that all actors fit beside a worker on any card."""
    placement: Literal["pack", "spread"] = "pack"
    """'pack' is Ray's default: half of a node is filled before the next one is used. 'spread' distributes the actors
    over all nodes, so that you lose fewer of them with a node."""
    node_resource: str | None = None
    """Put actors only on nodes that have this custom Ray resource; each actor takes 0.001 of it. Give it to CPU
    nodes only, and the pool stays off GPU nodes. None: any node."""
    deterministic: bool = True
    """Each request gets its own forward pass, so that a repeated run is bitwise equal on the CPU. False: requests
    that wait together share one, within the two limits below."""
    max_batch_size: Annotated[int, at_least(1)] = 64
    """With deterministic False: the most samples that share a forward pass."""
    max_batch_delay_s: Annotated[float, at_least(0)] = 0.005
    """With deterministic False: the longest time that a request waits for others to share its forward pass."""
    max_pending_per_worker: Annotated[int, at_least(1)] = 4
    """A worker with this many unanswered requests waits before it submits another. The object store thus never holds
    more than workers × this many requests and answers. Two are enough to overlap rollout and scoring."""
    timeout_s: Annotated[float, above(0)] = 300.0
    """An actor that works on one request for longer than this is replaced, and another actor gets the request.
    Without another actor the request fails with an error; the workers do not hang."""
    decode_chunk_size: Annotated[int | Auto, at_least(1)] = 32
    """Images decoded at a time. It limits the memory of scoring and changes no result. 'auto': up to 8, as many as fit
    beside what training takes."""

    def __post_init__(self) -> None:
        check_fields(self, "rewards")
        low, high = self.actor_bounds
        require(
            min(1, self.num_actors) <= low <= self.num_actors <= high and (self.num_actors > 0 or high == 0),
            f"rewards.min_actors ({low}) ≤ rewards.num_actors ({self.num_actors}) ≤ rewards.max_actors ({high}) does not "
            "hold, with at least 1 actor in a pool and none where rewards are local (num_actors = 0)",
        )

    @property
    def actor_bounds(self) -> tuple[int, int]:
        """Fewest and most actors that the pool may have."""
        low = self.num_actors if self.min_actors is None else self.min_actors
        return low, self.num_actors if self.max_actors is None else self.max_actors

    @property
    def fixed_gpus_per_actor(self) -> float:
        """gpus_per_actor as a number; ConfigError while it is still to be decided."""
        return fixed(self.gpus_per_actor, "rewards.gpus_per_actor")

    @property
    def fixed_decode_chunk_size(self) -> int:
        """decode_chunk_size as a number; ConfigError while it is still to be decided."""
        return fixed(self.decode_chunk_size, "rewards.decode_chunk_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """The workers, and how DeepSpeed shards over them."""

    num_workers: Annotated[int | Auto, at_least(1)] = 1
    """Ray Train workers. Each is one DeepSpeed rank with one GPU (or cpus_per_worker CPUs). 'auto': as many as fit
    the cluster beside the reward pool, but at most one for each group of the global batch."""
    use_gpu: bool = False
    """A GPU for each worker. False trains on the CPU with gloo."""
    gpus_per_worker: float | Auto = 1.0
    """With use_gpu: the share of its GPU that Ray reserves for a worker, above 0.5 because a card can hold one worker only.
    The rest of each card is for reward actors and asynchronous evaluation. A reservation limits neither memory nor
    speed. 'auto': the whole card, or what is left beside small shares for those two."""
    cpus_per_worker: Annotated[float, above(0)] = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: Annotated[int | None, at_least(1)] = None
    """torch threads of a worker on the CPU. None: cpus_per_worker, rounded up."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 1 suits LoRA; 2 and 3 are for full fine-tuning and backbones that do not fit."""
    zero3_persistence_threshold: Annotated[int, at_least(0)] = 100_000
    """ZeRO-3 keeps parameters of at most this many elements whole on every worker (usually all of LoRA's), which
    saves gathers. 0 shards every parameter: least memory, slowest."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What DeepSpeed keeps in CPU memory. 'optimizer': the moments, and the update runs there too (ZeRO 1 to 3).
    'optimizer_and_parameters': the parameter shards as well (ZeRO-3). Slower, but frees GPU memory."""
    precision: Precision = "fp32"
    """Precision of the frozen backbone. Latents, KL, cotangents and trainable parameters are always float32.
    'fp32' is exact float32; 'tf32' is float32 with a GPU's faster, coarser products. 'bf16' and 'fp16' take half the
    memory, and the denoiser's last norm and convolution stay float32. Rounding counts as KL: each run measures how much
    (kl_noise_floor) and prints it. fp16 rounds 8 times finer than bf16, and its cotangents are scaled."""
    gradient_checkpointing: bool | Auto = False
    """Recompute activations in the backward pass: less memory, about one more forward per step. 'auto': on where
    the planner's model says that the larger micro-batch, which then fits, makes the update faster."""
    compile: bool = False
    """Compile the denoiser's repeated blocks (torch.compile, each batch size for itself), which takes minutes at the start of a
    run. Worth trying on a GPU, where its gain has not been measured; on one CPU core, a step of the built-in example's
    denoiser took 0.91 to 1.02 of the time. Policy and reference, equal bit for bit otherwise, then differ at the start by
    rounding; the run measures how much."""
    max_failures: Annotated[int, at_least(0)] = 3
    """How many times the run restarts from its last checkpoint after it has lost a worker, before it gives up."""
    min_workers: int | None = None
    """Elastic training: when nodes are lost, go on with fewer workers, at least this many; when nodes return, grow
    back to num_workers. The global batch and its samples stay the same. None: always num_workers."""
    resize_check_s: Annotated[float, at_least(0)] = 60.0
    """Elastic training: seconds between two checks whether the group can grow. When it grows, it goes back to the
    last checkpoint."""
    placement_timeout_s: Annotated[float, above(0)] = 1800.0
    """End the run (you can resume it) when workers or reward actors have waited for machines for this long, so that
    you do not pay for machines that arrived while others are still missing."""

    def __post_init__(self) -> None:
        check_fields(self, "scaling")
        share = 1.0 if isinstance(self.gpus_per_worker, str) else self.gpus_per_worker
        require(
            0.5 < share <= 1 or (0 < share <= 0.5 and self.num_workers == 1),
            f"scaling.gpus_per_worker is {self.gpus_per_worker} with scaling.num_workers {self.num_workers}; expected a "
            "share above 0.5 and at most 1 (two workers cannot have one card: NCCL refuses that), or above 0 for one worker",
        )
        most = math.inf if self.num_workers == "auto" else self.num_workers
        require(
            self.min_workers is None or 1 <= self.min_workers <= most,
            f"scaling.min_workers is {self.min_workers}; expected 1 to scaling.num_workers ({self.num_workers})",
        )
        require(
            self.offload == "none" or self.zero_stage >= 1,
            f"scaling.offload is {self.offload!r}, which needs ZeRO; got scaling.zero_stage {self.zero_stage}: set it to "
            "1, 2 or 3",
        )
        require(
            not self.compile or self.zero_stage < 3,
            "scaling.compile is true with scaling.zero_stage 3, whose gathering of parameters cannot be compiled; give "
            "zero_stage 0, 1 or 2, or leave scaling.compile out",
        )
        require(
            self.offload != "optimizer_and_parameters" or self.zero_stage == 3,
            f"scaling.offload 'optimizer_and_parameters' needs scaling.zero_stage 3; got {self.zero_stage}",
        )

    @property
    def num_threads(self) -> int:
        """torch threads of a worker on the CPU."""
        return self.threads_per_worker or max(1, math.ceil(self.cpus_per_worker))

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for a worker: CPUs, and (a share of) a GPU where it has one."""
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": self.fixed_gpus_per_worker} if self.use_gpu else {})

    @property
    def fixed_num_workers(self) -> int:
        """num_workers as a number; ConfigError while it is still to be decided."""
        return fixed(self.num_workers, "scaling.num_workers")

    @property
    def fixed_gpus_per_worker(self) -> float:
        """gpus_per_worker as a number; ConfigError while it is still to be decided."""
        return fixed(self.gpus_per_worker, "scaling.gpus_per_worker")

    @property
    def fixed_gradient_checkpointing(self) -> bool:
        """gradient_checkpointing as a bool; ConfigError while it is still to be decided."""
        return fixed(self.gradient_checkpointing, "scaling.gradient_checkpointing")
