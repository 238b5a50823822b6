"""LoRA adapters in PEFT's format: read strictly, attached, merged, audited."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refgemma.lora.adapter import Adapter, find_adapter, read
from refgemma.lora.adapter_config import AdapterConfig
from refgemma.lora.attach import attach
from refgemma.lora.audit import audit
from refgemma.lora.fit import fit
from refgemma.lora.merge import merge

if TYPE_CHECKING:
    from refgemma.lora.hosted import check_hosted
    from refgemma.lora.merged_checkpoint import merge_checkpoint

__all__ = [
    "Adapter",
    "AdapterConfig",
    "attach",
    "audit",
    "check_hosted",
    "find_adapter",
    "fit",
    "merge",
    "merge_checkpoint",
    "read",
]

_ON_FIRST_USE = {"check_hosted": "hosted", "merge_checkpoint": "merged_checkpoint"}  # attaching needs neither


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'refgemma.lora' has no attribute {name!r}")
    return getattr(import_module(f"refgemma.lora.{_ON_FIRST_USE[name]}"), name)
