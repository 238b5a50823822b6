"""Adapters as PEFT writes them, with random numbers and without torch: models to adapt, values, folders.

PEFT decides which tensors an adapter has: their names and shapes come from it, either live (tests/peers) or from a
record (tests/goldens). Their content is drawn here, each tensor by its own name, so that a record of names and
shapes is enough to have the same adapter again.

Nothing is left at the values PEFT starts from, where an adapter changes nothing: B is not zero, magnitudes are not the
norms of the rows, saved copies are not copies. Changes are about a third of what they change.
"""

import hashlib
import json
import re
import zlib

import numpy as np

from refgemma.numerics import from_bfloat16, to_bfloat16
from tests.checkpoint.files import safetensors_bytes
from tests.models import Model, hf_tensors, map_params, random_batch, random_config, random_params, reshaped

PREFIX = "base_model.model."
TENSORS = (  # how the name of a tensor ends, the name of the adapter left out
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta",
)
NARROW = {
    "float16": lambda w: w.astype(np.float16).astype(np.float32),
    "bfloat16": lambda w: from_bfloat16(to_bfloat16(w)),
}


def model_to_adapt(seed, *, tied=True, square=False, weights="float32", num_tokens=16, **fixed):
    """A random model and batch; `square` makes q and out square, where a transpose fits; `weights` rounds them."""
    rng = np.random.default_rng([20240612, seed])
    if square:  # D = N H, and H = 8 so that a rank can be as large
        config = random_config(rng, 2, head_dim=8, num_heads=4, num_kv_heads=2, num_layers=2, query_scale=8**-0.5)
        config = reshaped(config, hidden_size=32, intermediate_size=45, tie_word_embeddings=tied)
    else:
        config = random_config(rng, seed % 3, tie_word_embeddings=tied, **fixed)
    params = random_params(rng, config)
    if not tied:
        params["head"] = random_params(rng, config)["embed"]
    params = map_params(NARROW.get(weights, lambda w: w), params)
    return Model(seed, config, params, *random_batch(rng, config, num_tokens))


def draw_tensors(seed, shapes, settings, model):
    """Values in float64 for each tensor name; `settings` are the fields of adapter_config.json."""
    base = hf_tensors(model.params)
    base.setdefault("lm_head.weight", base["model.embed_tokens.weight"])
    tensors = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        tensors[name] = draw(rng, name.removeprefix(PREFIX), tuple(shape), base, settings)
    if settings.get("ensure_weight_tying") and model.config.tie_word_embeddings:
        embed, head = PREFIX + "model.embed_tokens.", PREFIX + "lm_head."
        for of_head, of_embed in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
            if head + of_head in tensors:
                tensors[head + of_head] = tensors[embed + of_embed].T.copy()
        if head + "weight" in tensors:
            tensors[head + "weight"] = tensors[embed + "weight"]
    return tensors


def draw(rng, name, shape, base, settings):
    """One tensor. A product of factors comes out a third as large as the weight, once it is scaled."""
    kind = next(kind for kind in (*TENSORS, "base_layer.weight", "weight") if name.endswith("." + kind))
    module = name.removesuffix("." + kind)
    weight = np.asarray(base[module + ".weight"], dtype=np.float64)
    rms = np.sqrt(np.mean(weight**2))
    normal = rng.normal(size=shape)
    if kind == "base_layer.weight":
        return weight
    if kind == "weight":  # a module trained whole
        return weight + 0.3 * rms * normal
    if kind == "token_adapter.trainable_tokens_delta":  # rows that replace those of the table
        return rms * normal
    if kind == "lora_magnitude_vector":
        axis = 0 if module.endswith("embed_tokens") else 1
        return np.sqrt(np.sum(weight**2, axis=axis)) * rng.uniform(0.6, 1.4, size=shape)
    if kind == "lora_B.bias":
        return 0.3 / scale_of(module, settings) * normal
    if kind in ("lora_A.weight", "lora_embedding_A"):
        return normal
    return rms / 3 / scale_of(module, settings) / np.sqrt(shape[1]) * normal


def scale_of(module, settings):
    """Factor of the product of a module, near enough for its size."""

    def own(pattern, otherwise):
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)

    rank, alpha = (
        own(settings.get("rank_pattern", {}), settings["r"]),
        own(settings.get("alpha_pattern", {}), settings["lora_alpha"]),
    )
    return alpha / rank ** (0.5 if settings.get("use_rslora") else 1.0)


def write_adapter(folder, settings, tensors, dtype="float64", *, adapter_name=None):
    """The two files of an adapter; with `adapter_name` in the names of tensors, as in PEFT's memory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    stored = {spelled(name, adapter_name): stored_as(value, dtype) for name, value in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(stored))
    return folder


def stored_as(values, dtype):
    """The numbers as a file of `dtype` holds them; bfloat16 as bits."""
    if dtype == "bfloat16":
        return to_bfloat16(values.astype(np.float32))
    return np.ascontiguousarray(values.astype(dtype))


def spelled(name, adapter_name):
    """Name of a tensor with the adapter's name where PEFT has it in memory."""
    if adapter_name is None or "base_layer" in name:
        return name
    for kind in TENSORS:
        if name.endswith("." + kind):
            stem, _, last = kind.rpartition(".")
            inserted = f"{stem}.{adapter_name}.{last}" if last in ("weight", "bias") else f"{kind}.{adapter_name}"
            return name.removesuffix(kind) + inserted
    return name


def digest(tensors):
    """First 16 hex digits of the SHA-256 of all values: whether a record is about these tensors."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return sha.hexdigest()[:16]
