"""Numbers as people read them: durations, sizes, KLs, what was reached; tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any


def no_file(path: Path) -> str:
    """Why a path is no file: 'is a folder' or 'does not exist'."""
    return "is a folder" if path.is_dir() else "does not exist"


def counted(number: float, noun: str) -> str:
    """'1 worker', '2.5 GPUs', '3 micro-batches'."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:g} {noun}" + ("" if number == 1 else plural)


def duration(seconds: float) -> str:
    """'45 s', '3 m 05 s' or '2 h 10 m'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} m"
    return f"{minutes} m {rest:02d} s" if minutes else f"{rest} s"


def size_text(size: float) -> str:
    """Bytes as 'n.n MiB', from 1 GiB on as 'n.n GiB', below 0.1 MiB as 'n KiB'."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 0.1 * 2**20 else f"{size / 2**10:.1f} KiB"


def kl_text(kl: float, noise_floor: float | None) -> str:
    """'KL n.nn nats', with '(floor n.nnnn)' where it is known what cannot be told from rounding."""
    return f"KL {kl:.2f} nats" + ("" if noise_floor is None else f" (floor {floor_text(noise_floor)})")


def floor_note(noise_floor: float | None) -> str:
    """What stands behind a KL in a table; '' where the floor is not known."""
    return "" if noise_floor is None else f"   (floor {floor_text(noise_floor)}: less cannot be told from rounding)"


def floor_text(noise_floor: float) -> str:
    """Two digits of a noise floor, in nats."""
    return f"{noise_floor:.0f}" if noise_floor >= 10 else f"{noise_floor:.2g}"


def accuracy_text(metrics: Mapping[str, float]) -> str:
    """'accuracy n.nnn', of several controls 'accuracy of A n.nnn, of B n.nnn (mean n.nnn)'; '' where nothing measured it."""
    mean = metrics.get("accuracy")
    if mean is None:
        return ""
    each = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("accuracy/")}
    if len(each) < 2:
        return f"accuracy {mean:.3f}"
    return f"accuracy {', '.join(f'of {name} {value:.3f}' for name, value in each.items())} (mean {mean:.3f})"


def measured_text(value: float) -> str:
    """A measured value in three digits, or whole where it has more: '0.567', '12.3', '3781'."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def gap_text(certificate: Mapping[str, Any]) -> str:
    """'n.n ± n.n nats from the best that any sampler can do', and what it rests on; of `certify_evaluation`'s numbers."""
    gap, error, ess = (certificate[name] for name in ("gap", "gap_standard_error", "ess"))
    doubt = "; bounds on it would be too wide to say more" if certificate["too_wide"] else ""
    return (
        f"{gap:.1f} ± {error:.1f} nats from the best that any sampler can do (effective sample size {ess:.1%}{doubt})"
    )


def text_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Cells under each other, two spaces apart; the columns of `left` begin at their left, the others end at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
