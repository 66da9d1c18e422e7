"""The planner's arithmetic, by hand; counting without weights; what fits; the number of workers by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.utils.flop_counter import FlopCounterMode

from ctrl_ray.cluster.resources import ClusterFacts, NodeFacts, cluster_facts
from ctrl_ray.comparison.estimate import STABLE_DIFFUSION
from ctrl_ray.config import (
    AdapterConfig,
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.config.json import to_json, train_config_from_json
from ctrl_ray.diffusion.steps import NO_GUIDANCE, Guidance, step_kl
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.rollout import policy_step, rollout
from ctrl_ray.planning.cost import AWS_MACHINES, GPU_UTILISATION, work_of
from ctrl_ray.planning.counts import PolicyCounter, PolicyCounts, StepBytes, StepFlops, _inputs
from ctrl_ray.planning.decoder_counts import DecoderCounts, count_decoder
from ctrl_ray.planning.deepspeed_config import deepspeed_config
from ctrl_ray.planning.fits import GPU_CONTEXT_BYTES, PROCESS_BYTES, memory_fit, remedies
from ctrl_ray.planning.live_bytes import LiveBytes
from ctrl_ray.planning.plan import (
    CallPlan,
    RunPlan,
    call_plan,
    make_plan,
    memory_plan,
    num_branches,
    traffic_plan,
    zero_options,
)
from ctrl_ray.planning.planner import Planner
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.text import text_elements
from ctrl_ray.policy.build import build_policy
from ctrl_ray.rewards.pool import num_dispatchers
from ctrl_ray.runs.folder import RunFolder
from ctrl_ray.train import parse

GIB = 2**30
COUNTS = PolicyCounts(
    trainable_elements=1000,
    table_elements=100,
    largest_trainable=300,
    trainable_tensors=5,
    trainable_bytes=4000,
    frozen_elements=9000,
    frozen_bytes=36000,
    reference_bytes=0,
    unpartitioned_bytes=4000,
    largest_bytes=8000,
    latent_elements=16,
    prompt_bytes=100,
    encoder_bytes=700,
    decoder=DecoderCounts(weights=900, with_gradient=300, without_gradient=200, operations=1e9),
)
EVALUATION = 7000
STEP = StepBytes(policy_kept=50_000, reference_kept=40_000, backward_peak=120_000, rollout_peak=20_000)
CONTROLS = {"size": ControlConfig(classes=("a", "b", "c"))}


def _config(**changes: object) -> TrainConfig:
    config = TrainConfig(
        controls=CONTROLS,
        global_batch_size=16,
        micro_batch_size_per_worker=2,
        sampler=SamplerConfig(num_steps=10, reference_steps=1),
        evaluation=EvaluationConfig(batch_size=4),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _scaled(stage: int, workers: int, **more: object) -> TrainConfig:
    return _config(scaling=ScalingConfig(num_workers=workers, zero_stage=stage, **more))  # type: ignore[arg-type]


def test_zero_shards_what_it_says() -> None:
    """Rows of four workers, by hand: P = 4000 bytes trained, 36 000 frozen."""
    rows = {}
    for stage in (0, 1, 2, 3):
        plan = memory_plan(_scaled(stage, 4), COUNTS, STEP, EVALUATION)
        rows[stage] = (plan.trainable_weights, plan.master_weights, plan.gradients, plan.optimizer)
        assert (plan.prompt_encoder, plan.encoding_peak) == (100, 700)  # of the empty prompt; the encoder is gone
        # two micro-batches, T + 1 latents and T means, 2 samples of 16 floats
        assert plan.latents == 2 * (11 + 10) * 2 * 16 * 4
        assert plan.activations == 120_000
        assert stage == 3 or plan.communication == (4000 if stage else 0)  # a bucket of what is trained
        assert plan.peak == max(plan.backward_peak, plan.rollout_peak, plan.update_peak, plan.evaluation_peak)
    without, kept = (memory_plan(_scaled(0, 4), COUNTS, STEP, EVALUATION, with_encoder=has) for has in (False, True))
    assert kept.prompt_encoder == 700 + 100 and kept.resident == without.resident + 700
    assert rows[0] == (4000, 0, 4000, 8000)
    assert rows[1] == (4000, 1000, 4000, 2000)
    assert rows[2] == (4000, 1000, 2000, 2000)
    # a tenth of the weights is below the persistence threshold and stays whole
    assert rows[3] == (400 + 900, 1000, 1000, 2000)
    assert memory_plan(_scaled(3, 4), COUNTS, STEP, EVALUATION).frozen_weights == 3600 + 32400 // 4


def test_one_micro_batch_has_nothing_in_flight_and_local_rewards_bring_the_decoder() -> None:
    """Latents once; the VAE in the worker, with a chunk of two images, the micro-batch, while it scores."""
    config = _config(global_batch_size=2, rewards=RewardPoolConfig(num_actors=0), scaling=ScalingConfig(zero_stage=0))
    plan = memory_plan(config, COUNTS, STEP, EVALUATION)
    trajectory = (11 + 10) * 2 * 16 * 4
    assert plan.latents == trajectory
    assert plan.reward_model == 900
    always = 36_000 + 4000 + 100 + 900 + 8000 + 4000  # weights, the empty prompt, VAE, moments, gradients
    assert plan.scoring_peak == always + trajectory + 2 * 100 + 2 * 300


def test_kept_graphs_are_there_from_the_rollout_on() -> None:
    """Nine steps' graphs of the micro-batch that goes back, and of the one that is scored meanwhile."""
    config, kept = _scaled(0, 1), dataclasses.replace(STEP, graph_kept=50_000)
    plain, keeping = (memory_plan(config, COUNTS, step, EVALUATION) for step in (STEP, kept))
    assert keeping.activations == 120_000 + 8 * 50_000 + 9 * 50_000
    assert keeping.rollout_peak == plain.rollout_peak + 8 * 50_000 + 9 * 50_000
    alone = dataclasses.replace(config, global_batch_size=2)
    assert memory_plan(alone, COUNTS, kept, EVALUATION).activations == 120_000 + 8 * 50_000


