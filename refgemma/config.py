"""The facts that distinguish one Gemma from another, and nothing else.

A `Config` holds the numbers of the whole model, and one row of numbers per layer; the published sizes are plain
instances in `SIZES`, so that two of them can be compared by eye. Axis letters (D, F, L, N, K, H, V) are the ones used
in every shape of this project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from refgemma.errors import InputError

SUPPORTED_MODEL_TYPES = ("gemma",)
_FLAT = (  # in the order in which files of a model with equal layers have them
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_positions", "rope_theta", "rms_norm_eps", "query_scale", "tie_word_embeddings",
)  # fmt: skip
_MOST_LAYERS = 10_000  # an upper limit, so that a typing error cannot exhaust memory


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Numbers of one layer.

    Attributes
    ----------
    num_heads : int
        Query heads, N.
    num_kv_heads : int
        Key and value heads, K; divides N. K = 1 is multi-query attention, K = N plain multi-head attention.
    head_dim : int
        Width of one head, H; even, and **not** ``D // N`` (7B: 256, where 3072 / 16 is 192).
    intermediate_size : int
        Hidden width of the MLP, F.
    query_scale : float
        Multiplies the queries once, before they meet the keys; ``H ** -0.5`` in Gemma 1.
    rope_theta : float
        Base of the rotary frequencies.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    query_scale: float
    rope_theta: float

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            _check_count(name, getattr(self, name))
        _check_positive("query_scale", self.query_scale)
        _check_positive("rope_theta", self.rope_theta)
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} is odd: rotary embedding rotates the two halves of a head together"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and constants of one Gemma model.

    Attributes
    ----------
    vocab_size : int
        Rows of the embedding table, V.
    hidden_size : int
        Width of the residual stream, D.
    max_positions : int
        Longest context, in tokens.
    rms_norm_eps : float
        Added to the mean square inside the root of every norm.
    tie_word_embeddings : bool
        True where the output head is the embedding table itself.
    layers : tuple of Layer
        One row of numbers per transformer block; L of them.
    """

    vocab_size: int
    hidden_size: int
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_positions"):
            _check_count(name, getattr(self, name))
        _check_positive("rms_norm_eps", self.rms_norm_eps)
        if not isinstance(self.tie_word_embeddings, bool):
            raise InputError(f"tie_word_embeddings is {self.tie_word_embeddings!r}: expected true or false")
        if not isinstance(self.layers, tuple) or not self.layers or not all(isinstance(x, Layer) for x in self.layers):
            raise InputError(f"layers is {self.layers!r:.60}: expected a tuple of at least one Layer")

    @classmethod
    def uniform(cls, *, num_layers: int, **numbers: Any) -> Config:
        """Make a model whose layers all have the same numbers.

        Parameters
        ----------
        num_layers : int
            Transformer blocks, L.
        **numbers : int, float or bool
            Every other field of `Config` and of `Layer`, by name.

        Returns
        -------
        Config
            With `num_layers` equal rows.

        Raises
        ------
        ValueError
            If a number is out of range.
        """
        _check_count("num_layers", num_layers)
        if num_layers > _MOST_LAYERS:
            raise InputError(f"num_layers is {num_layers!r:.60}: expected at most {_MOST_LAYERS:,}, a typing error?")
        row = {field.name: numbers.pop(field.name) for field in fields(Layer) if field.name in numbers}
        return cls(**numbers, layers=(Layer(**row),) * num_layers)

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks, L."""
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers, the tied table counted once."""
        D = self.hidden_size
        table = self.vocab_size * D
        blocks = 0
        for layer in self.layers:
            attention = 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim * D  # q and out, k and v
            mlp = 3 * D * layer.intermediate_size  # gate, up, down
            blocks += attention + mlp + 2 * D  # and one norm before each
        head = 0 if self.tie_word_embeddings else table
        return table + blocks + D + head


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}: expected a whole number of at least 1")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name} is {value!r}: expected a positive number")


def axis_sizes(config: Config, layer: int = 0) -> dict[str, int]:
    """Size of each axis of a weight by its letter; heads and MLP are those of one layer."""
    row = config.layers[layer]
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": row.intermediate_size,
        "N": row.num_heads,
        "K": row.num_kv_heads,
        "H": row.head_dim,
    }


def to_json(config: Config) -> dict[str, Any]:
    """The numbers of a model as JSON, for files: flat where all layers are alike, else with a list of layers."""
    rows = set(config.layers)
    if len(rows) > 1:
        return asdict(config)
    numbers = asdict(config) | {"num_layers": config.num_layers} | asdict(*rows)
    return {name: numbers[name] for name in _FLAT}


