"""The DeepSpeed dict of a run, as a pure function."""

from __future__ import annotations

from typing import Any

from ctrl_ray.config import TrainConfig

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""State that an optimizer keeps for every parameter."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """What `deepspeed.initialize` gets.

    - No fp16 and no bf16 section: trainable parameters are float32 and the policy chooses the precision of its frozen
      backbone; loss scaling would compound along the adjoint pass.
    - Accumulation is ours: one `backward` per denoising step, an explicit `step()`, and no division by the number of
      accumulation steps (it would be read back with the input gradient and compound).
    - `gradient_clipping` is always set; its default is 1.0 in recent releases.
    - `reduce_bucket_size` is a tenth of the default, which takes 2 GB of every worker even for LoRA.
    - Offloading keeps torch's optimizer, so that no extension is compiled and the result is the same.
    """
    scaling = config.scaling
    zero: dict[str, Any] = {
        "stage": scaling.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 50_000_000,
    }
    if scaling.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = scaling.zero3_persistence_threshold
    if scaling.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": scaling.use_gpu}
    if scaling.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": scaling.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size_per_worker,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
