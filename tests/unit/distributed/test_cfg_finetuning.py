"""An update of CFG fine-tuning: shared by ranks, on a real policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from ctrl_ray.baselines.labelled import LabelledLatents
from ctrl_ray.config import ControlConfig, SamplerConfig, TrainConfig
from ctrl_ray.diffusion.steps import ModelOutput, gaussian_log_prob
from ctrl_ray.distributed import cfg_finetuning
from ctrl_ray.distributed.cfg_finetuning import CFGFineTuning
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.update import CTRL
from ctrl_ray.errors import DataError, NonFiniteError
from ctrl_ray.evaluation.metric_names import check_names
from ctrl_ray.gradients.rollout import policy_step, rollout
from ctrl_ray.offline.images import to_png
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.configs import tiny_run
from tests.learners import PROMPTS, SGDEngine, learner_on, small_config

CPU = torch.device("cpu")


class _Accumulating(SGDEngine):
    """Keeps the gradient instead of using it, and what it was asked."""

    def __init__(self, policy: ControlledPolicy) -> None:
        super().__init__(policy)
        self.labels: list[Tensor] = []

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        self.labels.append(inputs.labels)
        return super().__call__(latents, time, inputs, reference=reference)

    def step(self, update: int) -> float:
        return 0.0


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Six images an update; guidance and a scale of the label, which are for sampling alone."""
    base = small_config(tiny_pipeline, tmp_path_factory.mktemp("cfg") / "classifier")
    return dataclasses.replace(
        base,
        training_method="cfg",
        data="shapes",
        control_dropout=0.3,
        sampler=SamplerConfig(num_steps=2, guidance_scale=2.0, control_scale=3.0),
    )


def _images(config: TrainConfig) -> LabelledLatents:
    generator = torch.Generator().manual_seed(0)
    return LabelledLatents(
        latents=torch.randn(20, 4, 4, 4, generator=generator),
        prompts=tuple(PROMPTS[i % 2] for i in range(20)),
        labels=torch.arange(20)[:, None] % 4,
        split=torch.zeros(20, dtype=torch.int8),
        controls=config.controls,
    )


def _gradient(learner: Learner) -> Tensor:
    parameters = learner.engine.policy.trainable_parameters().values()  # type: ignore[attr-defined]
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def _update(config: TrainConfig, num_ranks: int) -> tuple[Tensor, float]:
    """Mean over ranks, as the engine takes it, of an update's gradient, and the sum of their parts of the loss."""
    learner, loss = learner_on(config, CPU, pool=False, make_engine=_Accumulating), 0.0
    for rank in range(num_ranks):
        own = dataclasses.replace(learner, rank=Rank(rank, num_ranks, CPU))
        row = CFGFineTuning(_images(config)).update(own, 3)
        check_names(row)
        loss += row["denoising_loss"]
    return _gradient(learner) / num_ranks, loss


@pytest.mark.parametrize(("micro_batch_size", "num_ranks"), [(6, 2), (2, 4), (4, 1)])
def test_shares_have_the_same_gradient(config: TrainConfig, micro_batch_size: int, num_ranks: int) -> None:
    """Six images on one rank, two, and four, of which two are padded; in one micro-batch and in several."""
    whole, loss = _update(dataclasses.replace(config, micro_batch_size_per_worker=6), 1)
    parts, sum_of_losses = _update(dataclasses.replace(config, micro_batch_size_per_worker=micro_batch_size), num_ranks)
    assert float(whole.norm()) > 0 and (parts - whole).norm() < 1e-4 * whole.norm()
    assert sum_of_losses == pytest.approx(loss, rel=1e-5)


def test_null_labels_train_no_embedding_and_a_class_its_own_row(config: TrainConfig) -> None:
    """All rows of the table that were not asked for stay without a gradient, the null row always; LoRA has one of all images.
    Controls that the images do not know are null."""
    kept = {**config.controls, "kept": ControlConfig(classes=("a", "b", "c"))}
    policy = build_policy(config, kept)
    learner = learner_on(config, CPU, pool=False, make_engine=_Accumulating)
    engine = _Accumulating(policy)
    learner = dataclasses.replace(learner, engine=engine, controls=kept)  # type: ignore[arg-type]
    CFGFineTuning(_images(config)).update(learner, 0)
    labels = torch.cat(engine.labels)
    assert labels.shape == (6, 2) and set(labels[:, 1].tolist()) == {3}
    asked = set(labels[:, 0].tolist())
    assert 4 in asked and len(asked) < 5, "a draw with a null label, and without one of the classes"
    gradients = policy.controls.table("jpeg_size").weight.grad
    assert gradients is not None
    assert {row for row in range(5) if float(gradients[row].abs().sum()) > 0} == asked - {4}
    assert float(policy.controls.table("kept").weight.grad.abs().sum()) == 0  # type: ignore[union-attr]
    assert any(
        float(p.grad.abs().sum()) > 0 for n, p in policy.named_parameters() if "lora_B" in n and p.grad is not None
    )


