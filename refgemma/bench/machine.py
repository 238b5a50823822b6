"""What the figures were measured on: processor, memory, versions, and settings that steer threads or kernels."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import refgemma
from refgemma.bench import memory

# Settings of the environment that change how fast libraries are: how many threads, kernels of which processor.
_STEERING = ("OPENBLAS_", "OMP_", "GOMP_", "KMP_", "MKL_", "BLIS_", "VECLIB_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH_")


def machine() -> dict[str, object]:
    """Describe this machine."""
    versions = {"python": platform.python_version(), "refgemma": refgemma.__version__}
    for name in ("numpy", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory.total(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_STEERING)},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    name = named.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
    return f"{name} ({', '.join(flags)})" if flags else name
