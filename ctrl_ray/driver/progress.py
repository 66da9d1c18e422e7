"""Progress of a run: a bar on a terminal or in a notebook, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm.auto import tqdm

from ctrl_ray.wording import duration, kl_text


class RunProgress:
    """Shows updates as they come; `note` prints a line without breaking the bar."""

    def __init__(
        self, total: int, done: int = 0, *, kl_noise_floor: float | None = None, line_every_s: float = 10.0
    ) -> None:
        """total, done: updates. kl_noise_floor: in nats, shown beside the KL."""
        self._interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._total, self._first, self._done = total, done, done
        self._line_every_s, self._kl_noise_floor = line_every_s, kl_noise_floor
        self._started = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc="fine-tuning", unit="update", dynamic_ncols=True)
            if self._interactive
            else None
        )

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """`done` updates are finished; shows reward and KL (or the denoising loss), samples/s and the time left."""
        if "denoising_loss" in metrics:
            reached = f"denoising loss {metrics['denoising_loss']:.4f}"
        else:
            reached = f"reward {metrics['reward']:.3f} · {kl_text(metrics['kl'], self._kl_noise_floor)}"
        facts = f"{reached} · {metrics['samples_per_s']:.1f} samples/s"
        if self._bar is not None:
            self._bar.update(done - self._done)
            self._bar.set_postfix_str(facts)
        self._done = done
        now = time.monotonic()
        if self._bar is None and (now - self._last_line >= self._line_every_s or done == self._total):
            self._last_line = now
            self.note(f"update {done}/{self._total} · {facts} · {duration(self._left(now))} left")

    def note(self, text: str) -> None:
        """One line of text."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, now: float) -> float:
        steps = max(1, self._done - self._first)
        return (now - self._started) / steps * (self._total - self._done)
