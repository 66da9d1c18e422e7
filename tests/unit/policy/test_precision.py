"""Types and rounding of a denoiser in each precision."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch import Tensor, nn
from torch.nn import functional as F

from ctrl_ray import pipeline
from ctrl_ray.classifiers import worker
from ctrl_ray.classifiers.worker import FitJob
from ctrl_ray.config import LoraConfig, Precision, ScalingConfig, TrainConfig
from ctrl_ray.distributed import sampling, validation
from ctrl_ray.distributed import worker as training
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.precision import sampling_precision, set_float32_precision
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.actor import RewardActor
from ctrl_ray.rewards.spec import RewardModelSpec
from tests.policies import make_policy

RANK_2 = LoraConfig(rank=2)


@pytest.fixture
def default_float32() -> Iterator[None]:
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def _inputs(folder: Path) -> tuple[Tensor, Tensor, Inputs]:
    condition = load_backbone(str(folder)).load_encoder().encode(["a red circle", "a blue cross"])
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor(500), Inputs(condition, torch.tensor([[0], [1]]))


def test_stage_1_sets_it_before_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers sample the pipeline and fit the classifier in the run's precision."""
    chosen: list[str] = []

    def stop(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(
        worker.ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=int, get_world_size=int)
    )
    monkeypatch.setattr(worker, "set_float32_precision", chosen.append)
    monkeypatch.setattr(worker.torch, "set_num_threads", stop)
    job = FitJob(
        config=TrainConfig(scaling=ScalingConfig(precision="tf32")),
        control="size",
        image_size=(32, 32),
        folder="unused",
    )
    with pytest.raises(InterruptedError):
        worker.fit_worker(job)
    assert chosen == ["tf32"]


def _stop(*_: Any, **__: Any) -> Any:
    raise InterruptedError


