"""Peak memory of this process and its descendants."""

import threading

import psutil


class PeakMemory:
    """Samples in a thread the proportional set size (shared pages counted once) of this process and all its descendants."""

    def __init__(self, every_s: float = 5.0):
        self._every_s = every_s
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()

    @property
    def gb(self) -> float:
        """The largest sample so far, in GB (10⁹ bytes)."""
        return self._peak / 1e9

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        root = psutil.Process()
        while not self._stop.is_set():
            self._peak = max(self._peak, sum(map(_pss, [root, *root.children(recursive=True)])))
            self._stop.wait(self._every_s)


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0  # the process has ended since it was listed
