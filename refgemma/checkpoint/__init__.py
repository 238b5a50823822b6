"""Files to parameters: where a model name is looked up, which tensors its files hold, and how they become arrays."""

from refgemma.checkpoint.find import find_model
from refgemma.checkpoint.folder import describe
from refgemma.checkpoint.load import load_params
from refgemma.files.safetensors import StoredTensor, read_safetensors

__all__ = ["StoredTensor", "describe", "find_model", "load_params", "read_safetensors"]
