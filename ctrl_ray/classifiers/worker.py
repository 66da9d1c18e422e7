"""Stage 1 on the Ray Train workers: decode once, fit by epochs, keep the best, calibrate it."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl_ray.classifiers.calibration import calibration_metrics, measure_temperature, reliability_diagram
from ctrl_ray.classifiers.classifier import ImageClassifier, new_network
from ctrl_ray.classifiers.examples import BlockWriter, Examples, SamplePipeline, read_examples
from ctrl_ray.classifiers.soundness import check_classes, class_rows, evidence
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.errors import DataError, NonFiniteError
from ctrl_ray.offline.reading import OnBadRow
from ctrl_ray.policy.precision import set_float32_precision

MIN_CALIBRATION_SAMPLES = 200
"""With at least this many pipeline samples in the temperature split, the temperature is fitted on them alone."""

_EVALUATION_BATCH = 256
_TELL_EVERY_S = 15.0
_WARM_UP = 0.25
_GRADIENT_CLIPPING = 1.0


def _say_nothing(_: object) -> None:
    """For those who do not wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitJob:
    """What a worker needs to know; it travels from the driver."""

    config: TrainConfig
    control: str
    image_size: tuple[int, int]
    folder: str | None
    """Where the decoded examples go: storage that all workers share; None: a temporary folder of the only worker."""
    sample_pipeline: SamplePipeline | None = None
    on_bad_row: OnBadRow = "error"
    equal_classes: int | None = None
    """Choose thresholds that make so many classes of equal share; None: the control's own."""
    say: Callable[[str], None] = _say_nothing
    """Sends a line of progress to the person who waits."""


class Best(NamedTuple):
    """The epoch to keep."""

    epoch: int
    nll: float
    weights: dict[str, Tensor]


def fit_worker(job: FitJob) -> None:
    """The Ray Train worker function: fits the classifier and reports it as a checkpoint."""
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_fit_") as own:
        _fit(job, Path(job.folder or own))


def _fit(job: FitJob, folder: Path) -> None:
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    set_float32_precision(job.config.scaling.precision)
    torch.set_num_threads(job.config.scaling.num_threads)
    device = ray.train.torch.get_device()
    examples, spec = _prepare(job, folder, rank, num_workers, device)
    torch.manual_seed(job.config.seed)
    settings = job.config.classifier
    named = spec.network or settings.network
    network, arguments = new_network(named, spec.num_classes, prompt_conditional=settings.prompt_conditional)
    fitter = _Fitter(job, examples, network.to(device), rank, num_workers, device)
    best = fitter.fit()
    network.load_state_dict(best.weights)
    logits, labels, rows = fitter.gather(examples.rows["temperature"])
    classifier = ImageClassifier(
        network.eval(),
        kind=named.partition(":")[0],
        arguments=arguments,
        control=job.control,
        spec=spec,
        image_size=job.image_size,
        base_model=job.config.base_model if settings.decode else "",
    )
    _report(job, classifier, best, examples, logits, labels, rows, rank)


