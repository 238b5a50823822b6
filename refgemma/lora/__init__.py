"""LoRA adapters in PEFT's format: read strictly, attached, merged, audited."""

from refgemma.lora.adapter_config import AdapterConfig
from refgemma.lora.attach import attach, checked_scale, narrowed
from refgemma.lora.audit import audit
from refgemma.lora.find import find_adapter, split_scale
from refgemma.lora.fit import fit
from refgemma.lora.hosted import check_hosted
from refgemma.lora.merge import merge
from refgemma.lora.merge_file import merge_checkpoint
from refgemma.lora.read import Adapter, read

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
