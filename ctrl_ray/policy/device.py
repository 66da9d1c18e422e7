"""Which torch devices are here."""

from __future__ import annotations

import torch

from ctrl_ray.errors import ConfigError


def devices_here() -> list[str]:
    """Names of the devices that models can be moved to, the CPU first."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]


def fastest_device() -> str:
    """The first accelerator that is here, else the CPU: for what judges images, where nobody has named a device."""
    return devices_here()[:2][-1]


def check_device(device: str | torch.device) -> torch.device:
    """The device; ConfigError names it, and those that are here, where it is not."""
    here = devices_here()
    expected = f"expected one of {', '.join(here)}"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {str(device)!r} is not known to torch; {expected}") from error
    name = found.type if found.type == "cpu" else f"{found.type}:{found.index or 0}"
    if name not in here:
        raise ConfigError(f"device {str(device)!r} is not here; {expected}")
    return found
