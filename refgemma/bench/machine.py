"""The machine that is measured: processor, memory, versions, settings; and the memory a process takes."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from refgemma.version import __version__

# Environment variables that choose the number of threads, or kernels for another processor.
_STEERING = ("OPENBLAS_", "OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "VECLIB_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH_")
_EVERY = 0.05  # seconds between two samples of memory


def machine() -> dict[str, object]:
    """Describe this machine."""
    versions = {"python": platform.python_version(), "refgemma": __version__}
    for name in ("numpy", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": total_memory(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_STEERING)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = named.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
    return f"{name} ({', '.join(flags)})" if flags else name


def available_memory() -> int | None:
    """Bytes that new processes can have without swapping, or None where the system does not say."""
    return _field("/proc/meminfo", "MemAvailable")


def total_memory() -> int | None:
    """Bytes of memory in this machine."""
    return _field("/proc/meminfo", "MemTotal")


@contextmanager
def watched_memory() -> Iterator[Callable[[], dict[str, int | None]]]:
    """Watch this process: yields a function that returns its peaks so far, with and without mapped files.

    Linux keeps the peak of the first; the second is sampled, so a brief peak may be missed.
    """
    highest = _field("/proc/self/status", "RssAnon")
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(_EVERY):
            highest = max(highest or 0, _field("/proc/self/status", "RssAnon") or 0)

    def peaks() -> dict[str, int | None]:
        now = _field("/proc/self/status", "RssAnon")
        return {"rss": _peak(), "rss_anon": None if highest is None or now is None else max(highest, now)}

    thread = threading.Thread(target=look, daemon=True)
    if highest is not None:
        thread.start()
    try:
        yield peaks
    finally:
        done.set()
        if highest is not None:
            thread.join()


def _peak() -> int | None:
    peak = _field("/proc/self/status", "VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _field(path: str, name: str) -> int | None:
    """Number of a line such as ``RssAnon:  1234 kB``, in bytes."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
