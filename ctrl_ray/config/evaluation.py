"""How a policy is judged."""

from __future__ import annotations

from dataclasses import dataclass

from ctrl_ray.config.values import Auto, fixed, is_auto_or, require


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How a policy is judged: by the oracle on decoded samples, never by the classifier that was the reward."""

    every_updates: int = 10
    """Updates between two evaluations; each also writes a checkpoint. 0: evaluate only at the end."""
    num_samples: int = 128
    """Samples of each evaluation during training. The best evaluation decides which checkpoint is exported."""
    final_num_samples: int = 512
    """Samples of the evaluations before and after training, which the report shows."""
    log_z_samples: int = 512
    """Samples of the pre-trained model that log Z, the most that a sampler can reach, is estimated from; at least."""
    max_log_z_samples: int = 4096
    """The same at most: more are drawn until log_z_standard_error is met."""
    log_z_standard_error: float = 0.1
    """Nats: how well log Z of every class is to be known."""
    num_pairs: int = 128
    """Samples of the pre-trained model that are drawn again from their initial noise (and, where sampler.reference_steps is
    not 0, a quarter of them from the noise before those steps), to tell which part of the gap no training removes; a tenth as
    many of the policy's paths tell what its fixed variances cost. 0: that is not told."""
    batch_size: int | Auto = 128
    """Samples drawn at a time by each worker. 'auto': up to 16, as they fit."""
    prompts_file: str | None = None
    """File of prompts to evaluate on, one per line. None: the training prompts, with seeds that training never uses."""
    seed: int = 1_000_003
    """Seed of the evaluation's noise. Training never uses it."""
    asynchronous: bool = False
    """Evaluate checkpoints in a Ray task of their own while training goes on. It needs num_cpus and num_gpus in
    addition to what workers and pool have. False: the workers evaluate between two updates."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves for an asynchronous evaluation. It has as many torch threads, rounded up."""
    num_gpus: float = 0.0
    """GPUs (fractions allowed) of an asynchronous evaluation. 0: it runs on the CPU."""

    def __post_init__(self) -> None:
        require(self.num_cpus >= 0, f"evaluation.num_cpus is {self.num_cpus}; expected 0 or more")
        require(self.num_gpus >= 0, f"evaluation.num_gpus is {self.num_gpus}; expected 0 or more")
        require(self.every_updates >= 0, f"evaluation.every_updates is {self.every_updates}; expected >= 0")
        require(self.num_pairs >= 0, f"evaluation.num_pairs is {self.num_pairs}; expected >= 0")
        for name in ("num_samples", "final_num_samples", "log_z_samples", "batch_size"):
            require(
                is_auto_or(getattr(self, name), 1), f"evaluation.{name} is {getattr(self, name)}; expected at least 1"
            )

        require(
            self.max_log_z_samples >= self.log_z_samples,
            f"evaluation.max_log_z_samples is {self.max_log_z_samples}; expected at least log_z_samples, {self.log_z_samples}",
        )
        require(
            self.log_z_standard_error > 0,
            f"evaluation.log_z_standard_error is {self.log_z_standard_error}; expected a number above 0",
        )

    @property
    def fixed_batch_size(self) -> int:
        """batch_size as a number; ConfigError while it is still to be decided."""
        return fixed(self.batch_size, "evaluation.batch_size")

    @property
    def fewest_pre_trained(self) -> int:
        """Samples of the pre-trained model that are drawn in any case, for the report and for log Z."""
        return max(self.final_num_samples, self.log_z_samples)
