"""Every setting of a run, as frozen dataclasses: what it means and what it costs. No torch, no ray here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from ctrl_ray import embedded
from ctrl_ray.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""Of a denoiser's weights and products; see `ScalingConfig.precision`."""

Auto = Literal["auto"]
"""A value that is decided when a run is prepared (`ctrl_ray.planning.choose`), from its machines and counted memory.
config.json records what was asked; everything behind the preflight sees a number."""

_T = TypeVar("_T", int, float, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _fixed(value: _T | Auto, name: str) -> _T:
    """The value; ConfigError while it is still to be decided."""
    if isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}: it becomes a number when a run is prepared")
    return value


def _is_auto_or(value: float | str, least: float) -> bool:
    return value == "auto" or (not isinstance(value, str) and value >= least)


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """One control y: its classes, what measures it, and how hard it pulls."""

    guidance_strength: float = 1.0
    """gamma, how hard this control pulls. The target is p_pre(x|c) p(y|x,c)^(guidance_strength / kl_coef), so with
    kl_coef = 1 it is the exponent itself. Higher: more accurate, more KL, less diverse."""
    oracle: str | None = None
    """What measures the true value of an image: 'jpeg_size', 'colourfulness' or 'my_module:my_oracle' (a function
    from a PIL image to a number). None: nothing does; then only a classifier can judge the accuracy after training."""
    thresholds: tuple[float, ...] = ()
    """Class borders of a measured number, ascending: class i is [thresholds[i-1], thresholds[i]). Empty: the data
    column already holds integer labels."""
    classes: tuple[str, ...] = ()
    """Class names, one for each output of the classifier. Empty with thresholds: the names are made from the
    thresholds."""
    unit: str = ""
    """Unit of the measured number, such as 'bytes'. Pictures show it."""
    column: str | None = None
    """Column of the offline data set. None: the control's name."""
    classifier: str | None = None
    """Folder of a fitted classifier. None: stage 1 fits one from `data`."""
    label_weights: tuple[float, ...] = ()
    """How often training draws each class, as relative weights. Empty: all classes equally often."""

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.guidance_strength) and self.guidance_strength >= 0,
            f"guidance_strength is {self.guidance_strength}; expected a finite number >= 0 (0 switches the control off)",
        )
        _require(
            list(self.thresholds) == sorted(set(self.thresholds)),
            f"thresholds {self.thresholds} must be strictly ascending",
        )
        if self.thresholds and self.classes:
            _require(
                len(self.classes) == len(self.thresholds) + 1,
                f"{len(self.thresholds)} thresholds make {len(self.thresholds) + 1} classes, but classes names "
                f"{len(self.classes)}: {self.classes}",
            )
        if self.label_weights:
            _require(
                len(self.label_weights) == self.num_classes
                and min(self.label_weights) >= 0
                and sum(self.label_weights) > 0,
                f"label_weights {self.label_weights} must hold one weight >= 0 for each of the {self.num_classes} "
                "classes, not all zero",
            )

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 while unknown (a classifier folder given, not yet read)."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, made from the thresholds where none are given: '<1500', '1500-1700', '>=1700'."""
        if self.classes or not self.thresholds:
            return self.classes
        t = [f"{value:g}" for value in self.thresholds]
        return (f"<{t[0]}", *(f"{low}-{high}" for low, high in zip(t, t[1:], strict=False)), f">={t[-1]}")

    def classify(self, value: float) -> int:
        """Class index of a measured value: the number of thresholds that are <= value."""
        return sum(value >= threshold for threshold in self.thresholds)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """Stage 1: how p(y|x,c) is fitted and calibrated."""

    network: str = "cnn"
    """'cnn' (small convolutional network), 'clip:NAME_OR_FOLDER' (head on a CLIP vision tower), or
    'transformers:NAME_OR_FOLDER' (any image-classification backbone)."""
    prompt_conditional: bool = False
    """Give the classifier the prompt too. It needs the prompt when y depends on it even for a given image."""
    epochs: int = 12
    """Passes over the fitting split. The epoch with the lowest negative log-likelihood on the selection split is
    kept."""
    learning_rate: float = 2e-3
    """Peak learning rate of the one-cycle schedule (AdamW)."""
    weight_decay: float = 0.01
    """AdamW weight decay of the network."""
    batch_size: int = 128
    """Images per optimizer update, over all workers."""
    max_images: int | None = None
    """Use at most this many rows of the data set. None: all."""
    num_pipeline_samples: int = 0
    """Also fit on this many samples of the pre-trained pipeline, labelled by the oracle, because the reward will
    judge images of this kind. The control needs an oracle for it."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the rows for fitting, for choosing the epoch, and for temperature scaling."""
    decode: bool = True
    """Pass every image through the pipeline's VAE first, and measure its label again where there is an oracle. The
    reward sees only decoded images."""
    num_workers: int = 1
    """Ray Train workers that fit the classifier."""

    def __post_init__(self) -> None:
        _require(
            len(self.split) == 3 and min(self.split) > 0 and abs(sum(self.split) - 1) < 1e-6,
            f"classifier split {self.split} must be three positive shares that add up to 1",
        )
        for name in ("epochs", "batch_size", "num_workers"):
            _require(getattr(self, name) >= 1, f"classifier {name} is {getattr(self, name)}; expected at least 1")
        kind = self.network.partition(":")[0]
        _require(
            self.network == "cnn" or (kind in ("clip", "transformers") and ":" in self.network),
            f"classifier network {self.network!r} is unknown; expected 'cnn', 'clip:NAME_OR_FOLDER' or "
            "'transformers:NAME_OR_FOLDER'",
        )


