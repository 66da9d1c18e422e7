"""The planner's arithmetic, by hand; counting without weights; what fits; the number of workers by itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from diffusers import UNet2DConditionModel

from ctrl_ray.cluster.resources import ClusterFacts, NodeFacts, cluster_facts
from ctrl_ray.config import (
    ControlConfig,
    EstimatorConfig,
    LoraConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.config.json import to_json, train_config_from_json
from ctrl_ray.errors import ConfigError, ResourceError
from ctrl_ray.planning.counts import LiveBytes, PolicyCounter, PolicyCounts, StepBytes, stored_elements
from ctrl_ray.planning.deepspeed_config import deepspeed_config
from ctrl_ray.planning.fits import GPU_CONTEXT_BYTES, PROCESS_BYTES, memory_fit, resolve_num_workers
from ctrl_ray.planning.plan import CallPlan, RunPlan, call_plan, make_plan, memory_plan, traffic_plan, zero_options
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
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
    decoder_bytes=900,
)
STEP = StepBytes(policy_kept=50_000, reference_kept=40_000, backward_peak=120_000, rollout_peak=20_000)
CONTROLS = {"size": ControlConfig(classes=("a", "b", "c"))}


def _config(**changes: object) -> TrainConfig:
    config = TrainConfig(
        controls=CONTROLS,
        global_batch_size=16,
        micro_batch_size_per_worker=2,
        sampler=SamplerConfig(num_steps=10, reference_steps=1),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _scaled(stage: int, workers: int, **more: object) -> TrainConfig:
    return _config(scaling=ScalingConfig(num_workers=workers, zero_stage=stage, **more))  # type: ignore[arg-type]


def test_zero_shards_what_it_says() -> None:
    """Rows of four workers, by hand: P = 4000 bytes trained, 36 000 frozen."""
    rows = {}
    for stage in (0, 1, 2, 3):
        plan = memory_plan(_scaled(stage, 4), COUNTS, STEP, num_prompts=3)
        rows[stage] = (plan.trainable_weights, plan.master_weights, plan.gradients, plan.optimizer)
        assert plan.prompt_encoder == 700 + 4 * 100
        assert plan.latents == 2 * 11 * 2 * 16 * 4  # two micro-batches, T + 1 latents, 2 samples of 16 floats
        assert plan.activations == 120_000
        assert plan.peak == max(plan.backward_peak, plan.rollout_peak, plan.update_peak)
    assert rows[0] == (4000, 0, 4000, 8000)
    assert rows[1] == (4000, 1000, 4000, 2000)
    assert rows[2] == (4000, 1000, 2000, 2000)
    # a tenth of the weights is below the persistence threshold and stays whole
    assert rows[3] == (400 + 900, 1000, 1000, 2000)
    assert memory_plan(_scaled(3, 4), COUNTS, STEP, num_prompts=3).frozen_weights == 3600 + 32400 // 4


def test_one_micro_batch_has_nothing_in_flight_and_local_rewards_bring_the_decoder() -> None:
    """Latents once; the VAE in the worker."""
    config = _config(global_batch_size=2, rewards=RewardPoolConfig(num_actors=0))
    plan = memory_plan(config, COUNTS, STEP, num_prompts=3)
    assert plan.latents == 11 * 2 * 16 * 4
    assert plan.reward_model == 900


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
        ("bf16", {}),
        ("fp16", {}),
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


def test_stored_elements_are_read_from_headers(tiny_pipeline: Path) -> None:
    """Against the loaded text encoder."""
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(tiny_pipeline, subfolder="text_encoder")
    assert stored_elements(tiny_pipeline / "text_encoder") == sum(p.numel() for p in encoder.parameters())


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """A pipeline folder with the configuration of Stable Diffusion 1.5's denoiser, and no weights."""
    folder = tmp_path_factory.mktemp("sd15")
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.save_config(folder / "unet")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((tiny_pipeline / name).read_bytes())
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({"max_position_embeddings": 77, "hidden_size": 768})
    )
    return folder


def _stable_diffusion_config(folder: Path) -> TrainConfig:
    return _config(
        base_model=str(folder), lora=LoraConfig(rank=4), scaling=ScalingConfig(precision="bf16", use_gpu=True)
    )


