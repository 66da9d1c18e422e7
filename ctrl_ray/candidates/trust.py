"""How far the images that candidates were drawn for can be trusted."""

from __future__ import annotations

import json
from pathlib import Path

TRUSTED_ESS = 3.0
"""Mean effective sample size of an image's candidates (of few: ¾ of them) below which the images' law is not trusted. Measured
on `shapes` with its pre-trained model at exponent 4, Wasserstein distance of the JPEG sizes to those of 512 exact samples a
class, in noise floors: ESS 3.6 to 4.1 (K = 16) gives 1.0 to 1.5, 2.8 to 3.1 (12) 1.0 to 2.5, 2.0 to 2.1 (8) 3.8 to 4.4, 1.3 (4)
12 to 14."""


def ess_lines(manifest: Path) -> list[str]:
    """What to tell of the candidates behind a manifest: their effective sample size and, where it is too small to trust the
    images' law, a warning; nothing without candidates."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line]
    sizes = [row["ess"] for row in rows if "ess" in row]
    if not sizes:
        return []
    count, mean = rows[0]["candidates"], sum(sizes) / len(sizes)
    lines = [
        f"effective sample size: {mean:.1f} of {count} candidates, mean over {len(sizes)} images (least {min(sizes):.1f})"
    ]
    trusted = min(TRUSTED_ESS, 0.75 * count)
    if mean < trusted:
        lines.append(
            f"warning: that is below {trusted:g}: a single candidate often had most of the weight, so the images may be "
            f"far from the target. Try --candidates {4 * count}, an adapter that is trained for longer, or a smaller exponent"
        )
    return lines