@pytest.mark.full
def test_a_kept_graph_is_counted_as_it_is(tiny_pipeline: Path) -> None:
    """Label gains, policy and reference in one forward: against real ones, of which all three steps' are alive at once."""
    config = _config(
        base_model=str(tiny_pipeline),
        adapter=AdapterConfig(kind="gains"),
        estimator=EstimatorConfig(keep_graphs=True),
        sampler=SamplerConfig(num_steps=3),
    )
    kernel = load_backbone(str(tiny_pipeline)).make_kernel(config.sampler)
    counted = PolicyCounter(config, CONTROLS).step(4)
    policy = build_policy(config, CONTROLS)
    with LiveBytes() as live:
        latents, inputs = _inputs(policy, 4, Guidance.of(config.sampler))
        for parameter in policy.parameters():
            live.add(parameter)
        noise = torch.zeros(4, *policy.latent_shape)
        start = live.restart_peak()
        trajectory = rollout(policy, kernel, inputs, lambda k: latents if k == 0 else noise, with_graphs=True)
        assert len(trajectory.graphs) == 3
        assert 3 * counted.graph_kept == pytest.approx(live.bytes - start, rel=0.03)
    assert counted.backward_peak > counted.graph_kept == counted.policy_kept + counted.reference_kept
    flops, computed_again = (
        PolicyCounter(dataclasses.replace(config, estimator=EstimatorConfig(keep_graphs=keep)), CONTROLS).flops(4)
        for keep in (True, False)
    )
    assert flops.forward == computed_again.forward
    assert flops.backward == pytest.approx(computed_again.backward, rel=0.2)  # null rows have LoRA too


def test_labelled_images_have_no_trajectory_and_ask_nobody() -> None:
    """CFG fine-tuning: a forward and a backward without guidance for each micro-batch, three latents of it, no requests."""
    config = dataclasses.replace(
        _config(training_method="cfg", data="shapes"), sampler=SamplerConfig(num_steps=10, control_scale=2.0)
    )
    calls = call_plan(config, load_backbone("shapes").make_kernel(config.sampler))
    assert calls == CallPlan(forwards=8, backwards=8, parameter_backwards=8) and num_branches(config) == 1
    traffic = traffic_plan(config, COUNTS, calls)
    assert (traffic.reward_requests, traffic.reward_answers) == (0, 0)
    plan = memory_plan(config, COUNTS, STEP, EVALUATION)
    assert (plan.latents, plan.requests, plan.activations) == (3 * 2 * 16 * 4, 2 * 100, 120_000)
    assert (plan.rollout_peak, plan.scoring_peak) == (0, 0)
    alone = dataclasses.replace(config, rewards=RewardPoolConfig(num_actors=0))
    assert memory_plan(alone, COUNTS, STEP, EVALUATION).scoring_peak == 0
    flops = StepFlops(forward=100.0, backward=150.0)
    work = work_of(config, make_plan(config, COUNTS, STEP, EVALUATION, load_backbone("shapes").make_kernel(config.sampler)),
                   flops, COUNTS.decoder)  # fmt: skip
    assert (work.update_flops, work.scoring_flops) == (8 * 250, 0)
    one_scale = dataclasses.replace(config, sampler=SamplerConfig(num_steps=10))
    plain = work_of(one_scale, make_plan(config, COUNTS, STEP, EVALUATION, load_backbone("shapes").make_kernel(config.sampler)),
                    flops, COUNTS.decoder)  # fmt: skip
    assert work.evaluation_flops == 2 * plain.evaluation_flops, "evaluations have the branch without the label too"


