"""The gradient and what is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ctrl_ray.config.fields import at_least, check_fields, share
from ctrl_ray.config.values import Auto, fixed, require

TrainingMethod = Literal["ctrl", "cfg"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorConfig:
    """How the gradient of the objective is estimated (`ctrl_ray.gradients.estimators`)."""

    name: Literal["full", "sticking_the_landing", "last_k", "random_suffix", "adjoint_matching", "reinforce"] = "full"
    """'full': exact. 'sticking_the_landing': the same mean, less variance near the optimum, two fifths more
    denoiser calls. 'random_suffix': unbiased, about a third fewer denoiser calls, noisier. 'adjoint_matching': the
    same optimum with less variance; no gradient goes back through the policy. 'last_k': cheap and biased.
    'reinforce': for rewards without a gradient; it needs group_size >= 2 and large batches."""
    steps: Annotated[int, at_least(0)] = 0
    """last_k: how many of the last steps have a gradient (0 means 1). adjoint_matching: how many steps are matched
    (0 means all); fewer are cheaper."""
    keep_graphs: bool | Auto = False
    """full: keep the graph of every denoising step from the rollout to the adjoint pass, which then repeats no forward. With
    adapter.kind gains, policy and reference also share one forward. It saves time but holds the activations of all steps at
    once: for small denoisers. 'auto': on where the other settings allow it and the memory is known to suffice."""
    max_drift: Annotated[float, at_least(0)] = 0.0
    """The longest drift that one trajectory may ask of a denoising step, in standard deviations of the step's noise. The best
    drifts are short. The few trajectories that miss their class ask for huge ones, and make nearly all of the gradient's
    variance. The bound adds bias: the lower it is, the less KL and the less accuracy. 0: no bound."""
    final_max_drift: Annotated[float, at_least(0)] = 0.0
    """The bound grows geometrically to this value over the run, so that samples which miss their class are corrected when the
    learning rate is small. 0: it stays at max_drift."""
    full_probability: Annotated[float, share(without_0=True)] = 0.3
    """random_suffix: probability that the gradient goes through the whole trajectory. Higher: less variance, more
    denoiser calls."""

    def __post_init__(self) -> None:
        check_fields(self, "estimator")
        require(
            self.keep_graphs is not True or self.name == "full",
            f"estimator.keep_graphs is of the estimator full only, and estimator.name is {self.name}; set keep_graphs to False "
            "or auto",
        )
        require(
            self.max_drift > 0 or self.final_max_drift == 0,
            f"estimator.final_max_drift is {self.final_max_drift}, but max_drift, from which it grows, is 0; set "
            "both, or both to 0",
        )
        require(
            self.max_drift == 0 or self.name != "reinforce",
            f"estimator.max_drift is {self.max_drift}, but the estimator reinforce carries no cotangent to bound; set it and "
            "final_max_drift to 0",
        )

    @property
    def fixed_keep_graphs(self) -> bool:
        """keep_graphs as a bool; ConfigError while it is still to be decided."""
        return fixed(self.keep_graphs, "estimator.keep_graphs")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW or SGD, with one learning rate for LoRA (or the whole denoiser) and one for the control embeddings."""

    name: Literal["adamw", "sgd"] = "adamw"
    """'sgd' keeps one moment (momentum) instead of two. Its step is proportional to the gradient, so it does not
    amplify rounding errors as AdamW does. Use it for comparisons, and where memory is short."""
    momentum: Annotated[float, share(without_1=True)] = 0.9
    """sgd: decay of the momentum."""
    learning_rate: Annotated[float, at_least(0)] = 1e-3
    """Peak learning rate of LoRA (with full_finetune: of the whole denoiser)."""
    embedding_learning_rate: Annotated[float, at_least(0)] = 1e-2
    """Peak learning rate of the control embeddings. They start at zero and may move faster."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decoupled weight decay. It pulls the optimum towards the pre-trained model, but is not part of the KL."""
    beta1: Annotated[float, share(without_1=True)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, share(without_1=True)] = 0.99
    """Decay of AdamW's second moment. Runs are short, so it forgets faster than with the usual 0.999."""
    gradient_clipping: Annotated[float, at_least(0)] = 5.0
    """Clip the global gradient norm at this value. 0 switches clipping off."""
    warmup_updates: Annotated[int, at_least(0)] = 2
    """The learning rate rises linearly over this many updates."""
    final_learning_rate_fraction: Annotated[float, share()] = 0.1
    """The learning rate falls along a cosine to this fraction of its peak. 1.0: it stays constant."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        require(
            self.name != "sgd" or self.weight_decay == 0,
            f"optimizer.weight_decay is {self.weight_decay}, but torch's SGD has no decoupled weight decay; set it to 0 "
            "or use optimizer.name adamw",
        )
