"""Every metric that a run may log: what it means, its unit and which way is better. An undefined name fails.

Add a metric here, and nowhere else; the report, `metrics.jsonl` and Aim read this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """One line of the table."""

    meaning: str
    """What the number is, with its reduction."""
    unit: str
    """Unit, '1' for a pure number or a share."""
    higher_is_better: bool | None = None
    """None: neither direction is a goal by itself."""


METRICS: dict[str, MetricDefinition] = {
    # One optimizer update.
    "reward": MetricDefinition(
        "mean over the samples with a label of Σ guidance_strength · log p(y|x,c), by the reward classifier",
        "nats",
        True,
    ),
    "log_prob/*": MetricDefinition(
        "mean over the samples with a label of log p(y|x,c) of this control, by the reward classifier", "nats", True
    ),
    "loss": MetricDefinition("-Σ guidance_strength · log p(y|x,c) + kl_coef · KL, mean over samples", "nats", False),
    "denoising_loss": MetricDefinition(
        "squared error of what the denoiser predicts of noised images of the data set, with their prompts and labels, mean "
        "over images and latent dimensions (training_method cfg)",
        "1",
        False,
    ),
    "bounded": MetricDefinition(
        "share of the denoising steps that were gone back through whose cotangent was shortened (estimator.max_drift)",
        "1",
    ),
    "gradient_norm": MetricDefinition("global L2 norm of the gradient, before clipping", "1"),
    "learning_rate": MetricDefinition("learning rate of the LoRA (or denoiser) weights", "1"),
    "kl_noise_floor": MetricDefinition(
        "kl as this run's precision and guidance read it, of a policy whose true KL is below 0.001 nats: less cannot "
        "be told from rounding. Measured once, before the first update, on 8 samples",
        "nats",
        False,
    ),
    "classifier_confidence": MetricDefinition("mean p(y|x,c) of the class asked for, by the reward classifier", "1"),
    "samples_per_s": MetricDefinition(
        "trajectories (training_method cfg: images) per second of wall-clock time, over all workers", "1/s", True
    ),
    "update_s": MetricDefinition("wall-clock time of one update", "s", False),
    "rollout_s": MetricDefinition("time in sampling trajectories, per update", "s", False),
    "reward_wait_s": MetricDefinition("time waiting for the reward's answer, per update", "s", False),
    "backward_s": MetricDefinition(
        "time in the adjoint pass (training_method cfg: the loss and its gradient) and the optimizer step, per update",
        "s",
        False,
    ),
    # Updates and evaluations.
    "kl": MetricDefinition(
        "KL divergence of the policy from the pre-trained model along the trajectory, summed over steps and latent "
        "dimensions, mean over samples",
        "nats",
        False,
    ),
    "kl_null": MetricDefinition(
        "the same KL, mean over the samples whose labels are all null: how far the policy without a label has left the "
        "pre-trained model",
        "nats",
        False,
    ),
    # One evaluation.
    "accuracy": MetricDefinition(
        "share of samples whose true class is the class asked for; the mean over controls when there are several",
        "1",
        True,
    ),
    "accuracy/*": MetricDefinition("accuracy of this control", "1", True),
    "joint_accuracy": MetricDefinition("share of samples that have every class asked for", "1", True),
    "macro_f1": MetricDefinition(
        "F1 score of every class, averaged with equal weights; the mean over controls when there are several", "1", True
    ),
    "macro_f1/*": MetricDefinition("macro-F1 of this control", "1", True),
    "prompt_fidelity": MetricDefinition(
        "how well samples show what their prompt says, by a judge that had no part in training: a share for the shapes "
        "recogniser, a cosine similarity for a CLIP model",
        "1",
        True,
    ),
    "clip_score": MetricDefinition(
        "cosine similarity of a CLIP model's embeddings of image and prompt (Hessel et al. 2021, unscaled), mean over samples "
        "(evaluation.clip_model)",
        "1",
        True,
    ),
    "brisque": MetricDefinition(
        "BRISQUE (Mittal et al. 2012), how unlike a natural image's the local statistics of a sample are: about 0, natural, to "
        "100, distorted; mean over samples (evaluation.brisque_model)",
        "1",
        False,
    ),
    "diversity": MetricDefinition(
        "mean RMS pixel distance (pixels in [0, 1]) between two images of the same class, averaged over classes; "
        "classes are those asked for after training, and the true ones before",
        "1",
        True,
    ),
    "belief_gap": MetricDefinition(
        "what the reward classifier believes, mean p(y|x,c) of the class asked for, minus the true accuracy; the mean over "
        "controls",
        "1",
    ),
    "belief_gap/*": MetricDefinition("belief gap of this control", "1"),
    "num_samples": MetricDefinition("samples that were judged", "1"),
    "objective": MetricDefinition(
        "Σ guidance_strength / kl_coef · log p(y|x,c) minus the log-ratio of the path's densities, policy over pre-trained "
        "model, mean over samples",
        "nats",
        True,
    ),
    "log_z": MetricDefinition(
        "log of the pre-trained samples' mean of Π p(y|x,c)^(guidance_strength / kl_coef), mean over the labels asked for: no "
        "sampler's objective is above it",
        "nats",
    ),
    "gap": MetricDefinition("log_z - objective: KL divergence of the policy's paths from the target's", "nats", False),
    "gap_standard_error": MetricDefinition("standard error of gap", "nats", False),
    "ess": MetricDefinition(
        "effective sample size of the samples weighted to the target, as a share of their number", "1", True
    ),
    "pareto_k": MetricDefinition("shape of the tail of those weights; above 0.7 they cannot be trusted", "1", False),
}
"""Name (or `NAME/*`, one per control) to definition."""

CERTIFICATE_METRICS = ("objective", "log_z", "gap", "gap_standard_error", "ess", "pareto_k")
"""Of the certificate (`ctrl_ray.evaluation.certificate`), the numbers that are curves, also as `NAME/CONTROL/CLASS`."""

METRICS |= {
    f"{name}/*": dataclasses.replace(
        METRICS[name], meaning=f"{METRICS[name].meaning}; of the samples that ask for this class"
    )
    for name in CERTIFICATE_METRICS
}

SCORES = ("clip_score", "brisque")
"""Numbers of each image that an evaluation has where a model for them is given."""

EVALUATION_METRICS: tuple[str, ...] = (
    "accuracy",
    "joint_accuracy",
    "macro_f1",
    "prompt_fidelity",
    *SCORES,
    "kl",
    "diversity",
    "belief_gap",
    "num_samples",
)
"""The headline numbers of an evaluation, in the order a report shows them."""


def definition(name: str) -> MetricDefinition:
    """The definition of `name`; `accuracy/jpeg_size` finds `accuracy/*`.

    Raises:
        ValueError: The name is not in the table.
    """
    family, separator, control = name.partition("/")
    key = f"{family}/*" if separator and control and control != "*" else name
    if key not in METRICS or (key == name and separator):
        raise ValueError(
            f"metric {name!r} is not defined; known names are {sorted(METRICS)}. Define it in "
            "ctrl_ray/evaluation/metric_names.py"
        )
    return METRICS[key]


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError, naming the metric, unless every name is defined."""
    for name in names:
        definition(name)
