"""A method owns its update: another loop around the same learner needs no new worker."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ctrl_ray.distributed.learner import Learner
from ctrl_ray.distributed.method import Method, make_method
from ctrl_ray.distributed.update import CTRL
from ctrl_ray.distributed.worker import TrainJob
from ctrl_ray.exact.suite import Effort, gaussian
from ctrl_ray.gradients.adjoint import TerminalReward, adjoint_pass
from ctrl_ray.gradients.estimators import AdjointMatching
from ctrl_ray.gradients.rollout import rollout
from tests.analytic import PlainEngine, make_learner

CASE = dataclasses.replace(gaussian(), effort=Effort(num_updates=3, batch_size=64, num_nodes=9))


@dataclasses.dataclass(frozen=True)
class RegressTwice:
    """Adjoint matching with two optimizer steps per rollout: the second regresses on the same adjoint."""

    estimator: AdjointMatching = dataclasses.field(default_factory=AdjointMatching)
    needs_cotangent: bool = True

    def update(self, learner: Learner, update: int) -> dict[str, float]:
        config = learner.config
        from ctrl_ray.distributed.batches import training_batch

        ids = range(config.global_batch_size)
        batch = training_batch(config.seed, update, ids, learner.prompts, learner.controls, tuple(config.controls), 0.0)
        trajectory = learner.roll_out(batch, config.seed, update)
        answer = learner.submit(batch, trajectory.clean_latents).result()
        for _ in range(2):
            adjoint_pass(
                learner.engine,
                learner.kernel,
                trajectory,
                TerminalReward(None, answer.cotangent),
                self.estimator,
                self.estimator.plan(learner.kernel.num_steps, config.seed, update, 0),
                kl_coef=config.kl_coef,
                sample_weights=torch.full((len(batch),), 1 / len(batch)),
                backward=learner.engine.backward,
            )
            learner.engine.step(update)
        return {"reward": float(answer.log_probs.mean())}


@pytest.mark.full
def test_several_optimizer_steps_for_one_rollout() -> None:
    """Two steps of a regression on one rollout come closer to its optimum than one; the worker's loop is the same."""
    rewards = {}
    for name, method in (("once", make_method(_matching())), ("twice", RegressTwice())):
        learner, _ = make_learner(CASE, _Slow)
        checked: Method = method
        for update in range(3):
            metrics = checked.update(learner, update)
        rewards[name] = metrics["reward"]
    assert rewards["twice"] > rewards["once"] + 0.05


class _Slow(PlainEngine):
    """SGD, whose steps do not saturate."""

    def step(self, update: int) -> float:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                assert parameter.grad is not None
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
        return 0.0


def _matching():
    learner, _ = make_learner(CASE)
    estimator = dataclasses.replace(learner.config.estimator, name="adjoint_matching")
    return dataclasses.replace(learner.config, estimator=estimator)


def test_a_job_trains_by_ctrl_unless_told_otherwise() -> None:
    """The worker asks the job for its method; CTRL takes the estimator that the config names."""
    (field,) = (f for f in dataclasses.fields(TrainJob) if f.name == "make_method")
    method = field.default(_matching())
    assert isinstance(method, CTRL) and isinstance(method.estimator, AdjointMatching) and method.needs_cotangent


def test_the_plain_sampler_is_the_rollout_of_the_learner() -> None:
    """`rollout` with the learner's inputs and noise draws what `roll_out` draws."""
    from ctrl_ray.distributed.batches import evaluation_batch
    from ctrl_ray.gradients.rollout import Sampler, keyed_noise
    from ctrl_ray.policy.protocol import Inputs

    learner, policy = make_learner(CASE)
    draw: Sampler = rollout
    batch = evaluation_batch(range(4), learner.prompts, learner.controls, tuple(learner.config.controls))
    noise = keyed_noise(5, 0, batch.sample_ids, policy.latent_shape, learner.kernel.num_steps)
    inputs = Inputs(learner.encoder.encode(batch.prompts), batch.labels)
    seen: list[int] = []
    drawn = draw(policy, learner.kernel, inputs, noise, learner.rewards, on_step=lambda k, x: seen.append(k))
    assert torch.equal(drawn.latents, learner.roll_out(batch, 5, 0).latents)
    assert seen == list(range(learner.kernel.num_steps))
