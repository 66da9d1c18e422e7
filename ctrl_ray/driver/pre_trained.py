"""The pre-trained model's samples: what the report compares with, and log Z, which every evaluation is measured against."""

from __future__ import annotations

from dataclasses import dataclass, field

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.log_z import draw_for_log_z
from ctrl_ray.distributed.sampling import SamplingJob, evaluation_ids, sample_policy
from ctrl_ray.driver.remedies import with_remedies
from ctrl_ray.errors import DataError
from ctrl_ray.evaluation.samples import EvaluationSamples, load_samples, save_samples
from ctrl_ray.planning.preflight import CheckedRun
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.files import whole_file
from ctrl_ray.runs.folder import RunFolder

PRE_TRAINED_FILE = "pre_trained.safetensors"


@dataclass(frozen=True)
class PreTrained:
    """Samples of the pre-trained model, which no update changes."""

    shown: EvaluationSamples | None = field(default=None, repr=False)
    """The first `final_num_samples`, with their images; None: not drawn in this session."""
    scored: EvaluationSamples | None = field(default=None, repr=False)
    """All that were drawn for log Z, without images; None where the run has no target (`has_target`)."""


def has_target(config: TrainConfig) -> bool:
    """Whether there is a law that the run tends to: not without a KL, nor with one that is a mean over dimensions."""
    return config.kl_coef > 0 and config.latent_reduction == "sum"


def reference_job(checked: CheckedRun) -> SamplingJob:
    """Sampling the pre-trained model for the final evaluation of a checked run."""
    config = checked.config
    return SamplingJob(
        adapter=None,
        base_model=config.base_model,
        revision=config.base_revision,
        controls=config.controls,
        sampler=config.sampler,
        prompts=checked.evaluation_prompts,
        sample_ids=tuple(evaluation_ids(config.evaluation.final_num_samples)),
        seed=config.evaluation.seed,
        batch_size=config.evaluation.fixed_batch_size,
        reference=True,
        precision=config.scaling.precision,
    )


def sample_pre_trained(
    checked: CheckedRun,
    folder: RunFolder,
    rewards: PooledRewards | RewardModelSpec,
    known: PreTrained | None = None,
) -> PreTrained:
    """Draw what log Z needs before training starts, so that every evaluation tells how far it is; kept in
    `pre_trained.safetensors` of the run.

    known: what was drawn already for the same job, such as a sweep's for its trials.
    """
    known = known or PreTrained()
    if not has_target(checked.config):
        return PreTrained(known.shown)
    if (kept := _kept(checked, folder)) is not None:
        return PreTrained(known.shown, kept)
    config, job, shown = checked.config, reference_job(checked), known.shown
    with with_remedies(checked):
        if shown is None:
            print(f"log Z      drawing {len(job.sample_ids)} samples of the pre-trained model", flush=True)
            shown = sample_policy(job, rewards, config.scaling)
        first = known.scored or shown.without_images()
        scored = draw_for_log_z(first, job, rewards, config.scaling, config.controls, config.kl_coef, config.evaluation)
    with whole_file(folder / PRE_TRAINED_FILE) as draft:
        save_samples(scored, draft)
    folder.upload(PRE_TRAINED_FILE)
    return PreTrained(shown, scored)


def _kept(checked: CheckedRun, folder: RunFolder) -> EvaluationSamples | None:
    """The samples of an earlier session, unless they are too few or of other prompts."""
    file = folder / PRE_TRAINED_FILE
    if not file.is_file():
        return None
    try:
        kept = load_samples(file)
    except DataError:
        return None
    enough = len(kept) >= checked.config.evaluation.fewest_pre_trained
    return kept if enough and set(kept.prompts) <= set(checked.evaluation_prompts) else None
