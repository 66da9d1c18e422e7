"""The sampler that is trained, and what is trained of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ctrl_ray.config.fields import above, at_least, check_fields
from ctrl_ray.config.values import require

NullBranch = Literal["pre_trained", "class"]
FlowSDE = Literal["ancestral", "cps", "flow_grpo", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """The sampler that the policy is trained for. The guarantee holds for these values only; the adapter stores
    them."""

    num_steps: Annotated[int, at_least(1)] = 10
    """Denoising steps. The denoiser calls per sample grow in proportion."""
    eta: Annotated[float, at_least(0)] = 1.0
    """Stochasticity, up to 1. The theory needs a sampler that forgets its initial noise; 1 does so (nearly). 0 is
    refused where there is a KL, because its steps have no density. With flow_sde 'flow_grpo' it is the noise level (0.7 in
    Flow-GRPO, √2 forgets), with 'constant' the noise itself: both may be larger."""
    flow_sde: FlowSDE = "ancestral"
    """For base models that were trained by flow matching: where a step's noise comes from. 'ancestral' is DDIM's step in
    other variables, and forgets its initial noise at eta 1. Other trainers use 'cps', 'flow_grpo' and 'constant': take them
    for adapters from elsewhere."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the prompt. 1.0 switches it off; any other value doubles the denoiser's work."""
    control_scale: float | None = None
    """A guidance scale for the label alone (three denoiser branches). None: prompt and label share guidance_scale."""
    null_branch: NullBranch = "pre_trained"
    """With a guidance_scale other than 1: what the unconditional branch gets. 'pre_trained': no prompt and no label, as in
    the paper. 'class': no prompt but the label, as in tools that load an exported class as an ordinary LoRA."""
    height: Annotated[int | None, at_least(1)] = None
    """Height of the images in pixels. Give width too. None: the base model's own size. Fewer take less memory and time."""
    width: Annotated[int | None, at_least(1)] = None
    """Width of the images in pixels. Give height too."""
    max_sequence_length: Annotated[int | None, at_least(1)] = None
    """Stable Diffusion 3: number of tokens of the T5, or of zeros in its place. None: 256, as in diffusers' pipeline. Fewer are
    faster. Take fewer if the base model was trained with fewer, or if prompts are short."""
    reference_steps: Annotated[int, at_least(0)] = 0
    """The pre-trained model takes this many of the last denoising steps, in training and in sampling. They are a
    fixed part of the reward. The last step or two have so little noise that any deviation there costs a large KL and
    gains nothing; 1 makes training far better conditioned."""

    def __post_init__(self) -> None:
        check_fields(self, "sampler")
        require(
            self.eta <= 1 or self.flow_sde in ("flow_grpo", "constant"),
            f"sampler.eta is {self.eta}; expected a number in [0, 1]",
        )
        require(
            self.control_scale is None or self.null_branch == "pre_trained",
            f"control_scale is {self.control_scale} and null_branch 'class', but a direction of the label alone starts at a "
            "branch without it; set null_branch to pre_trained, or leave control_scale out",
        )
        require(
            (self.height is None) == (self.width is None),
            f"sampler.height is {self.height} and sampler.width {self.width}; give both, or neither for the base model's own",
        )
        require(
            self.reference_steps < self.num_steps,
            f"sampler.reference_steps is {self.reference_steps}; expected 0 to num_steps - 1 ({self.num_steps - 1})",
        )

    def call_options(self) -> dict[str, int]:
        """What a stock pipeline's call is given for the size of images and texts, where it is not the base model's own."""
        options = {"height": self.height, "width": self.width, "max_sequence_length": self.max_sequence_length}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation of the denoiser's attention projections."""

    rank: Annotated[int, at_least(1)] = 8
    """Rank of each layer's low-rank matrices. The number of trainable parameters grows in proportion."""
    alpha: Annotated[float, above(0)] = 8.0
    """The product of the low-rank matrices is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names, or endings of names, of the layers that get LoRA."""

    def __post_init__(self) -> None:
        check_fields(self, "lora")


AdapterKind = Literal["gains", "embedding", "both"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """How a label reaches the denoiser. With `full_finetune` control embeddings are used, whatever is set here."""

    kind: AdapterKind = "embedding"
    """'gains': each class scales the ranks of LoRA by its own gains, positive or negative. Without a label the policy is the
    pre-trained model, bit for bit. Every class is exported as a LoRA file that plain diffusers loads. 'embedding': the
    paper's label embedding, added to the time embedding, beside one LoRA for all classes. 'both': gains and the embedding."""

    def __post_init__(self) -> None:
        check_fields(self, "adapter")
