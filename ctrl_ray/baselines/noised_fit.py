"""The fit of p(y|x_t, t): stage 1's labelled images, encoded once and noised anew at every pass."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrl_ray.baselines.labelled import LabelledLatents, read_labelled
from ctrl_ray.baselines.noised_classifier import SETTINGS, NoisedClassifier
from ctrl_ray.baselines.noising import NoiseSchedule
from ctrl_ray.classifiers.calibration import calibration_metrics
from ctrl_ray.classifiers.worker import tells_epoch
from ctrl_ray.config import TrainConfig
from ctrl_ray.diffusion.noise import draw_key
from ctrl_ray.errors import ConfigError, DataError, NonFiniteError, RunFolderError
from ctrl_ray.offline.reading import OnBadRow
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.runs.claim import claimed

NUM_BINS = 10
"""Ranges of timesteps, each with its own figures."""
_WARM_UP = 0.1
_GRADIENT_CLIPPING = 1.0
_BATCH = 256


def fit_noised_classifier(
    config: TrainConfig,
    control: str,
    *,
    output_dir: str | Path,
    on_bad_row: OnBadRow = "error",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> NoisedClassifier:
    """Fit the noised classifier of one control of `config` in this process, and write it into `output_dir`.

    The rows, labels and splits are those of stage 1 (`baselines.labelled`). `classifier.epochs`, `learning_rate`,
    `weight_decay`, `batch_size` and `prompt_conditional` are used; num_pipeline_samples is not.

    Raises ConfigError for a control or settings that cannot be fitted, DataError and ModelError for data and base models that
    cannot be read, RunFolderError where `output_dir` holds one already, NonFiniteError where the loss is not finite.
    """
    folder = Path(output_dir)
    settings = config.classifier
    if settings.network != "cnn" or settings.num_workers != 1:
        raise ConfigError(
            f"classifier.network is {settings.network!r} and classifier.num_workers {settings.num_workers}, but a classifier "
            "of noised latents has a network of its own and is fitted in one process; leave both out"
        )
    if (folder / SETTINGS).exists() and not overwrite:
        raise RunFolderError(
            f"{folder} already holds a noised classifier; choose another output folder, or give --overwrite"
        )
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    torch.set_num_threads(config.scaling.num_threads)
    if settings.num_pipeline_samples:
        say(
            f"the {settings.num_pipeline_samples} samples of the pipeline (classifier.num_pipeline_samples) are not used"
        )
    with claimed(folder):
        data = read_labelled(config, [control], device=device, on_bad_row=on_bad_row, say=say)
        classifier = fit_noised(config, control, data, device=device, say=say)
        classifier.save(folder)
    return classifier


def fit_noised(
    config: TrainConfig,
    control: str,
    data: LabelledLatents,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> NoisedClassifier:
    """The noised classifier of one of the controls of `data`, with its figures on the images that nothing else has seen.

    In an epoch every image is seen at two noise levels, t and T − 1 − t with t uniform. AdamW with a short warm-up and a cosine
    to 0; the epoch with the lowest NLL on the selection split is kept. Every draw is keyed by the config's seed.
    """
    settings = config.classifier
    counts = {name: len(data.rows(name)) for name in ("fitting", "selection", "temperature")}
    if min(counts.values()) == 0:
        raise DataError(
            f"{len(data)} images make splits of {counts} images: too few to fit, to choose an epoch and to judge; expected at "
            "least one in each; give more data, or other shares in classifier.split"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        classifier = NoisedClassifier.new(
            control,
            config.controls[control],
            latent_shape=data.latents.shape[1:],
            base_model=config.base_model,
            prompt_conditional=settings.prompt_conditional,
            vae=load_backbone(config.base_model, config.base_revision, config.sampler).identities()["vae"].sha256,
        ).to(device)
    images = _Noised(config, data, list(data.controls).index(control), device)
    _fit(config, classifier, images, data.rows("fitting"), data.rows("selection"), say)
    classifier.eval().requires_grad_(False)
    classifier.held_out = images.held_out_figures(classifier, data.rows("temperature"))
    return classifier


class _Noised:
    """Labelled latents at any noise level, x_t = √ᾱ x_0 + √(1−ᾱ) ε."""

    def __init__(self, config: TrainConfig, data: LabelledLatents, column: int, device: torch.device | str) -> None:
        self.schedule = NoiseSchedule.of(config)
        self.data, self.labels, self.device, self.seed = data, data.labels[:, column], device, config.seed

    def generator(self, number: int, purpose: str) -> torch.Generator:
        """Keyed by the seed."""
        return torch.Generator().manual_seed(draw_key(self.seed, number, 0, f"noised classifier {purpose}"))

    def log_probs(
        self, classifier: NoisedClassifier, rows: Tensor, timesteps: Tensor, generator: torch.Generator
    ) -> Tensor:
        """(R, K) of the images `rows` noised to `timesteps`, each (R,)."""
        noise = torch.randn(len(rows), *self.data.latents.shape[1:], generator=generator)
        timesteps = timesteps.to(self.device)
        noised = self.schedule.noised(self.data.latents[rows].to(self.device), noise.to(self.device), timesteps)
        found: Tensor = classifier(noised, timesteps, [self.data.prompts[int(row)] for row in rows])
        return found

    @torch.no_grad()
    def held_out(
        self, classifier: NoisedClassifier, rows: Tensor, timesteps: Tensor, purpose: str
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities (R, K), labels (R,)) with noise that is the same at every call, on the CPU."""
        classifier.eval()
        generator = self.generator(0, purpose)
        parts = zip(rows.split(_BATCH), timesteps.split(_BATCH), strict=True)
        found = [self.log_probs(classifier, some, times, generator).cpu() for some, times in parts]
        return torch.cat(found), self.labels[rows]

    def held_out_figures(self, classifier: NoisedClassifier, rows: Tensor) -> dict[str, Any]:
        """Accuracy, NLL, Brier and ECE (`calibration_metrics`), every image once in each of ten ranges of timesteps."""
        total, generator = len(self.schedule), self.generator(0, "ranges")
        figures: dict[str, Any] = {"num_images": len(rows), "by_timesteps": []}
        everything = []
        for number in range(NUM_BINS):
            low, high = number * total // NUM_BINS, (number + 1) * total // NUM_BINS
            timesteps = torch.randint(low, high, (len(rows),), generator=generator)
            judged = self.held_out(classifier, rows, timesteps, f"range {number}")
            figures["by_timesteps"].append({"from": low, "below": high, **calibration_metrics(*judged)})
            everything.append(judged)
        log_probs, labels = (torch.cat(part) for part in zip(*everything, strict=True))
        return {**figures, "all": calibration_metrics(log_probs, labels)}