@pytest.mark.full
def test_stable_diffusion_is_counted_without_its_weights(stable_diffusion: Path) -> None:
    """Public counts of its denoiser and of rank-4 LoRA."""
    counts = PolicyCounter(_stable_diffusion_config(stable_diffusion), CONTROLS).counts()
    assert counts.frozen_elements == 859_520_964
    assert counts.trainable_elements - counts.table_elements == 797_184
    assert counts.frozen_bytes == 2 * 859_520_964


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
        load_backbone("shapes").make_kernel(SamplerConfig(num_steps=10, reference_steps=1)),
        num_prompts=1,
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


def _auto(nodes: list[NodeFacts], planner=lambda config: _plan_of(GIB), **changes: object):
    values: dict = {"scaling": ScalingConfig(num_workers="auto"), "micro_batch_size_per_worker": 4, **changes}
    return resolve_num_workers(_config(**values), ClusterFacts("the cluster", tuple(nodes)), planner)


def test_auto_takes_what_the_cluster_has_beside_the_pool() -> None:
    """CPUs per worker, GPUs, several nodes, and the pool's share, by hand; a number is left alone."""
    one = _auto([NodeFacts(9.0, 0.0, 64 * GIB)])
    assert (one.config.scaling.num_workers, one.config.micro_batch_size_per_worker) == (8, 2)
    assert "room for 8" in one.why and "lowered from 4 to 2" in one.why
    fewer = _auto([NodeFacts(7.0, 0.0, 64 * GIB)])
    assert fewer.config.scaling.num_workers == 4  # room for 6, but 16 divides by 4 only
    assert "4 is the most that divides global_batch_size (16)" in fewer.why
    gpus = _auto(
        [NodeFacts(8.0, 2.0, None, 80 * GIB), NodeFacts(8.0, 3.0, None, 80 * GIB)],
        scaling=ScalingConfig(num_workers="auto", use_gpu=True),
        rewards=RewardPoolConfig(num_actors=1, gpus_per_actor=1.0),
    )
    assert gpus.config.scaling.num_workers == 4
    split = _auto([NodeFacts(3.0, 0.0, 64 * GIB)] * 2, scaling=ScalingConfig(num_workers="auto", cpus_per_worker=2.0))
    assert split.config.scaling.num_workers == 2  # one a node: neither holds 2 CPUs more beside the actor
    given = _config()
    assert resolve_num_workers(given, None, lambda config: _plan_of(GIB)).config is given


def test_auto_lowers_the_micro_batch_until_it_fits() -> None:
    """A plan of 1 GiB a sample on a node that holds two samples; groups stay whole."""

    def planner(config: TrainConfig) -> RunPlan:
        return _plan_of(config.micro_batch_size_per_worker * GIB)

    nodes = [NodeFacts(2.0, 0.0, 5 * GIB)]
    chosen = _auto(nodes, planner, micro_batch_size_per_worker=8)
    assert chosen.config.micro_batch_size_per_worker == 2
    assert "lowered from 8 to 2, the largest that fits" in chosen.why
    grouped = _auto(nodes, planner, micro_batch_size_per_worker=8, group_size=4)
    assert grouped.config.micro_batch_size_per_worker == 8  # not even one group fits: as asked, and the verdict says no
    assert memory_fit(planner(grouped.config), grouped.config, ClusterFacts("the cluster", tuple(nodes))).answer == "no"


def test_auto_without_room_says_what_is_missing() -> None:
    """One CPU, which the pool takes."""
    with pytest.raises(ResourceError, match="no room for a worker of 1 CPUs beside 1 reward actors"):
        _auto([NodeFacts(1.0, 0.0, GIB)])


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
    assert "12 workers × 1 micro-batches × 1" in plan.summary and "workers    auto: this machine" in plan.summary
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
    for name in ("adjoint_matching", "reinforce"):  # last_k and random_suffix go back through the policy as full does
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
    theirs = DeepSpeedZeroConfig(**deepspeed_config(config)["zero_optimization"])
    ours = zero_options(config)
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
