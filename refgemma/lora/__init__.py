"""LoRA adapters in PEFT's format: read strictly, attached, merged, audited."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refgemma.lora.adapter_config import AdapterConfig
from refgemma.lora.attach import attach, checked_scale, narrowed
from refgemma.lora.audit import audit
from refgemma.lora.find import find_adapter, split_scale
from refgemma.lora.fit import fit
from refgemma.lora.merge import merge
from refgemma.lora.read import Adapter, read

if TYPE_CHECKING:
    from refgemma.lora.hosted import check_hosted
    from refgemma.lora.merge_file import merge_checkpoint

__all__ = [
    "Adapter",
    "AdapterConfig",
    "attach",
    "audit",
    "check_hosted",
    "checked_scale",
    "find_adapter",
    "fit",
    "merge",
    "merge_checkpoint",
    "narrowed",
    "read",
    "split_scale",
]

_ON_FIRST_USE = {"check_hosted": "hosted", "merge_checkpoint": "merge_file"}  # who only attaches needs neither


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'refgemma.lora' has no attribute {name!r}")
    return getattr(import_module(f"refgemma.lora.{_ON_FIRST_USE[name]}"), name)
