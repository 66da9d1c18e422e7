"""What we need of DeepSpeed's ZeRO that has no public interface, one function each.

Every docstring names what of DeepSpeed it leans on; tests/integration/test_sharding.py runs all of it at every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

_SHARED_MEMORY_OP = "deepspeed_shm_comm"


def leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its sum over processes of one CPU machine: a minute of a core and a compiler, for what
    tensor-parallel inference alone calls. To be called before an engine is made.

    Leans on `deepspeed.ops.__compatible_ops__`, which says what may be compiled.
    """
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False


def flat_partitions(optimizer: Any, zero_stage: int) -> list[Tensor]:
    """The flat float32 tensors (one for each parameter group, or more) that a ZeRO optimizer of stage 1 to 3 updates on
    this rank.

    Leans on `single_partition_of_fp32_groups` (stages 1 and 2) and `fp32_partitioned_groups_flat` (stage 3).
    """
    return list(optimizer.single_partition_of_fp32_groups if zero_stage < 3 else optimizer.fp32_partitioned_groups_flat)


def link_moments(optimizer: Any) -> None:
    """Tell every parameter where in this rank's flat moments its own lie; ZeRO 1 and 2.

    Leans on `_lazy_init_hp_params_optimizer_state`, which DeepSpeed calls after the first update of the *first*
    parameter group only, so that with two groups the second one's moments could neither be read nor set.
    """
    optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def whole_values(asked: Sequence[tuple[Any, str | None]]) -> list[Tensor]:
    """Of each (parameter, moment; None: the float32 parameter itself) the whole value; ZeRO 1 and 2. Collective: one sum for
    all of them.

    Leans on `_hp_mapping` and `_dp_group` of a parameter: DeepSpeed's own `safe_get_full_fp32_param` sums one at a time.
    """
    sizes = [parameter.numel() for parameter, _ in asked]
    first, _ = asked[0]
    joined = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device)
    values = joined.split(sizes)
    for (parameter, moment), value in zip(asked, values, strict=True):
        mine = parameter._hp_mapping
        if mine is not None:
            place = mine.lp_fragment_address
            value.narrow(0, place.start, place.numel).copy_(mine.get_hp_fragment(moment))
    dist.all_reduce(joined, group=first._dp_group)
    return [value.view(parameter.shape) for (parameter, _), value in zip(asked, values, strict=True)]


def set_own_moment(parameter: Any, moment: str, value: Tensor) -> None:
    """Copy this rank's part of a whole moment (of the parameter's shape) into the optimizer's state; ZeRO-3.

    Leans on `parameter._z3_optimizer`, its `_get_fp32_opt_state_partition` and `_get_param_partition_rank`: DeepSpeed's
    own setter reads past the end of a value that does not divide by the number of ranks.
    """
    optimizer = parameter._z3_optimizer
    mine, _ = optimizer._get_fp32_opt_state_partition(parameter, False, moment)
    start = mine.numel() * optimizer._get_param_partition_rank(parameter)
    part = value.flatten()[start : start + mine.numel()]
    mine[: part.numel()].copy_(part)


def whole_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter before ZeRO-3 sharded it, which leaves an empty tensor in its place.

    Leans on `ds_shape`; a parameter that is not sharded has its own shape.
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