def _fit(
    config: TrainConfig,
    classifier: NoisedClassifier,
    images: _Noised,
    rows: Tensor,
    selection: Tensor,
    say: Callable[[str], None],
) -> None:
    settings, total = config.classifier, len(images.schedule)
    num_batches = max(1, 2 * len(rows) // settings.batch_size)
    num_updates = settings.epochs * num_batches
    parameters = list(classifier.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: _factor(update, num_updates))
    judged_at = torch.randint(0, total, (len(selection),), generator=images.generator(0, "selection"))
    best, kept, start = math.inf, classifier.state_dict(), time.monotonic()
    for epoch in range(1, settings.epochs + 1):
        classifier.train()
        generator, mean_loss = images.generator(epoch, "epoch"), 0.0
        first = torch.randint(0, total, (len(rows),), generator=generator)
        twice, timesteps = rows.repeat(2), _both(first, total)
        for batch in torch.randperm(len(twice), generator=generator).tensor_split(num_batches):
            log_probs = images.log_probs(classifier, twice[batch], timesteps[batch], generator)
            loss = F.nll_loss(log_probs, images.labels[twice[batch]].to(log_probs.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_CLIPPING)
            if not bool(torch.isfinite(loss.detach() + norm)):
                raise NonFiniteError(
                    f"the noised classifier's loss is {float(loss.detach())} and its gradient norm {float(norm)} in epoch "
                    f"{epoch}; lower classifier.learning_rate ({settings.learning_rate})"
                )
            optimizer.step()
            schedule.step()
            mean_loss += float(loss.detach()) / num_batches
        log_probs, labels = images.held_out(classifier, selection.repeat(2), _both(judged_at, total), "selection")
        nll = float(F.nll_loss(log_probs, labels))
        if nll < best:
            best, kept = nll, copy.deepcopy(classifier.state_dict())
        left = (time.monotonic() - start) / epoch * (settings.epochs - epoch)
        accuracy = float((log_probs.argmax(1) == labels).double().mean())
        if tells_epoch(epoch, settings.epochs):
            say(
                f"noised classifier of {classifier.control}: epoch {epoch}/{settings.epochs}, loss {mean_loss:.4f}, selection "
                f"NLL {nll:.4f}, accuracy {accuracy:.4f}, {left:.0f} s left"
            )
    classifier.load_state_dict(kept)


def _both(timesteps: Tensor, total: int) -> Tensor:
    """Timesteps and their mirror images: a fair share of every noise level."""
    return torch.cat([timesteps, total - 1 - timesteps])


def _factor(update: int, num_updates: int) -> float:
    """Of the learning rate: up over the first tenth, then a cosine to 0."""
    return min(1.0, (update + 1) / (_WARM_UP * num_updates)) * 0.5 * (1 + math.cos(math.pi * update / num_updates))


def describe(classifier: NoisedClassifier, folder: str | Path) -> str:
    """Its figures as a table."""
    figures = classifier.held_out
    names = ("accuracy", "nll", "brier", "ece")
    lines = [
        f"noised classifier of {classifier.control} written to {folder}; judged on {figures['num_images']} held-out images",
        f"{'timesteps':12}" + "".join(f"{name:>10}" for name in names),
    ]
    rows = [(f"{row['from']}-{row['below'] - 1}", row) for row in figures["by_timesteps"]] + [("all", figures["all"])]
    lines += [f"{title:12}" + "".join(f"{row[name]:10.4f}" for name in names) for title, row in rows]
    return "\n".join(lines)
