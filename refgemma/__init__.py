"""The Gemma you can read, run and believe: Google's Gemma in pure Python and NumPy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refgemma import lora, sampling
from refgemma.cache import PrefixCache
from refgemma.compute.threads import set_threads
from refgemma.config import SIZES, Config
from refgemma.gemma import Gemma, Score, load
from refgemma.generation import Event, Generation
from refgemma.sampling import SamplingParams
from refgemma.version import __version__ as __version__

if TYPE_CHECKING:
    from refgemma import oracle, workers_ai

__all__ = [
    "SIZES",
    "Config",
    "Event",
    "Gemma",
    "Generation",
    "PrefixCache",
    "SamplingParams",
    "Score",
    "load",
    "lora",
    "oracle",
    "sampling",
    "set_threads",
    "workers_ai",
]

_ON_FIRST_USE = ("oracle", "workers_ai")  # a program that only generates does not wait for them


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'refgemma' has no attribute {name!r}")
    return import_module(f"refgemma.{name}")
