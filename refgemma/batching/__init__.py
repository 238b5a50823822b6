"""Many requests, one model: they join and leave a running batch between two tokens, each with its own adapter."""

from refgemma.batching.engine import Batching, Closed, Full
from refgemma.batching.stream import Stream

__all__ = ["Batching", "Closed", "Full", "Stream"]
