"""Machines that are stated and need not be there: what `--dry-run --machines` plans for."""

from __future__ import annotations

import math
import re

from ctrl_ray.cluster.resources import ClusterFacts, NodeFacts
from ctrl_ray.errors import ConfigError

CPUS_PER_GPU = 8
"""Of a stated machine."""
CARDS = {
    "A10G": int(22.0 * 2**30),
    "L4": int(22.0 * 2**30),
    "L40S": int(44.4 * 2**30),
    "A100": int(39.4 * 2**30),
    "A100-80GB": int(79.1 * 2**30),
    "H100": int(79.1 * 2**30),
    "H200": int(139.8 * 2**30),
}
"""Bytes that CUDA sees of a card, by its name; remembered, and a little less than the data sheet's."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", re.IGNORECASE)


def stated_machines(text: str) -> ClusterFacts:
    """'4x8x80GB': four machines of eight GPUs of 80 GB (10⁹ bytes; GiB: 2³⁰). 'L40S' in the place of the size names a card;
    several kinds are separated by commas: '3x8xH100,1x4xH100'. ConfigError for anything else."""
    nodes: list[NodeFacts] = []
    for part in text.split(","):
        count, gpus, memory = _parse(part.strip(), text)
        nodes += [NodeFacts(float(CPUS_PER_GPU * gpus), float(gpus), None, memory)] * count
    return ClusterFacts("the stated machines", tuple(nodes))


def describe(stated: ClusterFacts) -> str:
    """'4 nodes, 256 CPUs, 32 GPUs of 74.5 GiB; 8 CPUs for each GPU are taken for granted'."""
    sizes = sorted({node.gpu_memory_bytes or 0 for node in stated.nodes})
    memory = " and ".join(f"{size / 2**30:.1f} GiB" for size in sizes)
    return f"{stated.described} of {memory}, stated and not looked for; {CPUS_PER_GPU} CPUs for each GPU are taken for granted"


def _parse(part: str, text: str) -> tuple[int, int, int]:
    """(machines, GPUs of each, bytes of each GPU)."""
    pieces = [piece.strip() for piece in re.split("[x×]", part, maxsplit=2)]
    if len(pieces) == 3 and pieces[0].isdecimal() and pieces[1].isdecimal():
        count, gpus, memory = int(pieces[0]), int(pieces[1]), _memory(pieces[2])
        if count and gpus and memory:
            return count, gpus, memory
    raise ConfigError(
        f"--machines {text!r}: {part!r} is not MACHINESxGPUSxMEMORY; expected such as 4x8x80GB, 1x1xL40S or "
        f"3x8x80GB,1x4x80GB, with at least 1 machine and 1 GPU, a size in GB or GiB, or one of {', '.join(CARDS)}"
    )


def _memory(text: str) -> int:
    """Bytes of a size or of a card; 0 for anything else."""
    named = {name.lower(): size for name, size in CARDS.items()}
    if text.lower() in named:
        return named[text.lower()]
    size = _SIZE.fullmatch(text)
    if size is None:
        return 0
    return math.floor(float(size[1]) * (2**30 if size[2].lower() == "gib" else 10**9))
