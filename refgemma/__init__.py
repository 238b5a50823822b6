"""The Gemma you can read, run and believe: Google's Gemma in pure Python and NumPy."""

from refgemma import sampling
from refgemma.cache import PrefixCache
from refgemma.config import SIZES, Config
from refgemma.gemma import Gemma, Score, load
from refgemma.generation import Event, Generation
from refgemma.sampling import SamplingParams

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
    "sampling",
]
__version__ = "0.1.0"
