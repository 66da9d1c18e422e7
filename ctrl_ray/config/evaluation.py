"""How a policy is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ctrl_ray.config.fields import above, at_least, check_fields
from ctrl_ray.config.values import Auto, fixed, require


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a policy is judged: by the oracle on decoded samples, never by the classifier that was the reward."""

    every_updates: Annotated[int, at_least(0)] = 10
    """Updates between two evaluations. Each evaluation also writes a checkpoint. 0: evaluate only at the end."""
    num_samples: Annotated[int, at_least(1)] = 128
    """Samples of each evaluation during training. The best evaluation decides which checkpoint is exported."""
    final_num_samples: Annotated[int, at_least(1)] = 512
    """Samples of the evaluations before and after training, which the report shows."""
    log_z_samples: Annotated[int, at_least(1)] = 512
    """The fewest samples of the pre-trained model that log Z, the best objective of any sampler, is estimated from."""
    max_log_z_samples: Annotated[int, at_least(1)] = 4096
    """The most of these samples. More are drawn until log_z_standard_error is met."""
    log_z_standard_error: Annotated[float, above(0)] = 0.1
    """The standard error, in nats, to which log Z of every class is estimated."""
    num_pairs: Annotated[int, at_least(0)] = 128
    """Samples of the pre-trained model that are drawn again from their initial noise. They show which part of the gap no
    training removes. Where sampler.reference_steps is not 0, a quarter of them are also drawn again from the noise before
    those steps. A tenth as many of the policy's paths show what its fixed variances cost. 0: none of this is measured."""
    batch_size: Annotated[int | Auto, at_least(1)] = 128
    """Samples that each worker draws at a time. 'auto': up to 16, as many as fit the memory."""
    prompts_file: str | None = None
    """File of prompts to evaluate on, one per line. None: the training prompts, with seeds that training never uses."""
    clip_model: str | None = None
    """CLIP model (folder or hub id, in safetensors) that measures clip_score before and after training. It also judges the
    prompts (prompt_fidelity) where the recogniser of the built-in example cannot. None: no clip_score."""
    brisque_model: str | None = None
    """Folder with `allmodel` and `allrange`, the regression of BRISQUE's authors. It measures brisque before and after training
    (`ctrl_ray.evaluation.brisque` says where to get it). None: no brisque."""
    seed: Annotated[int, at_least(0)] = 1_000_003
    """Seed of the evaluation's noise. Training never uses it."""
    asynchronous: bool = False
    """Evaluate checkpoints in a Ray task of their own while training goes on. It needs num_cpus and num_gpus in
    addition to what workers and pool have. False: the workers evaluate between two updates."""
    num_cpus: Annotated[float, at_least(0)] = 1.0
    """CPUs that Ray reserves for an asynchronous evaluation. It uses as many torch threads, rounded up."""
    num_gpus: Annotated[float, at_least(0)] = 0.0
    """GPUs (fractions allowed) of an asynchronous evaluation. 0: it runs on the CPU."""

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        require(
            self.max_log_z_samples >= self.log_z_samples,
            f"evaluation.max_log_z_samples is {self.max_log_z_samples}; expected at least log_z_samples, {self.log_z_samples}",
        )

    @property
    def fixed_batch_size(self) -> int:
        """batch_size as a number; ConfigError while it is still to be decided."""
        return fixed(self.batch_size, "evaluation.batch_size")

    @property
    def fewest_pre_trained(self) -> int:
        """Samples of the pre-trained model that are drawn in any case, for the report and for log Z."""
        return max(self.final_num_samples, self.log_z_samples)
