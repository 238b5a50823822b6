"""How much memory a process takes, at its peak."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_EVERY = 0.05  # seconds between two looks; arrays of interest live longer


@contextmanager
def watched() -> Iterator[Callable[[], dict[str, int | None]]]:
    """Watch the memory of this process.

    Linux keeps the peak of the first itself. The second is looked at many times a second, so a briefer peak is missed.
    """
    highest = _resident("RssAnon")
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(_EVERY):
            now = _resident("RssAnon")
            if now is not None:
                highest = max(highest or 0, now)

    def peaks() -> dict[str, int | None]:
        now = _resident("RssAnon")
        return {
            "rss": _peak_resident(),
            "rss_anon": None if highest is None or now is None else max(highest, now),
        }

    thread = threading.Thread(target=look, daemon=True)
    if highest is not None:
        thread.start()
    try:
        yield peaks
    finally:
        done.set()
        if highest is not None:
            thread.join()


def available() -> int | None:
    """Memory that new processes can have without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def total() -> int | None:
    """Memory of the machine."""
    return _field(Path("/proc/meminfo"), "MemTotal")


def _resident(name: str) -> int | None:
    return _field(_STATUS, name)


def _field(path: Path, name: str) -> int | None:
    """Number of a line such as ``RssAnon:  1234 kB``, in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # no Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _peak_resident() -> int | None:
    peak = _resident("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
