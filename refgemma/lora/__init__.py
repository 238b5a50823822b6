"""LoRA adapters in PEFT's format: read strictly, attached, merged, audited."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refgemma.lora.adapter import Adapter, find_adapter, read
from refgemma.lora.audit import audit

if TYPE_CHECKING:
    from refgemma.lora.hosted import check_hosted
    from refgemma.lora.merged_checkpoint import merge_checkpoint

__all__ = [
    "Adapter",
    "audit",
    "check_hosted",
    "find_adapter",
    "merge_checkpoint",
    "read",
]

_ON_FIRST_USE = {"check_hosted": "hosted", "merge_checkpoint": "merged_checkpoint"}  # attaching needs neither


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'refgemma.lora' has no attribute {name!r}")
    return getattr(import_module(f"refgemma.lora.{_ON_FIRST_USE[name]}"), name)
