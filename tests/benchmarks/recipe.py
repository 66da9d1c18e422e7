"""How near to its target a recipe comes, in one process: `python -m tests.benchmarks.recipe`.

Each recipe trains `shapes` for so many CPU seconds (of one thread, updates only) and is then judged on samples of its own by
the gap of `ctrl_ray.evaluation.certificate`: KL(policy's paths ‖ target's paths) in nats, 0 for an exact sampler. log Z is
estimated once, from samples of the pre-trained model, and shared by all recipes.

A recipe is a `Method` and a config, the same for every control: the shipped one of JPEG size, or `--control NAME=FOLDER`, where
FOLDER holds a classifier of `python -m ctrl_ray.classify`. `today` is the recipe of the main job as it stood when this
benchmark was written, its settings written out, so that it stays what it was when the preset moves.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.classifiers.classifier import read_control
from ctrl_ray.config import (
    AdapterConfig,
    ControlConfig,
    EstimatorConfig,
    LoraConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)
from ctrl_ray.config.presets import preset
from ctrl_ray.diffusion.steps import Guidance, ModelOutput
from ctrl_ray.distributed.batches import Batch, evaluation_batch
from ctrl_ray.distributed.engine import learning_rate_factor, make_optimizer
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import Method
from ctrl_ray.distributed.update import CTRL
from ctrl_ray.evaluation.certificate import Paths, certify, log_mean_weight
from ctrl_ray.evaluation.judging import oracle_labels
from ctrl_ray.gradients.rollout import keyed_noise, rollout
from ctrl_ray.offline.prompts import training_prompts
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model
from tests.configs import EVERY_LAYER

STRENGTH = 4.0
"""guidance_strength of every control."""
_PROBED = 128
"""Trajectories, at least, whose cost says how many updates a run can afford."""
_BATCH = 64
_TUNED_IDS, _PRE_TRAINED_IDS = 1 << 24, 1 << 25
_TUNED_SEED, _PRE_TRAINED_SEED = 4242, 777


@dataclass(frozen=True)
class Recipe:
    """A way to train, under a name for the table."""

    name: str
    config: TrainConfig
    make_method: Callable[[TrainConfig], Method] = CTRL.of


Controls = Mapping[str, ControlConfig]
"""One control and its name."""


def shipped_control() -> Controls:
    """JPEG size, with the preset's classifier and thresholds."""
    (item,) = preset("shapes").controls.items()
    return {item[0]: dataclasses.replace(item[1], guidance_strength=STRENGTH)}


def fitted_control(argument: str) -> Controls:
    """Of NAME=FOLDER."""
    name, _, folder = argument.partition("=")
    return {name: dataclasses.replace(read_control(folder, name), guidance_strength=STRENGTH, classifier=folder)}


def today(controls: Controls, seed: int) -> Recipe:
    """The main job's recipe, its settings frozen here."""
    config = TrainConfig(
        base_model="shapes",
        data="shapes",
        controls=dict(controls),
        seed=seed,
        num_updates=55,
        global_batch_size=64,
        micro_batch_size_per_worker=64,
        kl_coef=1.0,
        control_dropout=0.1,
        sampler=SamplerConfig(num_steps=10, eta=1.0, guidance_scale=1.0, reference_steps=1),
        adapter=AdapterConfig(kind="embedding"),
        lora=LoraConfig(rank=8, alpha=8.0, target_modules=EVERY_LAYER),
        estimator=EstimatorConfig(name="full"),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=5e-3,
            embedding_learning_rate=0.1,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.99,
            gradient_clipping=5.0,
            warmup_updates=2,
            final_learning_rate_fraction=0.1,
        ),
    )
    return Recipe("today's", config)


def gains(controls: Controls, seed: int) -> Recipe:
    """The nearest that is known: label gains on convolutions, updates of 8 trajectories with as many of each class as of any
    other, no longer drifts asked for than a bound that grows, a rate that falls to 0. Graphs are kept, for speed."""
    config = today(controls, seed).config
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=1e-2, gradient_clipping=20.0, warmup_updates=4, final_learning_rate_fraction=0.0
    )
    return Recipe(
        "gains",
        dataclasses.replace(
            config,
            adapter=AdapterConfig(kind="gains"),
            lora=LoraConfig(rank=8, alpha=8.0, target_modules=("conv1", "conv2", "conv_shortcut")),
            estimator=EstimatorConfig(name="full", keep_graphs=True, max_drift=2.0, final_max_drift=20.0),
            global_batch_size=8,
            micro_batch_size_per_worker=8,
            label_draws="systematic",
            control_dropout=0.0,
            optimizer=optimizer,
        ),
    )


RECIPES = (today, gains)


