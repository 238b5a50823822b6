"""Families and sizes of the published Gemma models, by the letters of their axes."""

from __future__ import annotations

from typing import Any

FAMILIES = {"gemma1": "Gemma 1", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}

# google-deepmind/gemma at 54718dcd8, gemma/transformer.py; google/gemma_pytorch at 014acb7, gemma/config.py; V as in
# the Hugging Face files.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2b": {"family": "gemma1", "V": 256000, "D": 2048, "F": 16384, "L": 18, "N": 8, "K": 1, "H": 256},
    "gemma-7b": {"family": "gemma1", "V": 256000, "D": 3072, "F": 24576, "L": 28, "N": 16, "K": 16, "H": 256},
    "gemma-2-2b": {"family": "gemma2", "V": 256000, "D": 2304, "F": 9216, "L": 26, "N": 8, "K": 4, "H": 256},
    "gemma-2-9b": {"family": "gemma2", "V": 256000, "D": 3584, "F": 14336, "L": 42, "N": 16, "K": 8, "H": 256},
    "gemma-2-27b": {"family": "gemma2", "V": 256000, "D": 4608, "F": 36864, "L": 46, "N": 32, "K": 16, "H": 128},
    "gemma-3-270m": {"family": "gemma3", "V": 262144, "D": 640, "F": 2048, "L": 18, "N": 4, "K": 1, "H": 256},
    "gemma-3-1b": {"family": "gemma3", "V": 262144, "D": 1152, "F": 6912, "L": 26, "N": 4, "K": 1, "H": 256},
    "gemma-3-4b": {"family": "gemma3", "V": 262208, "D": 2560, "F": 10240, "L": 34, "N": 8, "K": 4, "H": 256},
    "gemma-3-12b": {"family": "gemma3", "V": 262208, "D": 3840, "F": 15360, "L": 48, "N": 16, "K": 8, "H": 256},
    "gemma-3-27b": {"family": "gemma3", "V": 262208, "D": 5376, "F": 21504, "L": 62, "N": 32, "K": 16, "H": 128},
}
