"""The DeepSpeed dict of a run, as a pure function."""

from __future__ import annotations

from typing import Any

from ctrl_ray.config import TrainConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""State that an optimizer keeps for every parameter."""


LARGEST_BUCKET_ELEMENTS = 50_000_000
"""A tenth of DeepSpeed's default, which takes 2 GB of every worker."""


def deepspeed_config(config: TrainConfig, trained_elements: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for a policy of so many trained elements.

    - No fp16 and no bf16 section: trainable parameters are float32 and the policy chooses the precision of its frozen
      backbone; loss scaling would compound along the adjoint pass.
    - Accumulation is ours: one `backward` per denoising step, an explicit `step()`, and no division by the number of
      accumulation steps (it would be read back with the input gradient and compound).
    - `gradient_clipping` is always set; its default is 1.0 in recent releases.
    - `reduce_bucket_size` is no more than what there is to reduce: DeepSpeed allocates it whole.
    - Offloading keeps torch's optimizer, so that no extension is compiled and the result is the same.
    """
    scaling = config.scaling
    zero: dict[str, Any] = {
        "stage": scaling.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": min(LARGEST_BUCKET_ELEMENTS, trained_elements),
    }
    if scaling.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = scaling.zero3_persistence_threshold
    if scaling.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": scaling.use_gpu}
    if scaling.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": scaling.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": config.fixed_micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