def test_a_denoising_loss_is_counted_as_it_is(tiny_pipeline: Path) -> None:
    """What its forward leaves alive, against a real one; its operations are those of CTRL's forward, and of a backward."""
    config = dataclasses.replace(_tiny_config(tiny_pipeline), training_method="cfg")
    counter = PolicyCounter(config, config.controls)
    counted, flops = counter.step(4), counter.flops(4)
    policy = build_policy(config)
    with LiveBytes() as live:
        for parameter in policy.parameters():
            live.add(parameter)
        latents, inputs = _inputs(policy, 4, NO_GUIDANCE)
        start = live.restart_peak()
        output = policy(latents, torch.zeros(4, dtype=torch.long), inputs, reference=False)
        assert counted.policy_kept == pytest.approx(live.bytes - start, rel=0.03)
    assert output.prediction.shape == latents.shape
    assert counted.backward_peak > counted.policy_kept and counted.rollout_peak == counted.graph_kept == 0
    of_ctrl = PolicyCounter(_tiny_config(tiny_pipeline), config.controls).flops(4)
    assert flops.forward == of_ctrl.forward
    assert flops.backward == pytest.approx(of_ctrl.backward, rel=0.4)  # the reference has no LoRA, latents no gradient


def test_an_evaluation_is_counted_at_its_own_batch() -> None:
    """Four samples: noise, latents and their stack, prompts, one step; or their images, where decoding takes more."""
    config, trajectory = _scaled(0, 1), 11 * 4 * 16 * 4
    plan = memory_plan(config, COUNTS, STEP, EVALUATION)
    always = 36_000 + 4000 + 100 + 8000 + 4000
    assert plan.evaluation_peak == always + 4 * 100 + 3 * trajectory + EVALUATION
    assert plan.scoring_peak == 0
    local = dataclasses.replace(config, rewards=RewardPoolConfig(num_actors=0))
    heavy = dataclasses.replace(COUNTS, decoder=dataclasses.replace(COUNTS.decoder, without_gradient=10**6))
    assert (
        memory_plan(local, heavy, STEP, EVALUATION).evaluation_peak == always + 900 + 4 * 100 + trajectory + 4 * 10**6
    )
    # beside training it is another process's: what is left are the samples before and after, without an optimizer
    beside = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, asynchronous=True))
    alone = 36_000 + 4000 + 100 + 4 * 100 + 3 * trajectory + EVALUATION
    assert memory_plan(beside, COUNTS, STEP, EVALUATION).evaluation_peak == alone


@pytest.mark.full
def test_a_step_of_an_evaluation_is_counted_as_it_is(tiny_pipeline: Path) -> None:
    """At its own batch, against a real one under the same watch: policy, reference and KL."""
    config = _config(base_model=str(tiny_pipeline))
    kernel = load_backbone(str(tiny_pipeline)).make_kernel(config.sampler)
    counted = PolicyCounter(config, CONTROLS).evaluation(4)
    policy = build_policy(config, CONTROLS)
    with torch.no_grad(), LiveBytes() as live:
        latents, inputs = _inputs(policy, 4, Guidance.of(config.sampler))
        for parameter in policy.parameters():
            live.add(parameter)
        start = live.restart_peak()
        steps = (policy_step(policy, kernel, 0, latents, inputs, reference=reference) for reference in (False, True))
        step_kl(*steps, config.latent_reduction)
    assert counted == pytest.approx(live.peak - start, rel=0.01)


