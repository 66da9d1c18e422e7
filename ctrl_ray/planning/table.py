"""A plan as a small table for people."""

from __future__ import annotations

from ctrl_ray.cluster.resources import ClusterFacts
from ctrl_ray.config import TrainConfig
from ctrl_ray.planning.choose import open_values
from ctrl_ray.planning.fits import MemoryFit
from ctrl_ray.planning.placement import actors_on_a_card, shares_cards
from ctrl_ray.planning.plan import MemoryPlan, RunPlan, keeps_means
from ctrl_ray.wording import counted, size_text

_INDENT = " " * 13


def plan_lines(plan: RunPlan, config: TrainConfig, facts: ClusterFacts, fit: MemoryFit, fixes: list[str]) -> list[str]:
    """Memory, traffic, calls and whether it fits; `fixes` are shown where it does not."""
    scaling = config.scaling
    memory = plan.memory
    lines = [
        f"memory     of one worker (ZeRO-{scaling.zero_stage} over {scaling.fixed_num_workers}, {scaling.precision}"
        f"{', gradient checkpointing' if scaling.gradient_checkpointing else ''}, micro-batch "
        f"{config.fixed_micro_batch_size}), tensors",
        *(f"{_INDENT}{name:<34}{size_text(size):>11}{note}" for name, size, note in _rows(memory, config) if size),
        f"{_INDENT}{_backward_name(config):<34}{size_text(memory.backward_peak):>11}   "
        + (f"rollout {size_text(memory.rollout_peak)}, " if memory.rollout_peak else "")
        + f"optimizer step {size_text(memory.update_peak)}",
        f"{_INDENT}{'peak of an evaluation':<34}{size_text(memory.evaluation_peak):>11}   "
        f"{config.evaluation.fixed_batch_size} samples at a time",
        *_scoring(plan, config, facts),
    ]
    if memory.offloaded:
        lines.append(f"{_INDENT}{'in host memory (offload)':<34}{size_text(memory.offloaded):>11}")
    traffic, calls = plan.traffic, plan.calls
    times = "" if traffic.num_reductions <= 1 else f" in {traffic.num_reductions} reductions"
    lines += [
        f"calls      per worker and update: {calls.forwards:g} denoiser forwards and {calls.backwards:g} backwards of "
        "a micro-batch",
        f"traffic    a worker sends per update: gradients {size_text(traffic.reduction)}{times}, weights "
        f"{size_text(traffic.gather)}, reward requests {size_text(traffic.reward_requests)} (answers "
        f"{size_text(traffic.reward_answers)})",
        f"fits       {fit.answer}: {fit.reason}",
    ]
    if fit.answer == "no" and fixes:
        lines.append(f"           lower it by one of: {'; '.join(fixes)}")
    return lines


def decided_flags(asked: TrainConfig, config: TrainConfig) -> list[str]:
    """The flags that give a run what was decided, for machines that are not there when it is prepared."""
    decided = open_values(config)
    flags = [
        f"--{name.replace('_', '-')} {decided[name]}"
        for name, value in open_values(asked).items()
        if value == "auto" and "gpus_per" not in name  # shares of a card do not depend on the machines
    ]
    if not flags:
        return []
    return [f"flags      to start it before these machines are up (an autoscaler's): {' '.join(flags)}"]


def _backward_name(config: TrainConfig) -> str:
    return f"peak of the {'adjoint pass' if config.draws_trajectories else 'backward'} (sum)"


def _scoring(plan: RunPlan, config: TrainConfig, facts: ClusterFacts) -> list[str]:
    if config.rewards.num_actors == 0 and not config.draws_trajectories:
        return []  # a worker scores in evaluations only, which have their row
    images = min(config.rewards.fixed_decode_chunk_size, config.fixed_micro_batch_size)
    local = config.rewards.num_actors == 0
    name, size = ("peak of scoring", plan.memory.scoring_peak) if local else ("a reward actor", plan.actor_bytes)
    text = f"{_INDENT}{name:<34}{size_text(size):>11}   {images} images decoded at a time; classifiers not counted"
    if shares_cards(config):
        text += f"; at most {actors_on_a_card(config, facts.nodes)} on a worker's card"
    return [text]


def _rows(memory: MemoryPlan, config: TrainConfig) -> list[tuple[str, int, str]]:
    kept = (
        f"   kept by the policy {size_text(memory.policy_kept)}, by the reference {size_text(memory.reference_kept)}"
        if memory.activations
        else ""
    )
    steps, batches = config.sampler.num_steps + 1, min(2, config.num_micro_batches)
    stage = config.scaling.zero_stage
    means = f" and {steps - 1} means" if keeps_means(config) else ""
    path = f"{counted(batches, 'micro-batch')} × {steps} latents{means}"
    kept_latents = path if config.draws_trajectories else "clean, noise, noised"
    return [
        ("weights, frozen", memory.frozen_weights, ""),
        ("weights, frozen reference copy", memory.reference_weights, ""),
        ("weights, trainable", memory.trainable_weights, ""),
        ("prompt encoder", memory.prompt_encoder, _encoder_note(memory)),
        ("reward model (VAE)", memory.reward_model, ""),
        ("float32 master copies", memory.master_weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer moments", memory.optimizer, ""),
        (
            "communication buffers",
            memory.communication,
            "   one bucket and the parameters gathered at a time" if stage == 3 else "   one reduction bucket",
        ),
        (
            "activations of all steps" if config.estimator.fixed_keep_graphs else "activations of one step",
            memory.activations,
            kept,
        ),
        ("latents kept", memory.latents, f"   {kept_latents}"),
        ("cotangents and conditions" if config.draws_trajectories else "conditions", memory.requests, ""),
    ]


def _encoder_note(memory: MemoryPlan) -> str:
    if memory.prompt_encoder >= memory.encoding_peak:
        return ""
    return f"   what it made; it takes {size_text(memory.encoding_peak)} before anything else is there, and goes"
