"""What an adapter changes in a given model: every tensor of its file is used, and every module it claims is found.

PEFT loads what matches and ignores the rest, so that a wrong prefix, a typing error in a pattern or a factor of another
model silently gives other answers. Here one error lists everything that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from refgemma.checkpoint.names import tensors_of
from refgemma.config import Config
from refgemma.errors import InputError, all_problems, listed, nearest_name
from refgemma.lora.adapter import Adapter
from refgemma.lora.adapter_config import (
    EMBEDDING,
    HEAD,
    low_rank_modules,
    rank_and_alpha,
    saved_modules,
    trained_tokens,
    unused_patterns,
)
from refgemma.numerics import Array


@dataclass(frozen=True, eq=False)
class LowRank:
    """``scale * up @ down`` added to one weight, and DoRA's magnitude if it has one."""

    path: str  # the weight, such as ``layers.3.attn.q``
    down: Array  # (R, I)
    up: Array  # (O, R)
    scale: float  # ``alpha / R`` or ``alpha / sqrt(R)``
    magnitude: Array | None = None  # norms of the rows of the changed weight (O,); of the embedding, columns (I,)
    bias: Array | None = None  # (O,), of the second factor; scaled like the product


@dataclass(frozen=True, eq=False)
class Replaced:
    """A weight that was trained whole."""

    path: str
    weight: Any  # the new one, as stored


@dataclass(frozen=True, eq=False)
class ReplacedRows:
    """Rows of a table that were trained whole."""

    path: str  # the table, ``embed`` or ``head``
    ids: tuple[int, ...]
    rows: Array  # the new ones, one per id


Change: TypeAlias = LowRank | Replaced | ReplacedRows


class Fit(NamedTuple):
    """What an adapter changes."""

    changes: list[Change]  # in the order of the name table
    notes: list[str]  # what shapes alone could not verify


def fit(adapter: Adapter, config: Config) -> Fit:
    """Match an adapter to a model; where PEFT ties the head, it changes with the embedding."""
    return _Fitting(adapter, config).run()