def _prepare(
    job: FitJob, folder: Path, rank: int, num_workers: int, device: torch.device
) -> tuple[Examples, ControlConfig]:
    """Decode and label this worker's blocks, wait for the others, and open all of them; the control with its thresholds."""
    start = time.monotonic()
    writer = BlockWriter(job.config, job.control, folder, device)
    bad_rows_file = None if rank == 0 else str(folder / f"bad_rows-{rank}.jsonl")
    rows = read_examples(
        job.config, job.control, job.image_size, on_bad_row=job.on_bad_row, bad_rows_file=bad_rows_file
    )
    num_data = writer.write_data(rows, rank, num_workers, _progress(job) if rank == 0 else _say_nothing)
    num_samples = job.config.classifier.num_pipeline_samples
    if num_samples:
        assert job.sample_pipeline is not None
        writer.write_samples(job.sample_pipeline, num_samples, rank, num_workers)
    _barrier()
    examples = Examples(folder, num_data, num_samples, job.config.classifier.split, job.config.seed)
    counts = {name: len(rows) for name, rows in examples.rows.items()}
    if min(counts.values()) == 0:
        raise DataError(
            f"{len(examples)} rows, which hold {examples.num_different} different images, make splits of {counts} rows: too "
            "few to fit, to choose an epoch and to find the temperature; expected at least one row in each split (equal images "
            "lie in the same one); give more data, or other shares in classifier.split"
        )
    spec = job.config.controls[job.control]
    if job.equal_classes is not None:
        spec = examples.with_equal_shares(spec, job.equal_classes)
    shares = class_rows(examples.labels, spec.num_classes)
    check_classes(job.control, spec, shares, "images", examples.span)
    fitting = class_rows(examples.labels[examples.rows["fitting"]], spec.num_classes)
    check_classes(job.control, spec, fitting, "images to fit on", examples.span)
    if rank == 0:
        job.say(
            f"classifier of {job.control}: {len(examples)} images ready in {time.monotonic() - start:.0f} s, "
            f"{', '.join(f'{count} for {name}' for name, count in counts.items())}; rows of each class: "
            f"{', '.join(f'{name} {count}' for name, count in zip(spec.class_names, shares, strict=True))}"
        )
    return examples, spec


