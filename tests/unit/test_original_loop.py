"""The original loop, which `tests.benchmarks.original` times, has the gradient that our update has."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.config import AdapterConfig, AdapterKind
from tests.benchmarks.original import columns
from tests.benchmarks.recipe import shared_rewards, shipped_control, today


@pytest.mark.full
@pytest.mark.parametrize("kind", ["embedding", "gains"])
def test_the_original_loop_has_our_gradient(kind: AdapterKind) -> None:
    """One graph of a whole trajectory with its VAE and classifier, checkpointed and not, against the adjoint pass, graphs
    computed anew and kept; with guidance, the last step the reference's."""
    base = today(shipped_control(), 0).config
    config = dataclasses.replace(
        base,
        global_batch_size=4,
        control_dropout=0.0,
        adapter=AdapterConfig(kind=kind),
        sampler=dataclasses.replace(base.sampler, num_steps=3, guidance_scale=2.0),
    )
    loops = columns(config, shared_rewards(config), [2])
    for loop in loops:
        loop.seconds(0)
    first, *others = (loop.gradient for loop in loops)
    assert first.norm() > 1
    for gradient in others:
        assert (gradient - first).norm() < 1e-3 * first.norm()
