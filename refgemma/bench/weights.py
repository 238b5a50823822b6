"""A checkpoint of a named size with random weights, in Hugging Face layout, so that every engine can load it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from refgemma.checkpoint.folder import Outgoing, split_into_files, total_bytes, write_weights
from refgemma.checkpoint.load import Progress
from refgemma.checkpoint.names import Tensor, tensors_of
from refgemma.config import SIZES, Config, read_config
from refgemma.errors import InputError
from refgemma.files.atomic import check_folder_place, check_room, whole_folder
from refgemma.numerics import Array, to_bfloat16

# Every size that can be measured; "tiny" has the shape of the shipped model.
SHAPES: dict[str, Config] = {
    **SIZES,
    "tiny": Config(
        vocab_size=1000,
        hidden_size=184,
        intermediate_size=512,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_positions=8192,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        query_scale=32**-0.5,
        tie_word_embeddings=True,
    ),
}

_PIECE = 2**24  # numbers drawn at once, 64 MiB of them
_SHARD = 5 * 10**9  # bytes a file, as published checkpoints are cut


@contextmanager
def checkpoint(size: str, keep: str | Path | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """Provide a folder with random weights."""
    config = SHAPES[size]
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="refgemma-bench-") as temporary:
            yield make(Path(temporary) / size, config, progress)
        return
    folder = Path(keep).expanduser() / size
    if not folder.exists():
        make(folder, config, progress)
    elif read_config(folder) != config:
        raise InputError(f"{folder} holds a model of another shape: expected {size}; remove it, or keep elsewhere")
    yield folder


def make(folder: Path, config: Config, progress: Progress | None = None) -> Path:
    """Write a checkpoint of random bfloat16 weights, piece by piece, whole or not at all.

    Numbers are normal with the deviation that keeps activations near one, as in a trained model: products take as long
    with any numbers, save subnormal ones.
    """
    rng = np.random.default_rng(0)
    files = split_into_files((_outgoing(tensor, rng) for tensor in tensors_of(config)), _SHARD)
    check_folder_place(folder)
    check_room(folder, total_bytes(files))
    with whole_folder(folder) as unfinished:
        write_weights(unfinished, files, progress)
        (unfinished / "config.json").write_text(json.dumps(_hf_fields(config), indent=2) + "\n", encoding="utf-8")
    return folder


def _outgoing(tensor: Tensor, rng: np.random.Generator) -> Outgoing:
    return Outgoing(name=tensor.theirs, form="bfloat16", shape=tensor.shape, blocks=_drawn(tensor.shape, rng))


def _drawn(shape: tuple[int, ...], rng: np.random.Generator) -> Callable[[], Iterator[Array]]:
    deviation = np.float32(shape[1] ** -0.5 if len(shape) == 2 else 0.1)  # norm weights are offsets from one

    def blocks() -> Iterator[Array]:
        left = int(np.prod(shape))
        while left:
            count = min(left, _PIECE)
            yield to_bfloat16(rng.standard_normal(count, np.float32) * deviation)
            left -= count

    return blocks


def _hf_fields(config: Config) -> dict[str, object]:
    """What both engines read in ``config.json``."""
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