def _progress(job: FitJob) -> Callable[[int], None]:
    """Says every _TELL_EVERY_S seconds how many images there are."""
    last = time.monotonic()

    def told(num_images: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_EVERY_S:
            job.say(f"classifier of {job.control}: {num_images} images decoded and labelled")
            last = time.monotonic()

    return told


def tells_epoch(epoch: int, epochs: int) -> bool:
    """Whether an epoch's line is said: each, or of very many about fifty and the last."""
    return epoch % max(1, epochs // 50) == 0 or epoch == epochs


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, num_updates: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """One-cycle learning rate (Smith & Topin 2019) for `num_updates` >= 1 updates, stepped after each."""
    total_steps = num_updates + 1
    # torch divides by (warm-up steps - 1): in a run of a few updates the warm-up must not round to one step.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=total_steps, pct_start=max(_WARM_UP, 1.5 / total_steps)
    )


class _Fitter:
    def __init__(
        self, job: FitJob, examples: Examples, network: nn.Module, rank: int, num_workers: int, device: torch.device
    ) -> None:
        self.job, self.examples, self.network = job, examples, network
        self.rank, self.num_workers, self.device = rank, num_workers, device
        self.trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def fit(self) -> Best:
        """Run all epochs; the one with the lowest NLL on the selection split is returned, the same on every rank."""
        settings = self.job.config.classifier
        rows = self.examples.rows["fitting"]
        num_batches = max(1, len(rows) // settings.batch_size)
        optimizer = torch.optim.AdamW(self.trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = one_cycle(optimizer, settings.learning_rate, settings.epochs * num_batches)
        best, start = Best(0, math.inf, {}), time.monotonic()
        for epoch in range(1, settings.epochs + 1):
            self.network.train()
            total = 0.0
            for number, batch in enumerate(self._batches(rows, num_batches, epoch), start=1):
                total += self._update(batch, optimizer, f"epoch {epoch}, batch {number}")
                schedule.step()
            logits, labels, _ = self.gather(self.examples.rows["selection"])
            nll = float(F.cross_entropy(logits.double(), labels))
            if nll < best.nll:
                best = Best(epoch, nll, copy.deepcopy(self.network.state_dict()))
            accuracy = float((logits.argmax(1) == labels).double().mean())
            left = (time.monotonic() - start) / epoch * (settings.epochs - epoch)
            if self.rank == 0 and tells_epoch(epoch, settings.epochs):
                self.job.say(
                    f"classifier of {self.job.control}: epoch {epoch}/{settings.epochs}, "
                    f"loss {total / num_batches:.4f}, selection NLL {nll:.4f}, accuracy {accuracy:.4f}, "
                    f"{left:.0f} s left"
                )
        if best.epoch == 0:
            raise NonFiniteError(
                "the classifier's NLL on the selection split is not finite after any epoch; lower "
                f"classifier.learning_rate ({settings.learning_rate})"
            )
        return best

    def _batches(self, rows: np.ndarray, num_batches: int, epoch: int) -> Iterator[np.ndarray]:
        """The epoch's batches, in an order keyed by (seed, epoch): the same on every rank."""
        order = np.random.default_rng((self.job.config.seed, 2, epoch)).permutation(rows)
        return iter(np.array_split(order, num_batches))

    def _update(self, batch: np.ndarray, optimizer: torch.optim.Optimizer, place: str) -> float:
        """One optimizer step on a batch of which each worker takes its share; returns the mean loss of the batch."""
        loss = torch.zeros((), device=self.device)
        optimizer.zero_grad(set_to_none=False)
        mine = batch[self.rank :: self.num_workers]
        if len(mine):
            images, prompts, labels = self.examples.batch(mine)
            logits = self.network(images.to(self.device), prompts)
            loss = F.cross_entropy(logits, labels.to(self.device), reduction="sum") / len(batch)
            loss.backward()
        value = self._sum_over_workers(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.trainable, _GRADIENT_CLIPPING)
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            raise NonFiniteError(
                f"the classifier's loss is {value} and its gradient norm {float(norm)} in {place}; lower "
                f"classifier.learning_rate ({self.job.config.classifier.learning_rate})"
            )
        optimizer.step()
        return value

    def _sum_over_workers(self, loss: Tensor) -> float:
        """Add up gradients and loss over the workers, in one message; without workers nothing has to be sent."""
        if self.num_workers == 1:
            return float(loss)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trainable]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1)])
        dist.all_reduce(flat)
        offset = 0
        for parameter in self.trainable:
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter).clone()
            offset += parameter.numel()
        return float(flat[-1])

    @torch.no_grad()
    def gather(self, rows: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Logits (N, K), labels (N,) and row numbers of `rows`, on every worker; each worker computes its share."""
        self.network.eval()
        mine = rows[self.rank :: self.num_workers]
        found: list[Tensor] = []
        for start in range(0, len(mine), _EVALUATION_BATCH):
            images, prompts, _ = self.examples.batch(mine[start : start + _EVALUATION_BATCH])
            found.append(self.network(images.to(self.device), prompts).float().cpu())
        shares: list[Any] = [(mine, found)]
        if self.num_workers > 1:
            shares = [None] * self.num_workers
            dist.all_gather_object(shares, (mine, found))
        numbers = np.concatenate([share[0] for share in shares])
        order = np.argsort(numbers, kind="stable")
        logits = torch.cat([tensor for share in shares for tensor in share[1]])[torch.from_numpy(order)]
        return logits, self.examples.labels[numbers[order]], numbers[order]


def _report(
    job: FitJob,
    classifier: ImageClassifier,
    best: Best,
    examples: Examples,
    logits: Tensor,
    labels: Tensor,
    rows: np.ndarray,
    rank: int,
) -> None:
    """Calibrate, and report the classifier's folder; rank 0 writes it, every rank takes part."""
    samples = torch.from_numpy(examples.is_sample[rows])
    on_samples = int(samples.sum()) >= MIN_CALIBRATION_SAMPLES
    if on_samples:
        logits, labels = logits[samples], labels[samples]
    temperature = measure_temperature(logits, labels)
    classifier.temperature = temperature.value
    before = torch.log_softmax(logits, dim=1)
    after = torch.log_softmax(logits / classifier.temperature, dim=1)
    classifier.calibration = {
        "before": calibration_metrics(before, labels),
        "after": calibration_metrics(after, labels),
        "measured_on": "the pipeline's samples of the temperature split" if on_samples else "the temperature split",
        "best_epoch": best.epoch,
        "selection_nll": best.nll,
        "num_rows": {**{name: len(some) for name, some in examples.rows.items()}, "judged": len(labels)},
        **evidence(examples.labels, examples.rows["fitting"], logits, labels, temperature),
    }
    metrics = {"nll": classifier.calibration["after"]["nll"]}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        classifier.save(folder)
        reliability_diagram(
            Path(folder) / "reliability.png", before, after, labels,
            title=classifier.control, classes=classifier.spec.class_names, say=job.say,
        )  # fmt: skip
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