class PlainEngine:
    """What a `Learner` needs of an engine, in one process without DeepSpeed: the same optimizer, clipping and schedule."""

    def __init__(self, policy: ControlledPolicy, config: TrainConfig) -> None:
        self.policy, self.latent_shape, self._config = policy, policy.latent_shape, config
        groups = policy.parameter_groups(config.optimizer.learning_rate, config.optimizer.embedding_learning_rate)
        self._rates = [group["lr"] for group in groups]
        self._optimizer = make_optimizer(groups, config.optimizer)

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """The policy's forward."""
        return self.policy(latents, time, inputs, reference=reference)

    def beside_reference(self, inputs: Inputs) -> Inputs | None:
        """The policy's."""
        return self.policy.beside_reference(inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    @property
    def learning_rate(self) -> float:
        """Of the denoiser's group, at the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self, update: int) -> float:
        """Clip, step, forget the gradients; returns their norm."""
        factor = learning_rate_factor(self._config, update)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        parameters = self.policy.trainable_parameters().values()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.optimizer.gradient_clipping or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


def make_learner(config: TrainConfig, rewards: LocalRewards) -> Learner:
    """Everything around a fresh policy, in this process."""
    policy = build_policy(config)
    backbone = policy.backbone
    return Learner(
        config=config,
        engine=PlainEngine(policy, config),  # type: ignore[arg-type]
        kernel=backbone.make_kernel(config.sampler),
        encoder=backbone.load_encoder(),
        rewards=rewards,
        controls=config.controls,
        prompts=training_prompts(config),
        rank=Rank(0, 1, torch.device("cpu")),
    )


def shared_rewards(config: TrainConfig) -> LocalRewards:
    """The reward model of all recipes."""
    classifiers = {name: str(control.classifier) for name, control in config.controls.items()}
    return LocalRewards(load_reward_model(RewardModelSpec(base_model=config.base_model, classifiers=classifiers)))


def _batches(learner: Learner, first: int, num_samples: int) -> Iterator[Batch]:
    for start in range(first, first + num_samples, _BATCH):
        ids = range(start, min(start + _BATCH, first + num_samples))
        yield evaluation_batch(ids, learner.prompts, learner.controls, tuple(learner.config.controls))


@torch.no_grad()
def pre_trained_tilts(learner: Learner, num_samples: int) -> np.ndarray:
    """(n, K): λ log p̂ of every class, of samples of the pre-trained model, which all recipes share."""
    found = []
    for batch in _batches(learner, _PRE_TRAINED_IDS, num_samples):
        shape, steps = learner.engine.latent_shape, learner.kernel.num_steps
        noise = keyed_noise(_PRE_TRAINED_SEED, 0, batch.sample_ids, shape, steps)
        inputs = Inputs(learner.encoder.encode(batch.prompts), batch.labels, Guidance.of(learner.config.sampler))
        trajectory = rollout(learner.engine, learner.kernel, inputs, noise, reference=True)
        found.append(learner.rewards.class_log_probs(trajectory.clean_latents, batch.prompts)[_control(learner)])
    tilts: np.ndarray = _exponent(learner) * torch.cat(found).double().numpy()
    return tilts


@dataclass(frozen=True)
class Judged:
    """A recipe's figures; gap and its error are means over classes."""

    gap: float
    standard_error: float
    gaps: tuple[float, ...]
    ess: tuple[float, ...]
    """Effective sample size of the path weights, as a share of the class's samples."""
    kl: float
    accuracy: float
    """By the oracle."""


@torch.no_grad()
def judge_recipe(learner: Learner, tilts: np.ndarray, num_samples: int) -> Judged:
    """Sample the trained policy (the same noise every time) and certify every class."""
    name = _control(learner)
    control = learner.config.controls[name]
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for batch in _batches(learner, _TUNED_IDS, num_samples):
        trajectory = learner.roll_out(batch, _TUNED_SEED, 0, with_kl=True)
        assert trajectory.log_ratio is not None and trajectory.kl_per_step is not None
        log_prob = learner.submit(batch, trajectory.clean_latents).result().log_probs[:, 0].double()
        images = learner.rewards.decode(trajectory.clean_latents).numpy()
        true = oracle_labels(name, control, images, batch.prompts).classes
        labels, kl = batch.labels[:, 0], trajectory.kl_per_step.double().sum(1)
        right = torch.from_numpy(true) == labels
        parts.append((labels, _exponent(learner) * log_prob, trajectory.log_ratio, kl, right))
    labels, ours, log_ratios, kl, right = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    certificates = [
        certify(Paths(ours[labels == label], log_ratios[labels == label]), Paths(tilts[:, label], None))
        for label in range(control.num_classes)
    ]
    return Judged(
        gap=float(np.mean([certificate.gap.value for certificate in certificates])),
        standard_error=math.hypot(*(certificate.gap.standard_error for certificate in certificates))
        / len(certificates),
        gaps=tuple(certificate.gap.value for certificate in certificates),
        ess=tuple(certificate.ess for certificate in certificates),
        kl=float(kl.mean()),
        accuracy=float(right.mean()),
    )


def _control(learner: Learner) -> str:
    (name,) = learner.config.controls
    return name


def _exponent(learner: Learner) -> float:
    return learner.config.controls[_control(learner)].guidance_strength / learner.config.kl_coef


def affordable_updates(recipe: Recipe, rewards: LocalRewards, cpu_s: float) -> int:
    """How many updates a recipe makes in so many CPU seconds, by the cost of a few, which are then forgotten."""
    learner = make_learner(recipe.config, rewards)
    method, start, probed = recipe.make_method(recipe.config), 0.0, -(-_PROBED // recipe.config.global_batch_size)
    for update in range(1 + probed):
        method.update(learner, update)
        start = start or time.process_time()  # the first update chooses kernels, and is not counted
    return max(1, round(cpu_s / (time.process_time() - start) * probed))


def train_recipe(recipe: Recipe, learner: Learner) -> float:
    """CPU seconds of training to the end of the config's schedule."""
    method, spent = recipe.make_method(learner.config), 0.0
    for update in range(learner.config.num_updates):
        start = time.process_time()
        metrics = method.update(learner, update)
        spent += time.process_time() - start
        if (update + 1) % max(1, learner.config.num_updates // 20):
            continue
        print(
            f"  {recipe.name}: update {update + 1}/{learner.config.num_updates}, {spent:.0f} CPU s, reward "
            f"{metrics['reward']:.2f}, KL {metrics['kl']:.2f}",
            flush=True,
        )
    return spent


def as_a_worker(benchmark: str) -> None:
    """Start this process anew with the environment that a worker has from its start."""
    kept = worker_environment(use_gpu=False, num_threads=1, keeps_graphs=True)
    if not os.environ.items() >= kept.items():
        command = [sys.executable, "-m", f"tests.benchmarks.{benchmark}", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **kept})


def this_machine() -> str:
    """Hardware and versions, for the end of a table."""
    machine = platform.processor() or platform.machine()
    return (
        f"{machine}, {os.cpu_count()} CPUs, one thread; Python {platform.python_version()}, torch {torch.__version__}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", metavar="NAME=FOLDER", help="another control than the shipped JPEG size")
    parser.add_argument("--cpu-s", type=float, default=120.0, help="CPU seconds of updates of each run, about")
    parser.add_argument("--recipes", nargs="+", choices=[make.__name__ for make in RECIPES], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512, help="of each run, for its figures")
    parser.add_argument("--pre-trained-samples", type=int, default=1024, help="for log Z")
    arguments = parser.parse_args(argv)
    as_a_worker("recipe")
    torch.set_num_threads(1)
    controls = fitted_control(arguments.control) if arguments.control else shipped_control()
    recipes = [make for make in RECIPES if not arguments.recipes or make.__name__ in arguments.recipes]
    first = today(controls, 0).config
    rewards = shared_rewards(first)
    tilts = pre_trained_tilts(make_learner(first, rewards), arguments.pre_trained_samples)
    print("log Z  " + ", ".join("{:.2f} ± {:.2f}".format(*log_mean_weight(column)) for column in tilts.T))
    updates = {make: affordable_updates(make(controls, 0), rewards, arguments.cpu_s) for make in recipes}
    rows = []
    for seed in arguments.seeds:
        for make in recipes:  # in turns, so that a machine that slows down slows all of them
            recipe = make(controls, seed)
            config = dataclasses.replace(recipe.config, num_updates=updates[make])
            learner = make_learner(config, rewards)
            spent = train_recipe(recipe, learner)
            judged = judge_recipe(learner, tilts, arguments.samples)
            rows.append(
                f"{recipe.name:<12}{seed:>5}{spent:>8.0f}{config.num_updates * config.global_batch_size:>13}"
                f"{judged.gap:>8.2f} ± {judged.standard_error:<6.2f}{judged.kl:>6.2f}{judged.accuracy:>10.3f}   "
                f"{' '.join(f'{gap:.1f}' for gap in judged.gaps)}   {' '.join(f'{e:.3f}' for e in judged.ess)}"
            )
    head = f"{'recipe':<12}{'seed':>5}{'CPU s':>8}{'trajectories':>13}{'gap / nats':>17}{'KL':>6}{'accuracy':>10}"
    print(f"\n{head}   by class: gap, ESS")
    print("\n".join(rows))
    print(f"\n{this_machine()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
