"""Many requests, one model: they join and leave a running batch between two tokens, each with its own adapter."""

from refgemma.batching.batch import Stream
from refgemma.batching.engine import Batching, Closed, Full

__all__ = ["Batching", "Closed", "Full", "Stream"]
