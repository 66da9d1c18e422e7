"""What libraries say that nobody can act on."""

from __future__ import annotations

import logging


def test_deepspeed_does_not_tell_which_device_it_guesses() -> None:
    """A worker is told which it is for; the driver has none. Whatever else it says is told."""
    logger = logging.getLogger("DeepSpeed")

    def passes(text: str) -> bool:
        return bool(logger.filter(logger.makeRecord("DeepSpeed", logging.WARNING, "f", 1, text, (), None)))

    assert not passes("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    assert passes("Overflow detected")
