"""How near sampling with candidates comes to exact samples: `python -m tests.benchmarks.candidates --classifier FOLDER`.

Rejection from the pre-trained model (accept with p̂^exponent) gives exact samples at any exponent. Each class is compared with
them prompt by prompt, the same number of each prompt on both sides, because rejection itself prefers prompts that suit the
class. A distance is told in noise floors: the same distance between two disjoint halves of the exact samples.

Without --adapter all candidates are the pre-trained model's. On one CPU thread a candidate of `shapes` takes about 30 ms, one
of an adapter twice that: the defaults need 512 · 4 · K of them, and the pool.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.oracles import load_oracle, measure
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model
from ctrl_ray.sample import image_seed
from ctrl_ray.verification.distances import mmd
from ctrl_ray.verification.measured import image_features

CONTROL = "jpeg_size"
_BATCH = 64


@dataclass(frozen=True)
class Images:
    """Some images, and what is compared of them."""

    prompts: np.ndarray
    """(n,) number of each image's prompt."""
    class_log_probs: np.ndarray
    """(n, classes)."""
    measured: np.ndarray
    """(n,) by the oracle."""
    features: np.ndarray
    """(n, 1024)."""
    ess: np.ndarray
    """(n,), NaN without candidates."""


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, compare, print."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    prompts = [PROMPTS[index] for index in np.linspace(0, len(PROMPTS) - 1, options.num_prompts).astype(int)]
    base = ControlledPipeline.from_base_model(
        "shapes", classifiers={CONTROL: options.classifier}, exponents={CONTROL: options.exponent}
    )
    pipeline = base
    if options.adapter is not None:
        pipeline = ControlledPipeline.from_pretrained(
            options.adapter, classifiers={CONTROL: options.classifier}, exponents={CONTROL: options.exponent}
        )
    rewards = LocalRewards(
        load_reward_model(RewardModelSpec(base_model="shapes", classifiers={CONTROL: options.classifier}))
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, one thread")
    started = time.process_time()
    pool = draw(base, rewards, prompts, options.pool, seed=1, num_candidates=1)
    print(f"pool of {options.pool}: {time.process_time() - started:.0f} s")
    print(
        f"{'class':<14}{'n':>6}{'ESS':>7}{'Wasserstein, floors':>22}{'before':>9}{'MMD, floors':>14}{'before':>9}{'s':>7}"
    )
    for label, name in enumerate(base.controls[CONTROL]):
        started = time.process_time()
        chosen = draw(
            pipeline, rewards, prompts, options.num_images, 2 + label, num_candidates=options.candidates, label=label
        )
        count, wasserstein, features = compare(pool, chosen, label, options.exponent)
        print(
            f"{name:<14}{count:>6}{np.mean(chosen.ess):>7.2f}{wasserstein[0]:>22.2f}{wasserstein[1]:>9.1f}"
            f"{features[0]:>14.2f}{features[1]:>9.1f}{time.process_time() - started:>7.0f}",
            flush=True,
        )


def draw(
    pipeline: ControlledPipeline,
    rewards: LocalRewards,
    prompts: Sequence[str],
    count: int,
    seed: int,
    *,
    num_candidates: int,
    label: int | None = None,
) -> Images:
    """`count` images, the prompts in turn; of one class where a label is given."""
    pipeline.set_progress_bar_config(disable=True)
    images, beliefs, sizes = [], [], []
    for start in range(0, count, _BATCH):
        indices = range(start, min(start + _BATCH, count))
        texts = [prompts[index % len(prompts)] for index in indices]
        made = pipeline(
            texts,
            controls=None if label is None else {CONTROL: label},
            generator=[torch.Generator().manual_seed(image_seed(seed, index)) for index in indices],
            output_type="latent",
            num_candidates=num_candidates,
        )
        images.append(rewards.decode(made.images).numpy())
        beliefs.append(rewards.class_log_probs(made.images, texts)[CONTROL].double().numpy())
        sizes.append(np.full(len(texts), np.nan) if made.ess is None else made.ess.numpy())
    pixels = np.concatenate(images)
    return Images(
        prompts=np.arange(count) % len(prompts),
        class_log_probs=np.concatenate(beliefs),
        measured=measure(load_oracle(CONTROL), pixels),
        features=image_features(pixels),
        ess=np.concatenate(sizes),
    )


def compare(
    pool: Images, chosen: Images, label: int, exponent: float
) -> tuple[int, tuple[float, float], tuple[float, float]]:
    """(samples on a side, (reached, pre-trained) in floors of the Wasserstein distance, the same of the MMD)."""
    rng = np.random.default_rng(label)
    accepted = rng.uniform(size=len(pool.prompts)) < np.exp(exponent * pool.class_log_probs[:, label])
    exact, ours, all_of = (
        [np.flatnonzero(mask & (part.prompts == prompt)) for prompt in np.unique(pool.prompts)]
        for part, mask in ((pool, accepted), (chosen, True), (pool, True))
    )
    each = min(min(len(rows) // 2 for rows in exact), min(len(rows) for rows in ours))
    if each == 0:
        raise SystemExit(f"class {label}: a prompt has no two exact samples; give a larger --pool")

    def floors(distance: Callable[[np.ndarray, np.ndarray], float], of: str, repeats: int) -> tuple[float, float]:
        values, reached = getattr(pool, of), getattr(chosen, of)
        rows = []
        for _ in range(repeats):
            shuffled = [rng.permutation(group) for group in exact]
            one, other = (
                np.concatenate([group[part] for group in shuffled]) for part in (slice(each), slice(each, 2 * each))
            )
            mine, before = (
                np.concatenate([rng.choice(g, each, replace=False) for g in groups]) for groups in (ours, all_of)
            )
            exacts = values[one]
            rows.append([distance(of_these, exacts) for of_these in (reached[mine], values[before], values[other])])
        found, start, floor = np.mean(rows, axis=0)
        return float(found / floor), float(start / floor)

    return each * len(exact), floors(wasserstein_distance, "measured", 24), floors(mmd, "features", 4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", required=True, help="folder of the classifier of jpeg_size")
    parser.add_argument("--adapter", help="None: the pre-trained model's candidates alone")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--exponent", type=float, default=4.0)
    parser.add_argument("--num-images", type=int, default=512, help="of each class")
    parser.add_argument("--pool", type=int, default=6144, help="pre-trained images that exact samples are taken from")
    parser.add_argument("--num-prompts", type=int, default=6)
    return parser


if __name__ == "__main__":
    main()
