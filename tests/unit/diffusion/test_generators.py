"""The noise of a call with torch generators."""

from __future__ import annotations

import torch

from ctrl_ray.diffusion.generators import generator_noise, image_seeds

CPU = torch.device("cpu")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_comes_in_the_order_of_diffusers_pipelines() -> None:
    noise = generator_noise(2, (3,), [_generator(1), _generator(2)], None, CPU)
    ones = [_generator(1), _generator(2)]
    for index in range(3):
        assert torch.equal(noise(index), torch.cat([torch.randn(1, 3, generator=one) for one in ones]))
    start = torch.ones(2, 3)
    given = generator_noise(2, (3,), _generator(1), start, CPU)
    assert torch.equal(given(0), start) and torch.equal(given(1), torch.randn(2, 3, generator=_generator(1)))


def test_an_images_seed_is_its_generators_next_number() -> None:
    """Whatever the other images are; another one each time; one generator gives them in order."""
    both = image_seeds(2, [_generator(1), _generator(2)])
    assert both[1:] == image_seeds(1, [_generator(2)]) and 0 <= min(both) < max(both) < 2**63
    generator = _generator(1)
    first = image_seeds(3, generator)
    assert first[:2] == image_seeds(2, _generator(1)) and len({*first, *image_seeds(3, generator)}) == 6
    assert len(set(image_seeds(2, None))) == 2
