"""All settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ctrl_ray import embedded
from ctrl_ray.config.control import ClassifierConfig, ControlConfig, check_control_name
from ctrl_ray.config.evaluation import EvaluationConfig
from ctrl_ray.config.fields import above, at_least, check_fields, share
from ctrl_ray.config.policy import AdapterConfig, LoraConfig, SamplerConfig
from ctrl_ray.config.resources import RewardPoolConfig, ScalingConfig
from ctrl_ray.config.tracker import parse_tracker
from ctrl_ray.config.training import EstimatorConfig, OptimizerConfig, TrainingMethod
from ctrl_ray.config.values import Auto, fixed, require


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
    drawn. None: every control names a fitted classifier, and the prompts are those of prompts_file."""
    num_drawn_images: Annotated[int, at_least(1)] = 6000
    """With data 'shapes': how many images are drawn."""
    prompts_file: str | None = None
    """File of prompts to train on, one per line. None: the prompt column of the data set, or the prompts of the
    built-in example."""
    encoding: str = "utf-8"
    """Encoding of the files of prompts, such as cp1252. A byte order mark in the file has priority."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of every random draw, together with (update, sample id, purpose)."""
    training_method: TrainingMethod = "ctrl"
    """'ctrl': the paper's method. 'cfg', a baseline: fit the denoiser to the images and labels of `data`, for classifier-free
    guidance of the label (sampler.control_scale). An update of 'cfg' draws no trajectory and asks no classifier, so estimator
    and label_draws have no effect. It needs prompts beside the labels."""
    num_updates: Annotated[int, at_least(1)] = 60
    """Optimizer updates."""
    global_batch_size: Annotated[int, at_least(1)] = 64
    """Trajectories per update (training_method cfg: images), over all workers. If the groups do not divide evenly, some
    workers have one more."""
    micro_batch_size_per_worker: Annotated[int | Auto, at_least(1)] = 32
    """Trajectories that a worker holds at a time. One micro-batch is scored while the next one is sampled. 'auto': the
    largest that fits the worker's memory, made even over the micro-batches of an update."""
    group_size: Annotated[int, at_least(1)] = 1
    """This many consecutive samples share prompt and label. The estimator 'reinforce' compares them with each other."""
    kl_coef: Annotated[float, at_least(0)] = 1.0
    """beta: weight of the KL to the pre-trained model, in nats. Lower: more reward, more KL."""
    latent_reduction: Literal["sum", "mean"] = "sum"
    """How the KL is reduced over latent dimensions. 'sum': as in the method. 'mean': as in the public reference code;
    the exponent then depends on the number of latent dimensions."""
    control_dropout: Annotated[float | Auto, share(without_1=True)] = "auto"
    """Share of samples that get the null label (strength 0), so that the policy without a label stays the reference. 'auto':
    0 for one control with adapter.kind gains (gains add nothing without a label), else 0.1. Several controls need it with
    gains too: a policy that gets the label of one control must ignore the others."""
    label_draws: Literal["independent", "systematic"] = "independent"
    """How an update's labels are drawn. 'systematic': each class as often as its share says, give or take one, in random
    order. This has less noise when batches are small."""
    target_kl: Annotated[float | None, above(0)] = None
    """Stop early when the KL of an evaluation is above this many nats. The best checkpoint below it is exported. It must
    be at least twice the kl_noise_floor, which the run measures when it starts."""
    full_finetune: bool = False
    """Train every weight of the denoiser instead of LoRA. A frozen copy stays in memory as the reference."""
    init_adapter: str | None = None
    """Adapter folder to start from. A control that the adapter does not have is added to it."""
    checkpoint_every_updates: Annotated[int, at_least(1)] = 10
    """Updates between two checkpoints. A crash loses at most this many."""
    num_checkpoints_to_keep: Annotated[int, at_least(1)] = 2
    """How many checkpoints stay on disk: the latest and the best."""
    export_images: Annotated[int, at_least(0)] = 8
    """Images per class in the report and in the tracker."""
    tracker: str = "aim"
    """Where curves and pictures go besides metrics.jsonl and the report: 'aim' (output_dir/aim), 'tensorboard' (event files in
    output_dir/tensorboard), or 'none'. 'aim://HOST:PORT' is a tracking server. 'aim:FOLDER' is another repository; no other
    process may write to it. Where Aim is not installed, TensorBoard takes its place."""
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
        check_fields(self)
        for name in self.controls:
            check_control_name(name)
        parse_tracker(self.tracker)
        micro_batch = self.micro_batch_size_per_worker
        require(
            isinstance(micro_batch, str) or micro_batch % self.group_size == 0,
            f"group_size is {self.group_size}; expected a divisor of micro_batch_size_per_worker ({micro_batch})",
        )
        require(
            self.global_batch_size % self.group_size == 0,
            f"global_batch_size ({self.global_batch_size}) must be divisible by group_size ({self.group_size}), so that "
            f"every group is whole; try {-(-self.global_batch_size // self.group_size) * self.group_size}",
        )
        if self.scaling.num_workers != "auto":
            groups = self.global_batch_size // self.group_size
            require(
                groups >= self.scaling.fixed_num_workers,
                f"global_batch_size ({self.global_batch_size}) has {groups} groups of group_size ({self.group_size}), which is "
                f"not one for each of the {self.scaling.num_workers} workers; take a global_batch_size of at least "
                f"{self.scaling.fixed_num_workers * self.group_size}, or fewer workers",
            )
        require(
            self.estimator.name != "reinforce" or self.group_size >= 2,
            "the estimator reinforce compares samples that share prompt and label, but group_size is 1; set it to 4 or "
            "more",
        )
        self._check_training_method()
        require(
            self.estimator.keep_graphs is not True
            or (self.can_keep_graphs and self.scaling.gradient_checkpointing is False),
            "estimator.keep_graphs keeps the activations of every denoising step, which does not go with scaling.zero_stage 3, "
            f"gradient_checkpointing or fp16; got zero_stage {self.scaling.zero_stage}, gradient_checkpointing "
            f"{self.scaling.gradient_checkpointing} and precision {self.scaling.precision}: set keep_graphs to False "
            "or auto",
        )
        require(
            self.kl_coef > 0 or self.estimator.max_drift == 0,
            f"estimator.max_drift is {self.estimator.max_drift} and kl_coef 0, but without a KL no drift is too long; set "
            "max_drift and final_max_drift to 0",
        )
        require(
            self.sampler.eta > 0,
            f"eta is {self.sampler.eta}: a deterministic step has no density, so its KL to the pre-trained model does "
            "not exist; set sampler.eta to 1.0",
        )

    def _check_training_method(self) -> None:
        if self.draws_trajectories:
            return
        require(
            self.data is not None,
            "training_method cfg is trained on labelled images, but there is no data; give --data FILE.parquet with images, "
            "prompts and labels",
        )
        require(
            self.estimator.name == "full" and self.estimator.keep_graphs is not True and self.group_size == 1,
            "training_method cfg draws no trajectories: it has no estimator, no graphs to keep and no groups; got "
            f"estimator.name {self.estimator.name}, estimator.keep_graphs {self.estimator.keep_graphs} and group_size "
            f"{self.group_size}: leave them at full, auto and 1, or take training_method ctrl",
        )

    @property
    def fixed_micro_batch_size(self) -> int:
        """micro_batch_size_per_worker as a number; ConfigError while it is still to be decided."""
        return fixed(self.micro_batch_size_per_worker, "micro_batch_size_per_worker")

    @property
    def draws_trajectories(self) -> bool:
        """Whether an update samples under the policy and asks the classifiers."""
        return self.training_method == "ctrl"

    @property
    def can_keep_graphs(self) -> bool:
        """Whether method, estimator, sharding and precision go with estimator.keep_graphs; gradient checkpointing does not."""
        full = self.draws_trajectories and self.estimator.name == "full"
        return full and self.scaling.zero_stage < 3 and self.scaling.precision != "fp16"

    @property
    def fixed_control_dropout(self) -> float:
        """control_dropout as a number: its 'auto' needs no machine, so it is known at once."""
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