@pytest.mark.full
def test_the_planner_counts_an_evaluation_at_its_batch(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def count(counter: PolicyCounter, batch: int) -> int:
        counted.append(batch)
        return EVALUATION

    monkeypatch.setattr(PolicyCounter, "step", lambda counter, batch: STEP)
    monkeypatch.setattr(PolicyCounter, "evaluation", count)
    config = _config(base_model=str(tiny_pipeline))
    planner = Planner(CONTROLS, load_backbone(str(tiny_pipeline)).make_kernel(config.sampler))
    assert planner.plan(config) == planner.estimate(config)
    assert counted == [4, 4]


def test_a_reward_actor_holds_its_decoder_and_a_chunk() -> None:
    """900 bytes, and 300 for each image of a chunk, which a request of two samples does not fill."""
    kernel = load_backbone("shapes").make_kernel(SamplerConfig(num_steps=10, reference_steps=1))
    for chunk, images in ((1, 1), (2, 2), (32, 2)):
        config = _config(rewards=RewardPoolConfig(decode_chunk_size=chunk))
        assert make_plan(config, COUNTS, STEP, EVALUATION, kernel).actor_bytes == 900 + images * 300


def test_calls_are_those_of_the_sweep() -> None:
    """Nine controlled steps and one of the reference's, on 2 of 16 samples at a time, alone and on four workers."""
    kernel = load_backbone("shapes").make_kernel(SamplerConfig(num_steps=10, reference_steps=1))
    full = call_plan(_config(), kernel)
    assert full == CallPlan(forwards=8 * (10 + 9 * 2 + 1), backwards=8 * (9 * 2 + 1), parameter_backwards=8 * 9)
    shared = call_plan(_scaled(1, 4), kernel)
    assert shared.forwards == full.forwards / 4
    last = call_plan(_config(estimator=EstimatorConfig(name="last_k", steps=3)), kernel)
    assert last == CallPlan(forwards=8 * (10 + 2 * 2 + 1), backwards=8 * (2 * 2 + 1), parameter_backwards=8 * 2)
    score = call_plan(_config(estimator=EstimatorConfig(name="reinforce"), group_size=2), kernel)
    assert score == CallPlan(forwards=8 * (10 + 9 * 2), backwards=8 * 9, parameter_backwards=8 * 9)


def test_traffic_of_ring_collectives() -> None:
    """Four workers, P = 4000 bytes: 2 · 3/4 · P for an all-reduce, 3/4 · P for a gather; one reduction a backward."""
    calls = CallPlan(forwards=29, backwards=19, parameter_backwards=9)
    by_stage = {stage: traffic_plan(_scaled(stage, 4), COUNTS, calls) for stage in (0, 1, 2, 3)}
    assert (by_stage[0].reduction, by_stage[0].gather) == (6000, 0)
    assert (by_stage[1].reduction, by_stage[1].gather) == (6000, 3000)
    assert (by_stage[2].reduction, by_stage[2].gather, by_stage[2].num_reductions) == (54_000, 3000, 9)
    assert by_stage[3].reduction == 9 * 3000
    assert by_stage[3].gather == (29 + 19) * 36_000 * 3 // 4
    assert by_stage[1].reward_answers == 4 * (16 * 4 + 4)
    alone = traffic_plan(_scaled(2, 1), COUNTS, calls)
    assert (alone.reduction, alone.gather) == (0, 0)
    assert traffic_plan(_config(rewards=RewardPoolConfig(num_actors=0)), COUNTS, calls).reward_requests == 0


def test_many_workers_on_paper() -> None:
    """The table in `plan`'s docstring: sent bytes by the planner; requests, dispatchers and cards by the times of one H100."""
    elements, size = 3_200_000, 8
    counts = dataclasses.replace(
        COUNTS,
        trainable_elements=elements,
        trainable_bytes=4 * elements,
        latent_elements=4 * 64 * 64,
    )
    h100 = next(machine for machine in AWS_MACHINES if machine.gpu == "H100")
    denoiser = GPU_UTILISATION * h100.flops("bf16")
    forward, backward = (2 * size * flops / denoiser for flops in (STABLE_DIFFUSION.forward, STABLE_DIFFUSION.backward))
    score = 2 * size * STABLE_DIFFUSION.decode / (GPU_UTILISATION * h100.flops("tf32"))
    rows = []
    for workers in (256, 1024):
        rewards = RewardPoolConfig(num_actors=24)
        config = _config(
            global_batch_size=2 * size * workers,
            micro_batch_size_per_worker=size,
            sampler=SamplerConfig(num_steps=50, reference_steps=1, guidance_scale=7.5),
            scaling=ScalingConfig(num_workers=workers, zero_stage=1, use_gpu=True),
            rewards=rewards,
        )
        calls = call_plan(config, load_backbone("shapes").make_kernel(config.sampler))
        update_s = calls.forwards * forward + calls.backwards * backward
        assert update_s == pytest.approx(37, abs=0.5)
        traffic = traffic_plan(config, counts, calls)
        assert traffic.num_reductions == 1
        sent = (traffic.reduction, traffic.gather, traffic.reward_requests, traffic.reward_answers)
        rows.append(
            [
                *(round(value / 1e6, 2 if value < 2e6 else 1) for value in sent),
                round(2 * workers / update_s),
                num_dispatchers(rewards, workers),
                round(2 * workers * score / update_s),
            ]
        )
    assert rows == [[25.5, 12.8, 1.05, 1.05, 14, 2, 6], [25.6, 12.8, 1.05, 1.05, 55, 8, 24]]


def test_live_bytes_follow_storages() -> None:
    """Views count once, what autograd keeps counts, what is freed does not."""
    with LiveBytes() as live:
        x = torch.zeros(1000, requires_grad=True)
        y = x.exp()  # kept for the backward
        z = y[:10].view(2, 5)
        assert live.bytes == 8000
        del z
        loss = y.sum()
        del y
        assert live.bytes == 8004  # exp's result lives on in the graph
        loss.backward()
        del loss
        assert x.grad is not None and live.bytes == 8000
        assert live.peak >= 12_004


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp32", {"full_finetune": True}),
        pytest.param("bf16", {}, marks=pytest.mark.full),
        pytest.param("fp16", {}, marks=pytest.mark.full),
        pytest.param("fp32", {}, marks=pytest.mark.full),
        pytest.param("bf16", {"full_finetune": True}, marks=pytest.mark.full),
        pytest.param("fp32", {"lora": LoraConfig(rank=3)}, marks=pytest.mark.full),
        pytest.param("bf16", {"lora": LoraConfig(rank=3)}, marks=pytest.mark.full),
    ],
)
def test_counts_are_those_of_the_loaded_policy(tiny_pipeline: Path, precision: str, changes: dict) -> None:
    """Names, shapes and types of every parameter, without having read a weight."""
    config = _config(base_model=str(tiny_pipeline), scaling=ScalingConfig(precision=precision), **changes)  # type: ignore[arg-type]
    real, empty = build_policy(config, CONTROLS), build_policy(config, CONTROLS, empty=True)
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in empty.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())
    counts = PolicyCounter(config, CONTROLS).counts()
    assert counts.trainable_bytes == 4 * sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counts.elements == sum(p.numel() for p in real.parameters())
    assert counts.table_elements == 4 * 64