class _Fitting:
    """A matching in progress."""

    def __init__(self, adapter: Adapter, config: Config) -> None:
        tensors = tensors_of(replace(config, tie_word_embeddings=False))
        self.adapter = adapter
        self.tied = config.tie_word_embeddings
        self.shapes = {t.name.removesuffix(".weight"): t.shape for t in tensors}
        self.paths = {t.name.removesuffix(".weight"): t.path for t in tensors}
        self.unused = {module: dict(parts) for module, parts in adapter.modules.items()}
        self.problems: list[str] = []
        self.square: list[str] = []
        self.num_rectangular = 0  # factors whose shape shows that they are not transposed
        self.vocab_size = config.vocab_size

    def run(self) -> Fit:
        config = self.adapter.config
        matrices = [module for module, shape in self.shapes.items() if len(shape) == 2]
        factored = low_rank_modules(config, matrices, self.problems)
        saved = saved_modules(config, self.shapes, self.problems)
        tokens = trained_tokens(config, matrices, self.problems)
        if self.tied and config.ensure_weight_tying:
            for modules in (factored, saved):
                if EMBEDDING in modules or HEAD in modules:
                    modules += [module for module in (EMBEDDING, HEAD) if module not in modules]
        self.problems += unused_patterns(config, factored)
        if self.tied and tokens.get(EMBEDDING) == tokens.get(HEAD):
            tokens.pop(HEAD, None)  # one list for both: PEFT stores the rows once, as it does without one for the head
        both = self.tied and EMBEDDING in tokens and HEAD not in tokens
        if {*tokens} & {*factored, *saved} or (both and (HEAD in saved or (HEAD in factored and config.use_dora))):
            self.problems.append("trainable_token_indices and another change of the same table: not supported together")

        changes: list[Change] = []
        for module, path in self.paths.items():
            if module in saved:
                changes += self.replaced(module, path)
            if module in factored:
                changes += self.low_rank(module, path)
            if module in tokens:
                changes += self.rows(module, path, tokens[module])
        changes[:0] = self.stored_tables(factored)
        if both:
            changes += [replace(c, path="head") for c in changes if isinstance(c, ReplacedRows)]
        self.report_unused()
        if self.problems:
            base = self.adapter.config.base_model_name_or_path
            trained = f" (it says it was trained on {base!r:.80})" if base else ""
            raise InputError(
                f"adapter {self.adapter.folder} does not fit the model{trained}: {all_problems(self.problems)}"
            )
        return Fit(changes, self.notes())

    def low_rank(self, module: str, path: str) -> list[Change]:
        config, outputs, inputs = self.adapter.config, *self.shapes[module]
        rank, alpha = rank_and_alpha(config, module)
        scale = config.scale(rank, alpha)
        if module == HEAD and self.tied and config.ensure_weight_tying:
            rank, _ = rank_and_alpha(config, EMBEDDING)  # the factors are the table's, the scale is the head's own
        if table := module == EMBEDDING:  # PEFT's factors are those of the transposed table
            first, second = ("lora_embedding_A", (rank, outputs)), ("lora_embedding_B", (inputs, rank))
        else:
            first, second = ("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))
        a, b = self.take(module, *first, rank_axis=0), self.take(module, *second, rank_axis=1)
        magnitude = (
            self.take(module, "lora_magnitude_vector", (inputs if table else outputs,)) if config.use_dora else None
        )
        bias = self.take(module, "lora_B.bias", (outputs,)) if config.lora_bias and not table else None
        if config.lora_bias and table:
            self.problems.append("lora_bias is true and the embedding has factors: PEFT has no such adapter")
        if a is None or b is None:
            return []
        for part, factor in ((first[0], a), (second[0], b)):
            self.num_rectangular += factor.shape[0] != factor.shape[1]
            if factor.shape[0] == factor.shape[1]:
                self.square.append(f"{module}.{part}")
        down, up = (b.T, a.T) if table else (a, b)
        return [LowRank(path, down, up, scale, magnitude, bias)]

    def replaced(self, module: str, path: str) -> list[Change]:
        weight = self.take(module, "weight", self.shapes[module])
        return [] if weight is None else [Replaced(path, weight)]

    def rows(self, module: str, path: str, ids: list[int]) -> list[Change]:
        rows = self.take(module, "trainable_tokens", (len(ids), self.shapes[module][1]))
        wrong = [i for i in ids if i >= self.vocab_size]
        if wrong or len(set(ids)) < len(ids):
            self.problems.append(
                f"trainable_token_indices has {wrong[0]!r:.20}, outside the vocabulary of {self.vocab_size}"
                if wrong
                else "trainable_token_indices names a token twice"
            )
        return [] if rows is None else [ReplacedRows(path, tuple(ids), rows)]

    def stored_tables(self, factored: list[str]) -> list[Change]:
        """The tables that PEFT stores beside their factors: those that the adapter was trained on."""
        tables = {
            module: self.take(module, "base_layer", self.shapes[module])
            for module in (EMBEDDING, HEAD)
            if module in factored and "base_layer" in self.unused.get(module, {})
        }
        if self.tied:  # one table under either name
            tables = dict.fromkeys((EMBEDDING, HEAD), next(iter(tables.values()))) if tables else {}
        return [Replaced(self.paths[module], table) for module, table in tables.items() if table is not None]

    def take(self, module: str, part: str, shape: tuple[int, ...], rank_axis: int | None = None) -> Any:
        """One tensor, if its shape is right."""
        found = self.unused.get(module, {}).pop(part, None)
        if found is None:
            near = nearest_name(module, [name for name, parts in self.unused.items() if part in parts])
            hint = f" (nearest in the file: {near!r})" if near and near != module else ""
            self.problems.append(f"{module} has no {part}, which the configuration claims{hint}")
        elif found.shape != shape:
            self.problems.append(
                f"{module}.{part} has shape {found.shape}, expected {shape}{_why(found.shape, shape, rank_axis)}"
            )
            return None
        return found

    def report_unused(self) -> None:
        for module, parts in self.unused.items():
            for part in parts:
                if module not in self.shapes:
                    near = nearest_name(module, self.shapes)
                    why = "the model has no such module" + (f" (nearest: {near!r})" if near else "")
                else:
                    why = "the configuration does not claim it"
                self.problems.append(f"{module}.{part} would not be used: {why}")

    def notes(self) -> list[str]:
        """What is known of square factors, which would fit transposed as well."""
        if not self.square:
            return []
        seen = f"{self.num_rectangular} other factors of the file are not square, and stand as PEFT writes them"
        checked = seen if self.num_rectangular else "no other factor of the file is of a shape that could tell"
        return [
            f"{listed(self.square, 1, str)}: square, so its shape "
            f"cannot show whether it is transposed; names, rank and widths were checked; {checked}"
        ]


def _why(found: tuple[int, ...], shape: tuple[int, ...], rank_axis: int | None) -> str:
    """The likely cause of a wrong shape."""
    if len(found) != len(shape):
        return ""
    if len(shape) == 2 and found == shape[::-1]:
        return ": as if transposed"
    differ = [axis for axis in range(len(shape)) if found[axis] != shape[axis]]
    if rank_axis is not None and differ == [rank_axis]:
        return f": its rank is {found[rank_axis]}, the configuration says {shape[rank_axis]}"
    if rank_axis is not None and rank_axis not in differ:
        return f": its rank is right, but it is for a width of {found[differ[0]]}"
    return ""
