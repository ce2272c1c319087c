"""Progress display of a run: a live status line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_PHASES = ("generate", "reward", "logprobs", "update", "publish")


class Progress:
    """Prints to standard output. On a terminal the last line is live and shows the current phase."""

    def __init__(self, steps: int):
        self._steps = steps
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._status = self._console.status("")
        self._started = time.perf_counter()
        self._done = 0

    def log(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Report something that takes a while and how long it took. Yields a function that shows its phase, on a terminal only."""
        start = time.perf_counter()
        self._now(f"{text} …")
        try:
            yield lambda phase: self._show(f"{text}: {phase} …")
        finally:
            self._status.stop()
        self.log(f"{text}: {time.perf_counter() - start:.1f} s")

    def begin(self) -> None:
        """Start the clock from which the remaining time is estimated."""
        self._started = time.perf_counter()
        self._done = 0

    def phase(self, step: int, name: str) -> None:
        """Show the step's current phase, on a terminal only."""
        self._show(f"step {step + 1}/{self._steps}: {name} …")

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Print the line of a step: reward, entropy, seconds of each phase, time left."""
        self._status.stop()
        self._done += 1
        left = (time.perf_counter() - self._started) / self._done * (self._steps - step - 1)
        phases = " ".join(f"{name} {metrics['seconds/' + name]:.1f}" for name in _PHASES)
        entropy = f"entropy {metrics['train/entropy']:.3f}" if "train/entropy" in metrics else "no update"
        self.log(
            f"step {step + 1}/{self._steps}  reward {metrics['reward/mean']:.3f}  {entropy}  "
            f"{metrics['seconds/step']:.1f} s ({phases})  {_clock(left)} left"
        )

    def close(self) -> None:
        """Restore the terminal."""
        self._status.stop()

    def _now(self, text: str) -> None:
        if self._console.is_terminal:
            self._show(text)
        else:
            self.log(text)

    def _show(self, text: str) -> None:
        if self._console.is_terminal:
            self._status.update(text)
            self._status.start()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d}:{int(seconds) % 60:02d}"