def test_a_text_encoders_elements_are_read_from_headers(tiny_pipeline: Path) -> None:
    """Against the loaded text encoder."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(tiny_pipeline, subfolder="text_encoder")
    assert text_elements(tiny_pipeline / "text_encoder") == sum(p.numel() for p in encoder.parameters())


def _stable_diffusion_config(folder: Path) -> TrainConfig:
    return _config(
        base_model=str(folder), lora=LoraConfig(rank=4), scaling=ScalingConfig(precision="bf16", use_gpu=True)
    )


@pytest.mark.full
def test_decoding_is_counted_as_it_is(tiny_pipeline: Path) -> None:
    """Against the loaded VAE under the same watch, without and with the gradient."""
    backbone = load_backbone(str(tiny_pipeline))
    counted = count_decoder(backbone)
    decoder = backbone.load_decoder(1)
    assert counted.weights == sum(4 * p.numel() for p in decoder.parameters())
    latents = torch.zeros(1, *backbone.latent_shape)
    with LiveBytes() as live:
        for parameter in decoder.parameters():
            live.add(parameter)
        start = live.restart_peak()
        with torch.no_grad():
            decoder.decode(latents)
        assert counted.without_gradient == live.peak - start
        start = live.restart_peak()
        decoder.decode(latents.requires_grad_()).sum().backward()
        assert counted.with_gradient == live.peak - start
    assert counted.with_gradient > 2 * counted.without_gradient
    with FlopCounterMode(display=False) as counter:
        decoder.decode(latents).sum().backward()
    assert counted.operations == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )  # attention, whose CPU kernel it lacks


@pytest.mark.full
def test_stable_diffusion_decodes_in_what_was_counted_elsewhere(stable_diffusion: Path) -> None:
    """Its VAE has 83.7 M parameters; an image of 512 px takes about 5.8 GiB with its gradient, and 2.5 TFLOP each way."""
    counts = count_decoder(load_backbone(str(stable_diffusion)))
    assert counts.weights == 4 * 83_653_863
    assert 5.5 * GIB < counts.with_gradient < 6 * GIB
    assert counts.operations == pytest.approx(2 * 2.5e12, rel=0.05)


@pytest.mark.full
def test_stable_diffusion_is_counted_without_its_weights(stable_diffusion: Path) -> None:
    """Public counts of its denoiser and of rank-4 LoRA."""
    counts = PolicyCounter(_stable_diffusion_config(stable_diffusion), CONTROLS).counts()
    assert counts.frozen_elements == 859_520_964
    assert counts.trainable_elements - counts.table_elements == 797_184
    float32 = (320 * 4 * 9 + 4) + 2 * 320  # the last convolution and norm
    assert counts.frozen_bytes == 2 * 859_520_964 + 2 * float32


@pytest.mark.full
def test_stable_diffusion_is_planned_without_its_weights(stable_diffusion: Path) -> None:
    """Activations of a plausible size, and less with checkpointing."""
    config = _stable_diffusion_config(stable_diffusion)
    step = PolicyCounter(config, CONTROLS).step(1)
    assert 0.5 * GIB < step.policy_kept < 6 * GIB
    checkpointed = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, gradient_checkpointing=True))
    less = PolicyCounter(checkpointed, CONTROLS).step(1)
    assert less.policy_kept < step.policy_kept / 4
    assert less.backward_peak < step.backward_peak / 2


def _plan_of(peak: int) -> RunPlan:
    step = dataclasses.replace(STEP, backward_peak=peak)
    return make_plan(
        _config(),
        COUNTS,
        step,
        EVALUATION,
        load_backbone("shapes").make_kernel(SamplerConfig(num_steps=10, reference_steps=1)),
    )


def test_fits_compares_with_the_gpu_or_with_the_node() -> None:
    """yes, no and unknown, at the border by hand."""
    plan = _plan_of(2 * GIB)
    need = plan.memory.peak
    cpu = _scaled(1, 2)

    def node(memory: int | None, **more: object) -> ClusterFacts:
        return ClusterFacts("here", (NodeFacts(8.0, more.pop("gpus", 0.0), memory, **more),))  # type: ignore[arg-type]

    enough = (2 * (need + PROCESS_BYTES) + (plan.actor_bytes + PROCESS_BYTES)) / 0.9
    assert memory_fit(plan, cpu, node(int(enough) + 2)).answer == "yes"
    short = memory_fit(plan, cpu, node(int(enough) - 1000))
    assert short.answer == "no" and "2 workers and 1 reward actor on one node" in short.reason
    small = ClusterFacts("here", tuple(NodeFacts(cpus, 0.0, need + PROCESS_BYTES) for cpus in (0.0, 1.0, 1.0)))
    assert "1 worker and 0 reward actors" in memory_fit(plan, cpu, small).reason  # the actor may be on the other node
    assert memory_fit(plan, cpu, node(None)).answer == "unknown"
    assert memory_fit(plan, cpu, None).answer == "unknown"
    gpu = _scaled(1, 2, use_gpu=True)
    card = (need + GPU_CONTEXT_BYTES) / 0.9
    assert memory_fit(plan, gpu, node(GIB, gpus=2.0, gpu_memory_bytes=int(card) + 2)).answer == "yes"
    assert memory_fit(plan, gpu, node(GIB, gpus=2.0, gpu_memory_bytes=int(card) - 1000)).answer == "no"
    assert memory_fit(plan, gpu, node(GIB, gpus=2.0)).answer == "unknown"


def test_what_shares_a_card_is_added_up() -> None:
    """Two actors of 0.2 beside a worker; cards of their own; an asynchronous evaluation beside it."""
    plan = dataclasses.replace(_plan_of(2 * GIB), actor_bytes=GIB, evaluation_bytes=GIB)
    worker, other = plan.memory.peak + GPU_CONTEXT_BYTES, GIB + GPU_CONTEXT_BYTES

    def border(config: TrainConfig, needed: int, who: str) -> None:
        for more, answer in ((2, "yes"), (-1000, "no")):
            nodes = (NodeFacts(8.0, 4.0, None, int(needed / 0.9) + more),)
            fit = memory_fit(plan, config, ClusterFacts("here", nodes))
            assert fit.answer == answer and fit.reason.startswith(who)

    pool = RewardPoolConfig(num_actors=2, gpus_per_actor=0.2)
    shared = _config(rewards=pool, scaling=ScalingConfig(num_workers=2, use_gpu=True, gpus_per_worker=0.6))
    border(shared, worker + 2 * other, "a worker and 2 reward actors on one card")
    apart = _config(rewards=pool, scaling=ScalingConfig(num_workers=2, use_gpu=True))
    border(apart, 2 * other, "2 reward actors on one card")
    border(dataclasses.replace(apart, rewards=dataclasses.replace(pool, num_actors=1)), worker, "a worker")
    many = dataclasses.replace(apart, rewards=dataclasses.replace(pool, num_actors=3, gpus_per_actor=0.3))
    border(many, 3 * other, "3 reward actors on one card")
    evaluated = dataclasses.replace(
        shared,
        rewards=RewardPoolConfig(num_actors=0),
        evaluation=EvaluationConfig(batch_size=4, asynchronous=True, num_gpus=0.3),
    )
    border(evaluated, worker + other, "a worker, with an asynchronous evaluation")


def test_remedies_name_every_setting_that_helps() -> None:
    """A stand-in plan in which each setting takes what it says."""

    def plan_of(config: TrainConfig) -> RunPlan:
        each = 1 if config.scaling.gradient_checkpointing else 8 if config.estimator.keep_graphs else 4
        training = config.fixed_micro_batch_size * each
        plan = _plan_of(training * GIB)
        memory = dataclasses.replace(plan.memory, evaluation_peak=config.evaluation.fixed_batch_size * GIB)
        return dataclasses.replace(plan, memory=memory, actor_bytes=config.rewards.fixed_decode_chunk_size * GIB)

    pool = RewardPoolConfig(num_actors=1, gpus_per_actor=0.2, decode_chunk_size=2)
    config = _config(rewards=pool, scaling=ScalingConfig(num_workers=2, use_gpu=True, gpus_per_worker=0.8))
    facts = ClusterFacts("here", (NodeFacts(8.0, 2.0, None, 9 * GIB),))
    found = {text.partition(":")[0]: text for text in remedies(config, plan_of, facts)}
    assert list(found) == [
        "scaling.gradient_checkpointing true",
        "micro_batch_size_per_worker 1",
        "rewards.num_actors 0 (each worker scores its own samples)",
        "rewards.decode_chunk_size 1",
    ]
    assert "(fits)" in found["scaling.gradient_checkpointing true"]
    more = ClusterFacts("here", (NodeFacts(8.0, 3.0, None, 8 * GIB),))  # a third card for the pool
    assert any("cards of their own" in text for text in remedies(config, plan_of, more))
    evaluating = dataclasses.replace(config, evaluation=EvaluationConfig(batch_size=16))
    assert remedies(evaluating, plan_of, facts)[0].startswith("evaluation.batch_size 8")
    keeping = [
        text.partition(":")[0]
        for text in remedies(dataclasses.replace(config, estimator=EstimatorConfig(keep_graphs=True)), plan_of, facts)
    ]
    assert "estimator.keep_graphs false" in keeping and "scaling.gradient_checkpointing true" not in keeping


@pytest.mark.full
def test_auto_is_recorded_as_asked_and_resumes(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line, config.json and a resumed run; the plan itself has a number."""
    facts = ClusterFacts("this machine", (NodeFacts(cpus=2.0, gpus=0.0, memory_bytes=24 * GIB),))
    monkeypatch.setattr("ctrl_ray.planning.preflight.cluster_facts", lambda: facts)  # others may have started Ray
    monkeypatch.setattr(PolicyCounter, "step", lambda counter, batch: STEP)  # what memory decides is not tested here
    assert parse(["--scaling.num-workers", "auto"]).config.scaling.num_workers == "auto"
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        base_model=str(tiny_pipeline),
        data="shapes",
        controls={"jpeg_size": ControlConfig(oracle="jpeg_size", thresholds=(900.0, 1000.0))},
        global_batch_size=12,
        micro_batch_size_per_worker=5,
        scaling=ScalingConfig(num_workers="auto", cpus_per_worker=0.01),
        rewards=RewardPoolConfig(cpus_per_actor=0.01),
    )
    plan = preflight(config)
    assert plan.config.scaling.num_workers == 12 and plan.config.micro_batch_size_per_worker == 1
    assert "12 workers × 1 micro-batch × 1" in plan.summary and "decided    12 workers: room for" in plan.summary
    folder = RunFolder(config.output_dir)
    folder.prepare(plan.asked, resume=False)
    stored = train_config_from_json((tmp_path / "run" / "config.json").read_text())
    assert stored.scaling.num_workers == "auto" and stored.micro_batch_size_per_worker == 5
    folder.prepare(preflight(config).asked, resume=True)
    with pytest.raises(ConfigError, match="becomes a number when a run is prepared"):
        _ = config.num_micro_batches
    assert train_config_from_json(to_json(config)) == config


