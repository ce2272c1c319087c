"""The last lines that a process and its children printed, kept so that an error can quote them."""

import collections
import os
import re
import threading

_ERROR = re.compile(r"\b(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .*")
_SECOND_HAND = ("Engine core initialization failed", "WorkerProc initialization failed", "EngineCore encountered an issue")


def second_hand(message: str) -> bool:
    """Whether this error of vLLM only reports that another of its processes failed."""
    return any(text in message for text in _SECOND_HAND)


class OutputTail:
    """Reads what this process and its children write to standard output and error, and passes it on to the original destination."""

    def __init__(self, lines: int = 400):
        self._lines: collections.deque[str] = collections.deque(maxlen=lines)
        for descriptor in (1, 2):
            self._tee(descriptor)

    def cause(self) -> str | None:
        """Return the last line that reports an error, from the error's name on, but not one about the failure of another process."""
        for line in reversed(self._lines):
            found = _ERROR.search(line)
            if found and not second_hand(line):
                return found.group(0).strip()
        return None

    def _tee(self, descriptor: int) -> None:
        destination = os.dup(descriptor)
        reader, writer = os.pipe()
        os.dup2(writer, descriptor)
        os.close(writer)
        threading.Thread(target=self._pump, args=(reader, destination), name=f"output-tail-{descriptor}", daemon=True).start()

    def _pump(self, reader: int, destination: int) -> None:
        rest = b""
        while data := os.read(reader, 1 << 16):
            view = memoryview(data)
            while view:
                view = view[os.write(destination, view) :]
            *complete, rest = (rest + data).split(b"\n")
            self._lines.extend(line.decode(errors="replace") for line in complete)