def test_it_learns_the_images(config: TrainConfig) -> None:
    """With one image, one class and no dropout, the loss of the same noises falls."""
    one = dataclasses.replace(_images(config), latents=_images(config).latents[:1], labels=torch.zeros(1, 1).long())
    learner = learner_on(dataclasses.replace(config, control_dropout=0.0), CPU, pool=False)
    method = CFGFineTuning(one)
    losses = [method.update(learner, 0)["denoising_loss"] for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0]


def test_the_data_set_is_read_once_at_the_first_update(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images of stage 1, with the labels of the run's controls; rank 0 says how many."""
    control = dataclasses.replace(
        config.controls["jpeg_size"], thresholds=tiny_run(Path(config.base_model)).controls["jpeg_size"].thresholds
    )
    data = dataclasses.replace(config, num_drawn_images=40, controls={"jpeg_size": control})
    reads: list[LabelledLatents] = []

    def counted(*args: object, **kwargs: object) -> LabelledLatents:
        reads.append(read(*args, **kwargs))  # type: ignore[arg-type]
        return reads[-1]

    read = cfg_finetuning.read_labelled
    monkeypatch.setattr(cfg_finetuning, "read_labelled", counted)
    learner, method = learner_on(data, CPU, pool=False), make_method(data)
    assert method.needs_cotangent is False
    rows = [method.update(learner, update) for update in range(2)]
    (images,) = reads
    assert len(images) == 40 and rows[0]["denoising_loss"] != rows[1]["denoising_loss"]
    assert capsys.readouterr().out == "40 labelled images encoded\n"


@pytest.mark.parametrize("index", [0, 1])
def test_bad_rows_of_the_data_set_are_an_error_or_set_aside(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """As for stage 1; beside the data set the first rank alone writes which they are."""
    images = [to_png(Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8))) for number in range(6)]
    rows = [{"image": png, "stars": number % 2} for number, png in enumerate([*images, b"no image"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    control = ControlConfig(classes=("1", "2"))
    data = dataclasses.replace(config, data=str(tmp_path / "data.parquet"), controls={"stars": control})
    learner: Any = SimpleNamespace(config=data, rank=Rank(index, 2, CPU))
    strict, lenient = (CFGFineTuning(on_bad_row=on_bad_row) for on_bad_row in ("error", "skip"))
    with pytest.raises(DataError, match="row 6"):
        strict._loaded(learner)
    found, _ = lenient._loaded(learner)
    assert len(found) == 6
    assert (tmp_path / "data.parquet.bad_rows.jsonl").is_file() == (index == 0)


def test_a_loss_that_is_no_number_stops_before_the_update(config: TrainConfig) -> None:
    images = _images(config)
    broken = dataclasses.replace(images, latents=images.latents * float("inf"))
    learner = learner_on(config, CPU, pool=False)
    with pytest.raises(
        NonFiniteError, match="update 5, micro-batch 0 on rank 0: the denoising loss is not finite; lower"
    ):
        CFGFineTuning(broken).update(learner, 5)


def test_the_config_names_the_method(config: TrainConfig) -> None:
    assert isinstance(make_method(config), CFGFineTuning)
    assert isinstance(make_method(dataclasses.replace(config, training_method="ctrl")), CTRL)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_paths_have_the_density_of_the_guided_sampler(config: TrainConfig, guidance_scale: float) -> None:
    """log policy / pre-trained of a path with a scale of the label: the pre-trained model is the one without any label or
    scale of it, so that the certificate compares with the same target as CTRL's."""
    sampler = dataclasses.replace(config.sampler, guidance_scale=guidance_scale)
    learner = learner_on(dataclasses.replace(config, sampler=sampler), CPU, pool=False)
    policy, kernel = learner.engine.policy, learner.kernel  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.trainable_parameters().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    policy.controls.table("jpeg_size").weight.data[-1] = 0
    batch = learner.evaluation_batch(range(4))
    path = learner.roll_out(batch, 0, 0, with_kl=True)
    plain = dataclasses.replace(
        path.inputs,
        labels=policy.controls.null(4),
        guidance=dataclasses.replace(learner.guidance, control_scale=None),
    )
    expected = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for k in range(kernel.num_steps):
            ours = policy_step(policy, kernel, k, path.latents[k], path.inputs, reference=False)
            theirs = policy_step(policy, kernel, k, path.latents[k], plain, reference=True)
            after = path.latents[k + 1]
            expected += (gaussian_log_prob(ours, after) - gaussian_log_prob(theirs, after)).double()
    assert path.log_ratio is not None and float(expected.abs().min()) > 0.05
    torch.testing.assert_close(path.log_ratio, expected, atol=5e-3, rtol=1e-3)
    assert (
        rollout(policy, kernel, path.inputs, lambda k: path.latents[0], reference=True, with_kl=True).kl_per_step.sum()
        == 0
    )