@pytest.mark.full
def test_a_backward_costs_the_same_whatever_the_estimator(tiny_pipeline: Path) -> None:
    """Operations of a forward and a backward are the network's; estimators differ in how many of them they make."""
    base = _tiny_config(tiny_pipeline)
    full = PolicyCounter(base, base.controls).flops(2)
    # last_k and random_suffix go back through the policy as full does
    for name in ("sticking_the_landing", "adjoint_matching", "reinforce"):
        config = dataclasses.replace(base, estimator=EstimatorConfig(name=name), group_size=2)  # type: ignore[arg-type]
        flops = PolicyCounter(config, config.controls).flops(2)
        assert flops.forward == full.forward
        # the policy's backward has LoRA's on top, of which each estimator has another share
        assert flops.backward == pytest.approx(full.backward, rel=0.2)


def _tiny_config(tiny_pipeline: Path) -> TrainConfig:
    return TrainConfig(
        base_model=str(tiny_pipeline),
        data="shapes",
        controls={"jpeg_size": ControlConfig(oracle="jpeg_size", thresholds=(900.0, 1000.0))},
        global_batch_size=8,
        micro_batch_size_per_worker=4,
    )


def test_samplers_that_train_nothing_are_refused(tiny_pipeline: Path) -> None:
    """No noise, or only steps that are the pre-trained model's."""
    config = _tiny_config(tiny_pipeline)
    with pytest.raises(ConfigError, match="a deterministic step has no density"):
        preflight(dataclasses.replace(config, sampler=SamplerConfig(eta=0.0)))
    reference = dataclasses.replace(config.sampler, reference_steps=2)
    last = EstimatorConfig(name="last_k", steps=2)
    with pytest.raises(ConfigError, match=r"last_k trains the last 2 steps, and all of them are the pre-trained"):
        preflight(dataclasses.replace(config, sampler=reference, estimator=last))


