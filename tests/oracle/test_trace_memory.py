"""A trace of the depth and widths of gemma-2b, 3.3 GB on disk, while the process holds what a plain run holds."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.numerics import FLOAT32
from refgemma.oracle import trace
from tests.models import random_params

STATUS = Path("/proc/self/status")
NEEDED = 4 * 10**9  # bytes of disk
# All of gemma-2b but its stream, which is narrow: weights then take 0.3 GB, and the trace stays as large as it is.
CONFIG = replace(refgemma.SIZES["gemma-2b"], hidden_size=64)


def anonymous():
    """Bytes of memory that are no mapped file."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def peak_of(work):
    """Most memory that some work takes on top of what was there."""
    before, peak, done = anonymous(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.slow
def test_a_long_trace_is_not_in_memory(tmp_path):
    if not STATUS.exists():
        pytest.skip("needs /proc, to see how much memory is taken")
    if shutil.disk_usage(tmp_path).free < NEEDED:
        pytest.skip(f"needs {NEEDED:,} bytes of disk in {tmp_path}")
    rng = np.random.default_rng(0)
    gemma = refgemma.Gemma(CONFIG, random_params(rng, CONFIG), None, FLOAT32, frozenset())
    tokens, path = rng.integers(0, CONFIG.vocab_size, 512), tmp_path / "ours.safetensors"
    streamed = peak_of(lambda: trace(gemma, tokens, to=path))
    nbytes = path.stat().st_size
    path.unlink()
    print(f"\n{nbytes / 2**20:.0f} MiB of trace, {streamed / 2**20:.0f} MiB of memory")
    assert nbytes > 3 * 10**9
    # The logits of 512 positions are half a gigabyte, the activations of one layer and its MLP a fifth of one.
    assert streamed < nbytes / 4