def _start_of(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process of a run in TF32, until it would compute."""
    config = TrainConfig(scaling=ScalingConfig(precision="tf32"))
    unused: Any = None
    job: Any = SimpleNamespace(config=config, precision="tf32")
    if process == "a training worker":
        monkeypatch.setattr(training.ray.train, "get_context", _stop)
        training.set_up_process(config)
    elif process == "a reward actor":
        spec = RewardModelSpec(base_model="shapes", classifiers={}, precision="tf32")
        RewardActor(cloudpickle.dumps((spec, None)))
    elif process == "a sampling task":
        monkeypatch.setattr(sampling, "load_policy", _stop)
        sampling._sample_part(job, unused, "cpu")
    elif process == "an asynchronous evaluation":
        checkpoint: Any = SimpleNamespace(as_directory=_stop)
        validation.validate_checkpoint(checkpoint, job=job)
    else:
        monkeypatch.setattr(pipeline, "check_device", torch.device)
        loaded = pipeline.ControlledPipeline.__new__(pipeline.ControlledPipeline)
        loaded._precision, policy = "tf32", SimpleNamespace(to=_stop)
        loaded.policy = policy  # type: ignore[assignment]
        loaded.to("cuda")


@pytest.mark.parametrize(
    "process",
    ["a training worker", "a reward actor", "a sampling task", "an asynchronous evaluation", "a pipeline on a GPU"],
)
def test_every_process_sets_it_before_it_computes(
    process: str, monkeypatch: pytest.MonkeyPatch, default_float32: None
) -> None:
    set_float32_precision("fp32")
    with suppress(InterruptedError):
        _start_of(process, monkeypatch)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
def test_tf32_is_on_or_off_for_all_products(precision: Precision, allowed: bool, default_float32: None) -> None:
    """By torch's older and newer switches, none of which may raise."""
    set_float32_precision("tf32" if precision == "fp32" else "fp32")
    set_float32_precision(precision)
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    assert (cuda.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    assert {(p == "tf32") for p in (cuda.fp32_precision, cudnn.conv.fp32_precision)} == {allowed}


@pytest.mark.parametrize(("precision", "lora"), [("bf16", RANK_2), ("fp16", RANK_2), ("bf16", None), ("fp16", None)])
def test_the_last_norm_and_convolution_are_float32(
    tiny_pipeline: Path,
    precision: Precision,
    lora: LoraConfig | None,
    default_float32: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a frozen denoiser, of one trained under autocast, and of its reference: by hand from what reaches them."""
    policy = make_policy(tiny_pipeline, {"size": 2}, lora=lora, precision=precision)
    set_float32_precision(precision)
    conv2d = F.conv2d
    for reference in (False, True):
        unet: Any = policy.reference_denoiser if reference and lora is None else policy.denoiser
        reached: list[Tensor] = []
        modes: list[str] = []
        monkeypatch.setattr(F, "conv2d", functools.partial(_noting, modes, conv2d))
        hook = unet.conv_norm_out.register_forward_pre_hook(lambda _, args, seen=reached: seen.append(args[0]))
        with torch.no_grad():
            prediction = policy(*_inputs(tiny_pipeline), reference=reference).prediction
        hook.remove()
        [x] = reached
        assert modes[-1] == "ieee" and set(modes[:-1]) == {"tf32"}
        norm, conv = unet.conv_norm_out, unet.conv_out
        assert x.dtype in (torch.bfloat16, torch.float16)
        hidden = F.silu(F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps))
        assert torch.equal(prediction, F.conv2d(hidden, conv.weight, conv.bias, padding=conv.padding))
    assert _conv_mode() == "tf32"


def _noting(modes: list[str], conv2d: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A convolution, with the mode of float32 products that it runs in."""
    modes.append(_conv_mode())
    output: Tensor = conv2d(*args, **kwargs)
    return output


def _conv_mode() -> str:
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return str(switch.fp32_precision)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_denoisers_are_left_as_they_are(tiny_pipeline: Path, precision: Precision) -> None:
    unet: Any = make_policy(tiny_pipeline, {"size": 2}, lora=RANK_2, precision=precision).denoiser
    assert (type(unet.conv_norm_out), type(unet.conv_out)) == (nn.GroupNorm, nn.Conv2d)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


def test_lora_on_the_last_convolution(tiny_pipeline: Path) -> None:
    """peft wraps it, its own weights stay float32."""
    targets = LoraConfig(rank=2, target_modules=("conv_out", "to_q"))
    policy = make_policy(tiny_pipeline, {"size": 2}, lora=targets, precision="bf16")
    plain = make_policy(tiny_pipeline, {"size": 2}, lora=targets)
    assert plain.state_dict().keys() == policy.state_dict().keys()
    unet: Any = policy.denoiser
    assert unet.conv_out.base_layer.weight.dtype == torch.float32
    prediction = policy(*_inputs(tiny_pipeline), reference=False).prediction
    prediction.sum().backward()
    gradients = [p.grad for name, p in policy.named_parameters() if "conv_out" in name and "lora_B" in name]
    assert gradients[0] is not None and gradients[0].abs().max() > 0


@pytest.mark.full
def test_fp16_rounds_finer_than_bf16(tiny_pipeline: Path) -> None:
    """Three bits more: here at least 4 × less error of the prediction."""
    with torch.no_grad():
        exact, *rounded = (
            make_policy(tiny_pipeline, {"size": 2}, lora=RANK_2, precision=precision)(
                *_inputs(tiny_pipeline), reference=True
            ).prediction
            for precision in ("fp32", "bf16", "fp16")
        )
    errors = [float((prediction - exact).norm()) for prediction in rounded]
    assert errors[0] > 4 * errors[1] > 0


def test_an_adapter_is_sampled_in_its_own_precision_on_a_gpu_alone() -> None:
    trained = {"precision": "fp16"}
    assert sampling_precision(None, trained, "cuda:1") == "fp16"
    assert sampling_precision(None, trained, "cpu") == "fp32"
    assert sampling_precision("bf16", trained, "cpu") == "bf16"
    assert sampling_precision(None, {}, "cuda") == "fp32"
