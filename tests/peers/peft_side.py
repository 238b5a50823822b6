"""PEFT's side of the comparison: its own model around transformers', its own files, its own logits.

The base is `tests.peers.eager`'s, so that in float64 nothing narrows; PEFT itself computes in the dtype of the base.
"""

import contextlib
import json
import warnings

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open

from tests.peers.eager import eager_model

torch.set_num_threads(1)  # matrices this small only wait for threads, on a busy machine for minutes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@contextlib.contextmanager
def quiet():
    """PEFT warns of much that is meant here: tied heads, patterns, biases that Gemma has not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def what_peft_writes(model, options, folder):
    """Fields of adapter_config.json, and {tensor name: shape}, for a new adapter; None where PEFT cannot do it."""
    with quiet():
        try:
            peer = get_peft_model(eager_model(model), LoraConfig(**options)).eval()
            logits(peer, model)  # some settings it takes, and then cannot run
        except (AttributeError, TypeError, ValueError):
            return None
        peer.save_pretrained(folder)
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    with safe_open(folder / WEIGHTS, "np") as file:
        return settings, {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def load(model, *folders, float64=True, names=("default",)):
    """PEFT's model with the adapters of some folders, the first active; sees that it took every tensor of them."""
    with quiet():
        peer = PeftModel.from_pretrained(eager_model(model, float64=float64), folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            taken = peer.load_adapter(folder, name)
            assert taken.missing_keys == taken.unexpected_keys == []
    return peer


def targeted(model, options):
    """Names of the modules that PEFT gives factors; none where it cannot do it."""
    with quiet():
        try:
            return sorted(get_peft_model(eager_model(model), LoraConfig(**options)).targeted_module_names)
        except (TypeError, ValueError):
            return []


def holds(peer, folder):
    """Whether PEFT has every tensor of a file in memory unchanged; it ignores what it cannot place."""
    with quiet():
        mine = get_peft_model_state_dict(peer)
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return mine.keys() == stored.keys() and all(torch.equal(mine[k], stored[k].to(mine[k].dtype)) for k in stored)


def logits(peer, model, **arguments):
    """Logits (B, T, V); whatever they are at padding."""
    real = model.positions >= 0
    with torch.no_grad():
        return peer(
            input_ids=torch.from_numpy(model.tokens),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            position_ids=torch.from_numpy(np.where(real, model.positions, 0)),
            use_cache=False,
            **arguments,
        ).logits.numpy()


def merged(peer):
    """PEFT's model with the active adapter merged.

    A tied head is untied before, as PEFT's documentation advises: else what is added to the table is added to both.
    """
    modules = list(peer.get_base_model().modules())
    tables = [module.weight for module in modules if isinstance(module, torch.nn.Embedding)]
    for module in modules:
        if isinstance(module, torch.nn.Linear) and any(module.weight is table for table in tables):
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
    with quiet():
        return peer.merge_and_unload()


def weights(peer):
    """{name: array} of a plain model of transformers."""
    return {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