NullBranch = Literal["pre_trained", "class"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """The sampler that the policy is trained for. The guarantee holds for these values only; the adapter stores
    them."""

    num_steps: int = 10
    """Denoising steps. The denoiser calls per sample grow in proportion."""
    eta: float = 1.0
    """DDIM stochasticity. The theory needs a sampler that forgets its initial noise; 1 does so (nearly). 0 is
    refused with a KL, because its steps have no density."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the prompt. 1.0 switches it off; any other value doubles the denoiser's work."""
    control_scale: float | None = None
    """A guidance scale for the label alone (three denoiser branches). None: prompt and label share guidance_scale."""
    null_branch: NullBranch = "pre_trained"
    """With a guidance_scale other than 1: whose the unconditional branch is. 'pre_trained': without prompt and label, as in
    the paper. 'class': without prompt but with the label, as tools do that know an exported class as an ordinary LoRA."""
    reference_steps: int = 0
    """The pre-trained model takes this many of the last denoising steps, in training and in sampling. They are a
    fixed part of the reward. The last step or two have so little noise that any deviation there costs a large KL and
    gains nothing; 1 makes training far better conditioned."""

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, f"num_steps is {self.num_steps}; expected at least 1")
        _require(0 <= self.eta <= 1, f"eta is {self.eta}; expected a number in [0, 1]")
        _require(
            self.control_scale is None or self.null_branch == "pre_trained",
            f"control_scale is {self.control_scale} and null_branch 'class', but a direction of the label alone starts at a "
            "branch without it; set null_branch to pre_trained, or leave control_scale out",
        )
        _require(
            0 <= self.reference_steps < self.num_steps,
            f"reference_steps is {self.reference_steps}; expected 0 to num_steps - 1 ({self.num_steps - 1})",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation of the denoiser's attention projections."""

    rank: int = 8
    """Rank of each layer's low-rank matrices. The number of trainable parameters grows in proportion."""
    alpha: float = 8.0
    """The product of the low-rank matrices is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names, or endings of names, of the layers that get LoRA."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"lora rank is {self.rank}; expected at least 1")


AdapterKind = Literal["gains", "embedding", "both"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """How a label reaches the denoiser. With `full_finetune` it is by control embeddings, whatever is set here."""

    kind: AdapterKind = "embedding"
    """'gains': each class turns the ranks of LoRA up, down or round; without a label the policy is the pre-trained model,
    bit for bit, and every class is exported as a LoRA file that plain diffusers loads. 'embedding': the paper's label
    embedding, added to the time embedding, beside one LoRA for all classes. 'both': gains and the embedding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorConfig:
    """How the gradient of the objective is estimated (`ctrl_ray.gradients.estimators`)."""

    name: Literal["full", "sticking_the_landing", "last_k", "random_suffix", "adjoint_matching", "reinforce"] = "full"
    """'full': exact. 'sticking_the_landing': the same mean, less variance near the optimum, two fifths more
    denoiser calls. 'random_suffix': unbiased, about a third fewer denoiser calls, noisier. 'adjoint_matching': the
    same optimum with less variance; no gradient goes back through the policy. 'last_k': cheap and biased.
    'reinforce': for rewards without a gradient; it needs group_size >= 2 and large batches."""
    steps: int = 0
    """last_k: how many of the last steps have a gradient (0 means 1). adjoint_matching: how many steps are matched
    (0 means all); fewer are cheaper."""
    keep_graphs: bool = False
    """full: keep the graph of every denoising step from the rollout to the adjoint pass, which then computes no forward
    again; with adapter.kind gains policy and reference are one forward too. Less time, and the activations of all steps
    at once: for small denoisers."""
    max_drift: float = 0.0
    """The longest drift, in standard deviations of a denoising step's noise, that one trajectory may ask of a step. The best
    drifts are short. The few trajectories that miss their class ask for huge ones, and are nearly all of the gradient's
    variance. Biased while it binds: the lower, the less KL and the less accuracy. 0: no bound."""
    final_max_drift: float = 0.0
    """The bound grows geometrically to this over the run, so that what misses its class is brought in when the learning rate is
    small. 0: it stays at max_drift."""
    full_probability: float = 0.3
    """random_suffix: probability that the gradient goes through the whole trajectory. Higher: less variance, more
    denoiser calls."""

    def __post_init__(self) -> None:
        _require(
            not self.keep_graphs or self.name == "full",
            f"estimator.keep_graphs is of the estimator full only, and estimator.name is {self.name}; leave it out",
        )
        _require(
            0 <= self.max_drift < math.inf and 0 <= self.final_max_drift < math.inf,
            f"estimator.max_drift is {self.max_drift} and final_max_drift {self.final_max_drift}; expected numbers >= 0",
        )
        _require(
            self.max_drift > 0 or self.final_max_drift == 0,
            f"estimator.final_max_drift is {self.final_max_drift}, but max_drift, from which it grows, is 0; set both",
        )
        _require(
            self.max_drift == 0 or self.name != "reinforce",
            f"estimator.max_drift is {self.max_drift}, but the estimator reinforce carries no cotangent to bound; leave it out",
        )
        _require(self.steps >= 0, f"estimator.steps is {self.steps}; expected 0 (the default) or more")
        _require(
            0 < self.full_probability <= 1,
            f"estimator.full_probability is {self.full_probability}; expected a probability in (0, 1]",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW or SGD, with one learning rate for LoRA (or the whole denoiser) and one for the control embeddings."""

    name: Literal["adamw", "sgd"] = "adamw"
    """'sgd' keeps one moment (momentum) instead of two. Its step is proportional to the gradient, so it does not
    amplify rounding errors as AdamW does. Use it for comparisons, and where memory is short."""
    momentum: float = 0.9
    """sgd: decay of the momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate of LoRA (with full_finetune: of the whole denoiser)."""
    embedding_learning_rate: float = 1e-2
    """Peak learning rate of the control embeddings. They start at zero and may move faster."""
    weight_decay: float = 0.0
    """Decoupled weight decay. It pulls the optimum towards the pre-trained model, but is not part of the KL."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.99
    """Decay of AdamW's second moment. Runs are short, so it forgets faster than with the usual 0.999."""
    gradient_clipping: float = 5.0
    """Clip the global gradient norm at this value. 0 switches clipping off."""
    warmup_updates: int = 2
    """The learning rate rises linearly over this many updates."""
    final_learning_rate_fraction: float = 0.1
    """The learning rate falls along a cosine to this fraction of its peak. 1.0: it stays constant."""

    def __post_init__(self) -> None:
        _require(0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}; expected a number in [0, 1)")
        _require(
            self.name != "sgd" or self.weight_decay == 0,
            f"optimizer.weight_decay is {self.weight_decay}, but torch's SGD has no decoupled weight decay; set it to 0 "
            "or use optimizer.name adamw",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardPoolConfig:
    """The Ray actors that decode latents and answer log p(y|x,c) with its gradient."""

    num_actors: int = 1
    """Actors at the start. 0: there is no pool, and each training worker computes its own rewards."""
    min_actors: int | None = None
    """The pool never shrinks below this number. None: num_actors."""
    max_actors: int | None = None
    """The pool never grows above this number. None: num_actors. Leave room for them: a pool that grows takes what is
    free."""
    grow_after_s: float = 5.0
    """Add an actor when requests have waited for busy actors for this long without a break."""
    shrink_after_s: float = 60.0
    """Stop an actor when there have been fewer open requests than actors for this long without a break."""
    cpus_per_actor: float = 1.0
    """CPUs (fractions allowed) that Ray reserves for an actor."""
    threads_per_actor: int | None = None
    """torch threads of an actor on the CPU. None: cpus_per_actor, rounded up."""
    gpus_per_actor: float | Auto = 0.0
    """GPUs that Ray reserves for an actor. With a fraction, several actors share one GPU, or an actor shares it with a
    worker (scaling.gpus_per_worker). 'auto': so small a share that all actors have room beside a worker on any card."""
    placement: Literal["pack", "spread"] = "pack"
    """'pack' is Ray's default: half of a node is filled before the next one is used. 'spread' distributes the actors
    over all nodes, so that a lost node takes fewer of them along."""
    node_resource: str | None = None
    """Put actors only on nodes that have this custom Ray resource; each actor takes 0.001 of it. Give it to CPU
    nodes only, and the pool stays off GPU nodes. None: any node."""
    deterministic: bool = True
    """Each request gets its own forward pass, so that a repeated run is bitwise equal on the CPU. False: requests
    that wait together share one, within the two limits below."""
    max_batch_size: int = 64
    """With deterministic False: the most samples that share a forward pass."""
    max_batch_delay_s: float = 0.005
    """With deterministic False: the longest time that a request waits for others to share its forward pass."""
    max_pending_per_worker: int = 4
    """A worker with this many unanswered requests waits before it submits another. The object store thus never holds
    more than workers × this many requests and answers. Two are enough to overlap rollout and scoring."""
    timeout_s: float = 300.0
    """An actor that works on one request for longer than this is replaced, and another actor gets the request.
    Without another actor the request fails with an error; the workers do not hang."""
    decode_chunk_size: int | Auto = 32
    """Images decoded at a time. It limits the memory of scoring and changes no result. 'auto': up to 8, as many as fit
    beside what training takes."""

    def __post_init__(self) -> None:
        _require(self.num_actors >= 0, f"rewards.num_actors is {self.num_actors}; expected 0 (local) or more")
        low, high = self.actor_bounds
        _require(
            min(1, self.num_actors) <= low <= self.num_actors <= high and (self.num_actors > 0 or high == 0),
            f"rewards.min_actors ({low}) ≤ rewards.num_actors ({self.num_actors}) ≤ rewards.max_actors ({high}) does not "
            "hold, with at least 1 actor in a pool and none where rewards are local (num_actors = 0)",
        )
        for name in ("timeout_s", "grow_after_s", "shrink_after_s"):
            value = getattr(self, name)
            _require(value > 0, f"rewards.{name} is {value}; expected a positive number of seconds")
        _require(self.max_batch_delay_s >= 0, f"rewards.max_batch_delay_s is {self.max_batch_delay_s}; expected >= 0")
        for name in ("decode_chunk_size", "max_batch_size", "max_pending_per_worker"):
            _require(_is_auto_or(getattr(self, name), 1), f"rewards.{name} is {getattr(self, name)}; expected >= 1")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            _require(
                _is_auto_or(getattr(self, name), 0), f"rewards.{name} is {getattr(self, name)}; expected 0 or more"
            )

    @property
    def actor_bounds(self) -> tuple[int, int]:
        """Fewest and most actors that the pool may have."""
        low = self.num_actors if self.min_actors is None else self.min_actors
        return low, self.num_actors if self.max_actors is None else self.max_actors

    @property
    def fixed_gpus_per_actor(self) -> float:
        """gpus_per_actor as a number; ConfigError while it is still to be decided."""
        return _fixed(self.gpus_per_actor, "rewards.gpus_per_actor")

    @property
    def fixed_decode_chunk_size(self) -> int:
        """decode_chunk_size as a number; ConfigError while it is still to be decided."""
        return _fixed(self.decode_chunk_size, "rewards.decode_chunk_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """The workers, and how DeepSpeed shards over them."""

    num_workers: int | Auto = 1
    """Ray Train workers. Each is one DeepSpeed rank with one GPU (or cpus_per_worker CPUs). 'auto': as many as fit
    the cluster beside the reward pool, and have a group of the global batch each."""
    use_gpu: bool = False
    """A GPU for each worker. False trains on the CPU with gloo."""
    gpus_per_worker: float | Auto = 1.0
    """With use_gpu: the share of its GPU that Ray reserves for a worker, above 0.5 because a card can hold one worker only.
    What is left of each card is for reward actors and asynchronous evaluation. It is a reservation and limits neither
    memory nor speed. 'auto': the whole card, or what small shares of those leave."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a worker."""
    threads_per_worker: int | None = None
    """torch threads of a worker on the CPU. None: cpus_per_worker, rounded up."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage. 1 suits LoRA; 2 and 3 are for full fine-tuning and backbones that do not fit."""
    zero3_persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters of at most this many elements whole on every worker (usually all of LoRA's), which
    saves gathers. 0 shards every parameter: least memory, slowest."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What DeepSpeed keeps in CPU memory. 'optimizer': the moments, and the update runs there too (ZeRO 1 to 3).
    'optimizer_and_parameters': the parameter shards as well (ZeRO-3). Slower, but frees GPU memory."""
    precision: Precision = "fp32"
    """Precision of the frozen backbone. Latents, KL, cotangents and trainable parameters are always float32.
    'fp32' is exact float32; 'tf32' is float32 with a GPU's faster, coarser products. 'bf16' and 'fp16' take half the
    memory, and the denoiser's last norm and convolution stay float32. Rounding counts as KL: each run measures how much
    (kl_noise_floor) and prints it. fp16 rounds 8 times finer than bf16, and its cotangents are scaled."""
    gradient_checkpointing: bool | Auto = False
    """Recompute activations in the backward pass: less memory, about one more forward per step. 'auto': where it makes
    the update faster by the planner's model, because a larger micro-batch fits."""
    max_failures: int = 3
    """How many times the run restarts from its last checkpoint after it has lost a worker, before it gives up."""
    min_workers: int | None = None
    """Elastic training: when nodes are lost, go on with as few workers as this; when nodes return, grow back to
    num_workers. The global batch and its samples stay the same. None: always num_workers."""
    resize_check_s: float = 60.0
    """Elastic training: seconds between two checks whether the group can grow. When it grows, it goes back to the
    last checkpoint."""
    placement_timeout_s: float = 1800.0
    """End the run (you can resume it) when workers or reward actors have waited for machines for this long, so that
    you do not pay for machines that arrived while others are still missing."""

    def __post_init__(self) -> None:
        _require(
            self.num_workers == "auto" or (isinstance(self.num_workers, int) and self.num_workers >= 1),
            f"scaling.num_workers is {self.num_workers}; expected at least 1, or auto",
        )
        _require(
            self.precision in get_args(Precision),
            f"scaling.precision is {self.precision!r}; expected one of {', '.join(get_args(Precision))}",
        )
        _require(self.cpus_per_worker > 0, f"scaling.cpus_per_worker is {self.cpus_per_worker}; expected > 0")
        share = 1.0 if isinstance(self.gpus_per_worker, str) else self.gpus_per_worker
        _require(
            0.5 < share <= 1 or (0 < share <= 0.5 and self.num_workers == 1),
            f"scaling.gpus_per_worker is {self.gpus_per_worker} with scaling.num_workers {self.num_workers}; expected a "
            "share above 0.5 and at most 1 (two workers cannot have one card: NCCL refuses that), or above 0 for one worker",
        )
        most = math.inf if self.num_workers == "auto" else self.num_workers
        _require(
            self.min_workers is None or 1 <= self.min_workers <= most,
            f"scaling.min_workers is {self.min_workers}; expected 1 to scaling.num_workers ({self.num_workers})",
        )
        _require(
            self.placement_timeout_s > 0,
            f"scaling.placement_timeout_s is {self.placement_timeout_s}; expected a positive number of seconds",
        )
        _require(self.resize_check_s >= 0, f"scaling.resize_check_s is {self.resize_check_s}; expected >= 0")
        _require(
            self.zero3_persistence_threshold >= 0,
            f"scaling.zero3_persistence_threshold is {self.zero3_persistence_threshold}; expected >= 0",
        )
        _require(
            self.offload == "none" or self.zero_stage >= 1,
            f"scaling.offload is {self.offload!r}, which needs ZeRO; got scaling.zero_stage {self.zero_stage}: set it to "
            "1, 2 or 3",
        )
        _require(
            self.offload != "optimizer_and_parameters" or self.zero_stage == 3,
            f"scaling.offload 'optimizer_and_parameters' needs scaling.zero_stage 3; got {self.zero_stage}",
        )

    @property
    def num_threads(self) -> int:
        """torch threads of a worker on the CPU."""
        return self.threads_per_worker or max(1, math.ceil(self.cpus_per_worker))

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for a worker: CPUs, and (a share of) a GPU where it has one."""
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": self.fixed_gpus_per_worker} if self.use_gpu else {})

    @property
    def fixed_num_workers(self) -> int:
        """num_workers as a number; ConfigError while it is still to be decided."""
        return _fixed(self.num_workers, "scaling.num_workers")

    @property
    def fixed_gpus_per_worker(self) -> float:
        """gpus_per_worker as a number; ConfigError while it is still to be decided."""
        return _fixed(self.gpus_per_worker, "scaling.gpus_per_worker")

    @property
    def fixed_gradient_checkpointing(self) -> bool:
        """gradient_checkpointing as a bool; ConfigError while it is still to be decided."""
        return _fixed(self.gradient_checkpointing, "scaling.gradient_checkpointing")


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
    not 0, from the noise before those steps), to tell which part of the gap no training removes; a fifth as many of the
    policy's paths tell what its fixed variances cost. 0: that is not told."""
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
        _require(self.num_cpus >= 0, f"evaluation.num_cpus is {self.num_cpus}; expected 0 or more")
        _require(self.num_gpus >= 0, f"evaluation.num_gpus is {self.num_gpus}; expected 0 or more")
        _require(self.every_updates >= 0, f"evaluation.every_updates is {self.every_updates}; expected >= 0")
        _require(self.num_pairs >= 0, f"evaluation.num_pairs is {self.num_pairs}; expected >= 0")
        for name in ("num_samples", "final_num_samples", "log_z_samples", "batch_size"):
            _require(
                _is_auto_or(getattr(self, name), 1), f"evaluation.{name} is {getattr(self, name)}; expected at least 1"
            )

        _require(
            self.max_log_z_samples >= self.log_z_samples,
            f"evaluation.max_log_z_samples is {self.max_log_z_samples}; expected at least log_z_samples, {self.log_z_samples}",
        )
        _require(
            self.log_z_standard_error > 0,
            f"evaluation.log_z_standard_error is {self.log_z_standard_error}; expected a number above 0",
        )

    @property
    def fixed_batch_size(self) -> int:
        """batch_size as a number; ConfigError while it is still to be decided."""
        return _fixed(self.batch_size, "evaluation.batch_size")

    @property
    def fewest_pre_trained(self) -> int:
        """Samples of the pre-trained model that are drawn in any case, for the report and for log Z."""
        return max(self.final_num_samples, self.log_z_samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All settings of one run. A preset is a function that returns them (`ctrl_ray.config.presets`)."""

    output_dir: str = "runs/shapes"
    """Where the run is written (see the README's 'where the results lie')."""
    base_model: str = embedded.NAME
    """'shapes' (ships with the package), a folder in the diffusers format, or a hub id."""
    base_revision: str | None = None
    """Hub revision of base_model."""
    controls: dict[str, ControlConfig] = field(default_factory=dict)
    """The controls by name. Several can be combined."""
    data: str | None = None
    """Offline data set for stage 1, a Parquet file or folder. 'shapes': the images of the built-in example are
    drawn."""
    num_drawn_images: int = 6000
    """With data 'shapes': how many images are drawn."""
    prompts_file: str | None = None
    """File of prompts to train on, one per line. None: the prompt column of the data set, or the prompts of the
    built-in example."""
    seed: int = 0
    """Seed of every random draw, together with (update, sample id, purpose)."""
    num_updates: int = 60
    """Optimizer updates."""
    global_batch_size: int = 64
    """Trajectories per update, over all workers. Where it does not divide, some workers have one group more."""
    micro_batch_size_per_worker: int | Auto = 32
    """Trajectories that a worker holds at a time. One micro-batch is scored while the next one is sampled. 'auto': the
    largest that fits its memory, made even over the micro-batches of an update."""
    group_size: int = 1
    """This many consecutive samples share prompt and label. The estimator 'reinforce' compares them with each other."""
    kl_coef: float = 1.0
    """beta: weight of the KL to the pre-trained model, in nats. Lower: more reward, more KL."""
    latent_reduction: Literal["sum", "mean"] = "sum"
    """How the KL is reduced over latent dimensions. 'sum' is the method's. 'mean' is the public reference code's;
    its exponent depends on the number of latent dimensions."""
    control_dropout: float | Auto = "auto"
    """Share of samples that get the null label (strength 0), so that the policy without a label stays the reference. 'auto':
    0 for one control with adapter.kind gains, which add nothing without a label, else 0.1. Several controls need it with gains
    too: the policy with a label of one of them is to ignore the others."""
    label_draws: Literal["independent", "systematic"] = "independent"
    """How an update's labels are drawn. 'systematic': every class as often as its share says, to one, in a random order; less
    noise where batches are small."""
    target_kl: float | None = None
    """Stop early when the KL of an evaluation is above this many nats. The best checkpoint below it is exported. It must
    be at least twice the kl_noise_floor, which the run measures when it starts."""
    full_finetune: bool = False
    """Train every weight of the denoiser instead of LoRA. A frozen copy stays in memory as the reference."""
    init_adapter: str | None = None
    """Adapter folder to go on from. A control that it does not have is added to it."""
    checkpoint_every_updates: int = 10
    """Updates between two checkpoints. A crash loses at most this many."""
    num_checkpoints_to_keep: int = 2
    """How many checkpoints stay on disk: the latest and the best."""
    export_images: int = 8
    """Images per class in the report and in Aim."""
    aim: bool = True
    """Also write the metrics and images to an Aim repository under output_dir."""
    aim_repo: str | None = None
    """Another Aim repository: a folder that no other process writes to, or aim://HOST:PORT of a tracking server."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The sampler that the policy is trained for."""
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    """Gradient estimator."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """How labels reach the denoiser."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adaptation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    rewards: RewardPoolConfig = field(default_factory=RewardPoolConfig)
    """Reward pool."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Workers and sharding."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Stage 1."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How the policy is judged."""

    def __post_init__(self) -> None:
        _require(self.num_updates >= 1, f"num_updates is {self.num_updates}; expected at least 1")
        _require(self.global_batch_size >= 1, f"global_batch_size is {self.global_batch_size}; expected at least 1")
        micro_batch = self.micro_batch_size_per_worker
        _require(
            _is_auto_or(micro_batch, 1), f"micro_batch_size_per_worker is {micro_batch}; expected at least 1, or auto"
        )
        _require(
            self.group_size >= 1 and (isinstance(micro_batch, str) or micro_batch % self.group_size == 0),
            f"group_size is {self.group_size}; expected a divisor of micro_batch_size_per_worker ({micro_batch})",
        )
        _require(
            self.global_batch_size % self.group_size == 0,
            f"global_batch_size ({self.global_batch_size}) must be divisible by group_size ({self.group_size}), so that "
            f"every group is whole; try {-(-self.global_batch_size // self.group_size) * self.group_size}",
        )
        if self.scaling.num_workers != "auto":
            groups = self.global_batch_size // self.group_size
            _require(
                groups >= self.scaling.fixed_num_workers,
                f"global_batch_size ({self.global_batch_size}) has {groups} groups of group_size ({self.group_size}), which is "
                f"not one for each of the {self.scaling.num_workers} workers; take a global_batch_size of at least "
                f"{self.scaling.fixed_num_workers * self.group_size}, or fewer workers",
            )
        _require(
            self.estimator.name != "reinforce" or self.group_size >= 2,
            "the estimator reinforce compares samples that share prompt and label, but group_size is 1; set it to 4 or "
            "more",
        )
        _require(
            not self.estimator.keep_graphs
            or (
                self.scaling.zero_stage < 3
                and self.scaling.gradient_checkpointing is False
                and self.scaling.precision != "fp16"
            ),
            "estimator.keep_graphs keeps the activations of every denoising step, which does not go with scaling.zero_stage 3, "
            f"gradient_checkpointing or fp16; got zero_stage {self.scaling.zero_stage}, gradient_checkpointing "
            f"{self.scaling.gradient_checkpointing} and precision {self.scaling.precision}: leave keep_graphs out",
        )
        _require(
            math.isfinite(self.kl_coef) and self.kl_coef >= 0,
            f"kl_coef is {self.kl_coef}; expected a finite number >= 0",
        )
        _require(
            self.kl_coef > 0 or self.estimator.max_drift == 0,
            f"estimator.max_drift is {self.estimator.max_drift} and kl_coef 0, but without a KL no drift is too long; set "
            "max_drift to 0",
        )
        _require(
            self.sampler.eta > 0,
            f"eta is {self.sampler.eta}: a deterministic step has no density, so its KL to the pre-trained model does "
            "not exist; set sampler.eta to 1.0",
        )
        _require(
            self.control_dropout == "auto" or 0 <= self.fixed_control_dropout < 1,
            f"control_dropout is {self.control_dropout}; expected a share in [0, 1), or auto",
        )
        _require(
            self.checkpoint_every_updates >= 1,
            f"checkpoint_every_updates is {self.checkpoint_every_updates}; expected at least 1",
        )

    @property
    def fixed_micro_batch_size(self) -> int:
        """micro_batch_size_per_worker as a number; ConfigError while it is still to be decided."""
        return _fixed(self.micro_batch_size_per_worker, "micro_batch_size_per_worker")

    @property
    def fixed_control_dropout(self) -> float:
        """control_dropout as a number."""
        if self.control_dropout == "auto":
            return 0.0 if self.adapter.kind == "gains" and len(self.controls) == 1 else 0.1
        return self.control_dropout

    @property
    def worker_shares(self) -> tuple[int, int]:
        """(fewest, most) trajectories that a worker has of an update: groups are shared as evenly as they divide."""
        groups, workers = self.global_batch_size // self.group_size, self.scaling.fixed_num_workers
        return groups // workers * self.group_size, -(-groups // workers) * self.group_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that every worker runs in an update; the last ones of a smaller share hold fewer trajectories."""
        return -(-self.worker_shares[1] // self.fixed_micro_batch_size)