def from_json(numbers: Mapping[str, Any]) -> Config:
    """A model from what `to_json` wrote."""
    if "layers" in numbers:
        return Config(**{**numbers, "layers": tuple(Layer(**row) for row in numbers["layers"])})
    return Config.uniform(**numbers)


def _gemma1(**shape: Any) -> Config:
    """What all published Gemma 1 models share: head width, context, constants, tied head."""
    return Config.uniform(
        vocab_size=256_000,
        head_dim=256,
        max_positions=8192,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        query_scale=256**-0.5,
        tie_word_embeddings=True,
        **shape,
    )


SIZES: dict[str, Config] = {
    # Also gemma-2b-it, gemma-1.1-2b-it, codegemma-2b, codegemma-1.1-2b.
    "gemma-2b": _gemma1(num_layers=18, hidden_size=2048, intermediate_size=16_384, num_heads=8, num_kv_heads=1),
    # Also gemma-7b-it, gemma-1.1-7b-it, codegemma-7b, codegemma-7b-it, codegemma-1.1-7b-it.
    "gemma-7b": _gemma1(num_layers=28, hidden_size=3072, intermediate_size=24_576, num_heads=16, num_kv_heads=16),
}


# (name in a Hugging Face config.json, name in Config)
_HF_NAMES = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("intermediate_size", "intermediate_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_heads"),
    ("num_key_value_heads", "num_kv_heads"),
    ("head_dim", "head_dim"),
    ("max_position_embeddings", "max_positions"),
    ("rms_norm_eps", "rms_norm_eps"),
)

# Options of other families and of quantised copies, each of which would give other logits.
_CHANGE_THE_FORMULAS = (
    "attention_bias",
    "use_bidirectional_attention",
    "query_pre_attn_scalar",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "quantization_config",
)

# Gemma 1 files say "gelu", the name of the erf form, but every Gemma was trained with the tanh form:
# https://github.com/huggingface/transformers/pull/29402
_TANH_GELU = ("gelu", "gelu_pytorch_tanh")


def read_config(path: str | Path) -> Config:
    """Read a Hugging Face ``config.json``."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        fields = json_object(path.read_bytes(), path, "the config.json of a Gemma model")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: a model folder holds config.json beside its weights") from None
    try:
        return config_from_hf(fields)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def json_object(data: bytes, name: str | Path, expected: str) -> dict[str, Any]:
    """The JSON object in the bytes of a file; its name and what was expected are for the error."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or brackets nested too deeply
        raise InputError(f"{name} is not valid JSON ({error}): expected {expected}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} holds a JSON {type(value).__name__}: expected an object")
    return value


def config_from_hf(fields: Mapping[str, Any]) -> Config:
    """Translate the fields of a Hugging Face ``config.json``.

    Three traps. ``hidden_act: "gelu"`` means the tanh form. ``head_dim`` is read, never derived. ``rope_theta`` is
    at the top level in older files and inside ``rope_parameters`` in newer ones.
    """
    model_type = fields.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(repr(name) for name in SUPPORTED_MODEL_TYPES)
        raise InputError(f"model_type is {model_type!r}: supported is {supported} (Gemma 1, 1.1 and CodeGemma)")

    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"rope_parameters is {rope!r}: expected an object with rope_theta")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"rope_type is {rope_type!r}: Gemma 1 turns its heads by the plain angles ('default')")
    thetas = [source["rope_theta"] for source in (fields, rope) if source.get("rope_theta") is not None]
    if len(thetas) == 2 and thetas[0] != thetas[1]:
        raise InputError(f"rope_theta is {thetas[0]!r}, but {thetas[1]!r} in rope_parameters: expected one value")

    missing = [name for name, _ in _HF_NAMES if name not in fields]
    if not thetas:
        missing.append("rope_theta")
    if missing:
        raise InputError(f"missing {', '.join(missing)}: each decides the result, so none is guessed")

    for name in ("hidden_act", "hidden_activation"):
        if fields.get(name) is not None and fields[name] not in _TANH_GELU:
            raise InputError(f"{name} is {fields[name]!r}: Gemma uses the tanh form of GELU ('gelu_pytorch_tanh')")
    for name in _CHANGE_THE_FORMULAS:
        if fields.get(name):
            raise InputError(f"{name} is {fields[name]!r:.60}: no published Gemma 1 has it, and it is not supported")

    values = {name: fields[hf_name] for hf_name, name in _HF_NAMES}
    head_dim = values["head_dim"]
    if not isinstance(head_dim, int) or not 1 <= head_dim < 2**63:
        raise InputError(f"head_dim is {head_dim!r}: expected a whole number of at least 1")
    return Config.uniform(
        **values,
        rope_theta=thetas[0],
        query_scale=head_dim**-0.5,
        tie_word_embeddings=fields.get("tie_word_embeddings", True),
    )