@pytest.mark.parametrize("scaling", [ScalingConfig(zero_stage=1), ScalingConfig(zero_stage=3), ScalingConfig()])
def test_sizes_are_deepspeeds_own_where_the_run_sets_none(scaling: ScalingConfig) -> None:
    """As DeepSpeed reads the run's section."""
    config = _config(scaling=scaling)
    theirs = DeepSpeedZeroConfig(**deepspeed_config(config, 1000)["zero_optimization"])
    ours = zero_options(config, 1000)
    assert ours["reduce_bucket_size"] == theirs.reduce_bucket_size
    assert ours["stage3_max_live_parameters"] == theirs.max_live_parameters
    assert ours["stage3_param_persistence_threshold"] == theirs.param_persistence_threshold


@pytest.mark.parametrize(("cores", "cpus"), [(1, 2.0), (6, 6.0), (None, 2.0)])
def test_facts_of_this_machine(monkeypatch: pytest.MonkeyPatch, cores: int | None, cpus: float) -> None:
    """Its cores, but two at least, as a local Ray gets; its memory as the kernel tells, or less in a container."""
    monkeypatch.setattr("ctrl_ray.cluster.resources.os.cpu_count", lambda: cores)
    monkeypatch.setattr("ctrl_ray.cluster.resources.ray.is_initialized", lambda: False)  # another test's may be
    facts = cluster_facts()
    (node,) = facts.nodes
    assert (facts.where, node.cpus, node.gpus) == ("this machine", cpus, float(torch.cuda.device_count()))
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * int(known["MemTotal"].split()[0])
    limits = [Path(f"/sys/fs/cgroup/{name}") for name in ("memory.max", "memory/memory.limit_in_bytes")]
    allowed = [text for file in limits if file.is_file() and (text := file.read_text().strip()) != "max"]
    assert node.memory_bytes == min([total, *map(int, allowed)])
