"""Traces of other engines, read bit for bit: by name, by shape, in every format, and what has no place said."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from refgemma.config import Config
from refgemma.numerics import from_bfloat16, to_bfloat16
from refgemma.oracle import read_foreign, read_trace
from refgemma.oracle.operations import names_of
from tests.checkpoint.files import safetensors_bytes
from tests.models import random_model
from tests.oracle.gemmas import gemma_of, tapped

DEEPMIND = Path(__file__).parents[1] / "goldens" / "deepmind_gemma1_mqa.npz"
MODEL = random_model(5, num_tokens=9, num_layers=2, num_heads=6, num_kv_heads=3)
CONFIG, (B, T) = MODEL.config, MODEL.tokens.shape
OURS = tapped(gemma_of(MODEL), MODEL)

HOOKS = {  # name in transformers: ours; outputs of modules, and the inputs that no module gives out
    "model.layers.{i}.input_layernorm": "attn.norm",
    "model.layers.{i}.self_attn.q_proj": "attn.q",
    "model.layers.{i}.self_attn.k_proj": "attn.k",
    "model.layers.{i}.self_attn.v_proj": "attn.v",
    "model.layers.{i}.self_attn.o_proj.input": "attn.mix",
    "model.layers.{i}.self_attn.1": "attn.probs",
    "model.layers.{i}.self_attn.0": "attn.out",
    "model.layers.{i}.post_attention_layernorm.input": "attn.residual",
    "model.layers.{i}.post_attention_layernorm": "mlp.norm",
    "model.layers.{i}.mlp.gate_proj": "mlp.gate",
    "model.layers.{i}.mlp.up_proj": "mlp.up",
    "model.layers.{i}.mlp.act_fn": "mlp.act",
    "model.layers.{i}.mlp.down_proj.input": "mlp.gated",
    "model.layers.{i}.mlp": "mlp.down",
    "model.layers.{i}": "out",
}


def hooks_dump():
    """What forward hooks keep: heads joined with their width, as linear layers give them."""
    dump = {"model.embed_tokens": OURS["embed"], "model.norm": OURS["final_norm"], "lm_head": OURS["logits"]}
    for i in range(CONFIG.num_layers):
        for theirs, ours in HOOKS.items():
            value = OURS[f"layers.{i}.{ours}"]
            joined = ours in ("attn.q", "attn.k", "attn.v", "attn.mix")
            dump[theirs.format(i=i)] = value.reshape(B, T, -1) if joined else value
    return dump


def tokens_and_mask():
    return {"input_ids": MODEL.tokens, "position_ids": MODEL.positions.clip(0), "attention_mask": 1 * MODEL.real}


def write(path, dump):
    if path.suffix == ".npz":
        np.savez(path, **dump)
    else:
        save_file({name: np.ascontiguousarray(value) for name, value in dump.items()}, path)
    return path


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_hooks_on_transformers_modules(tmp_path, ending):
    trace = read_foreign(write(tmp_path / f"theirs.{ending}", hooks_dump() | tokens_and_mask()), CONFIG)
    assert np.array_equal(trace.tokens, MODEL.tokens)
    assert np.array_equal(trace.positions, MODEL.positions)
    assert trace.tokens.dtype == trace.positions.dtype == np.int64
    missing = {f"layers.{i}.attn.{kind}" for i in range(2) for kind in ("q_rope", "k_rope", "scores")}
    assert list(trace.tensors) == [name for name in names_of(CONFIG) if name not in missing]
    for name, value in trace.tensors.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, OURS[name]), name
    said = "model.layers.*.self_attn.q_proj is layers.*.attn.q; heads split: B T (N H) read as B T N H (2 of them)"
    assert said in trace.notes
    assert any("map another tensor to 'embed' if the engine scales later" in note for note in trace.notes)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_formats(tmp_path, dtype):
    path = tmp_path / "theirs.safetensors"
    values = {name: OURS[name] for name in ("embed", "logits")}
    narrow = {name: to_bfloat16(v) if dtype == "bfloat16" else v.astype(dtype) for name, v in values.items()}
    path.write_bytes(safetensors_bytes(narrow | {"tokens": MODEL.tokens}))
    trace = read_foreign(path, CONFIG)
    assert set(trace.dtypes.values()) == {dtype}
    for name, value in trace.tensors.items():
        want = from_bfloat16(narrow[name]) if dtype == "bfloat16" else narrow[name]
        assert value.dtype == want.dtype
        assert np.array_equal(value, want)


def test_axes_in_other_orders_are_recognised_and_said(tmp_path):
    dump = {
        "layers.0.attn.q_rope": OURS["layers.0.attn.q_rope"].swapaxes(1, 2),  # B N T H, as attention kernels want it
        "layers.0.attn.probs": OURS["layers.0.attn.probs"].swapaxes(1, 2),  # B T N S, as in Flax
        "logits": OURS["logits"].transpose(2, 0, 1),
        "tokens": MODEL.tokens,
    }
    trace = read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG)
    for name, value in trace.tensors.items():
        assert np.array_equal(value, OURS[name]), name
    assert "layers.0.attn.q_rope; axes transposed: B N T H read as B T N H" in trace.notes
    assert "logits; axes transposed: V B T read as B T V" in trace.notes


def test_one_row_without_a_batch_axis(tmp_path):
    one = {name: value[0] for name, value in hooks_dump().items()}
    path = write(tmp_path / "theirs.npz", one)
    trace = read_foreign(path, CONFIG, tokens=MODEL.tokens[0], positions=MODEL.positions[0])
    assert len(trace.tensors) > 30
    for name, value in trace.tensors.items():
        assert np.array_equal(value, OURS[name][:1]), name
    said = "model.layers.*.self_attn.q_proj is layers.*.attn.q; B added, heads split: T (N H) read as B T N H"
    assert any(note.startswith(said) for note in trace.notes)


def test_sizes_that_coincide_follow_the_other_layers(tmp_path):
    model = random_model(5, num_tokens=6, num_layers=2, num_heads=6, num_kv_heads=3)  # T = N
    ours = tapped(gemma_of(model), model)
    moved = {n: v.swapaxes(1, 2) if n.endswith("_rope") else v for n, v in ours.items()}
    rope = ["layers.0.attn.q_rope", "layers.0.attn.k_rope", "layers.1.attn.q_rope"]
    path = write(tmp_path / "a.npz", {name: moved[name] for name in rope} | {"tokens": model.tokens})
    trace = read_foreign(path, model.config)
    for name in rope:  # three key heads tell which axis is which, in this layer and the other
        assert np.array_equal(trace.tensors[name], ours[name]), name
    path = write(tmp_path / "b.npz", {rope[0]: ours[rope[0]], "tokens": model.tokens})
    trace = read_foreign(path, model.config)
    assert np.array_equal(trace.tensors[rope[0]], ours[rope[0]])  # nothing tells: as it stands
    assert trace.notes == (f"{rope[0]}; sizes coincide, so other axes are possible",)


def test_arrays_that_join_several(tmp_path):
    q, k, v = (OURS[f"layers.0.attn.{x}"] for x in "qkv")
    gate, up = OURS["layers.0.mlp.gate"], OURS["layers.0.mlp.up"]
    dumps = {
        "vllm": {
            "model.layers.0.self_attn.qkv_proj": np.concatenate([x.reshape(B, T, -1) for x in (q, k, v)], axis=-1),
            "model.layers.0.mlp.gate_up_proj": np.concatenate([gate, up], axis=-1),
        },
        "flax": {
            "layer_0/attn/q_einsum/__call__/0": q,
            "layer_0/attn/kv_einsum/__call__/0": np.stack([k, v]),
            "layer_0/mlp/gating_einsum/__call__/0": np.stack([gate, up], axis=2),
        },
    }
    for name, dump in dumps.items():
        trace = read_foreign(write(tmp_path / f"{name}.npz", dump | {"tokens": MODEL.tokens}), CONFIG)
        assert len(trace.tensors) == 5
        for ours, value in trace.tensors.items():
            assert np.array_equal(value, OURS[ours]), (name, ours)
        assert any("a part of it" in note for note in trace.notes)


def test_lists_of_the_whole_stream(tmp_path):
    stream = [OURS["embed"], OURS["layers.0.out"], OURS["final_norm"]]  # what transformers calls hidden_states
    probs = [OURS[f"layers.{i}.attn.probs"] for i in range(2)]
    apart = {f"hidden_states.{i}": x for i, x in enumerate(stream)} | {
        f"attentions.{i}": x for i, x in enumerate(probs)
    }
    for name, dump in {
        "apart": apart,
        "stacked": {"hidden_states": np.stack(stream), "attentions": np.stack(probs)},
    }.items():
        trace = read_foreign(write(tmp_path / f"{name}.npz", dump | {"tokens": MODEL.tokens}), CONFIG)
        assert list(trace.tensors) == [
            "embed", "layers.0.attn.probs", "layers.0.out", "layers.1.attn.probs", "final_norm",
        ]  # fmt: skip
        for ours, value in trace.tensors.items():
            assert np.array_equal(value, OURS[ours]), (name, ours)


def test_the_surer_of_two_names_is_taken(tmp_path):
    unscaled = OURS["embed"] / 7  # a module that leaves the scaling to the model around it
    dump = {"model.embed_tokens": unscaled, "hidden_states.0": OURS["embed"], "tokens": MODEL.tokens}
    for order in (list(dump), list(dump)[::-1]):
        trace = read_foreign(write(tmp_path / "theirs.npz", {name: dump[name] for name in order}), CONFIG)
        assert np.array_equal(trace.tensors["embed"], OURS["embed"])


def test_keys_beyond_the_tokens_are_cut_off(tmp_path):
    probs = OURS["layers.0.attn.probs"]
    longer = np.concatenate([probs, np.zeros((*probs.shape[:3], 7), np.float32)], axis=-1)  # a static cache
    path = write(tmp_path / "theirs.npz", {"layers.0.attn.probs": longer, "tokens": MODEL.tokens})
    trace = read_foreign(path, CONFIG)
    assert np.array_equal(trace.tensors["layers.0.attn.probs"], probs)
    assert trace.notes == ("layers.0.attn.probs; keys beyond the tokens cut off",)


@pytest.mark.parametrize("shape", ["BTV", "BV"])
def test_logits_of_the_last_position(tmp_path, shape):
    logits = OURS["logits"][:, -1:] if shape == "BTV" else OURS["logits"][:, -1]
    path = write(tmp_path / "theirs.npz", {"logits": logits, "tokens": MODEL.tokens})
    trace = read_foreign(path, CONFIG)
    assert trace.last
    assert trace.tensors["logits"].shape == (B, 1, CONFIG.vocab_size)
    assert np.array_equal(trace.tensors["logits"], OURS["logits"][:, -1:])
    np.save(tmp_path / "lone.npy", OURS["logits"][0])
    alone = read_foreign(tmp_path / "lone.npy", CONFIG, tokens=MODEL.tokens[0])
    assert not alone.last
    assert np.array_equal(alone.tensors["logits"], OURS["logits"][:1])


def test_logits_of_the_last_position_beside_tensors_of_all(tmp_path):
    path = write(tmp_path / "theirs.npz", hooks_dump() | tokens_and_mask() | {"lm_head": OURS["logits"][:, -1]})
    trace = read_foreign(path, CONFIG)
    assert not trace.last
    assert trace.tensors["final_norm"].shape == OURS["final_norm"].shape
    assert trace.ends == {"logits"}
    assert np.array_equal(trace.tensors["logits"], OURS["logits"][:, -1:])
    assert "lm_head is logits; T added: B V read as B T V; of the last position only" in trace.notes
    trace.save(tmp_path / "again.safetensors")
    again = read_trace(tmp_path / "again.safetensors")
    assert again.ends == trace.ends
    assert np.array_equal(again.tensors["logits"], trace.tensors["logits"])
    assert list(again.tensors) == list(trace.tensors)
    assert again.dtypes == trace.dtypes


@pytest.mark.parametrize("shape", ["BTV", "TBV"])
def test_logits_of_the_last_few_positions(tmp_path, shape):
    """As `transformers` stacks what it generated: one position a step, and the last of the prompt."""
    few = OURS["logits"][:, -5:]
    given = few if shape == "BTV" else few.swapaxes(0, 1)
    trace = read_foreign(write(tmp_path / "theirs.npz", {"logits": given, "tokens": MODEL.tokens}), CONFIG)
    assert trace.last
    assert not trace.ends
    assert np.array_equal(trace.tensors["logits"], few)
    assert any(note.startswith("logits") and note.endswith("; of the last 5 positions") for note in trace.notes)
    beside = read_foreign(write(tmp_path / "b.npz", hooks_dump() | {"tokens": MODEL.tokens, "lm_head": given}), CONFIG)
    assert not beside.last
    assert beside.ends == {"logits"}
    assert np.array_equal(beside.tensors["logits"], few)
    beside.save(tmp_path / "again.safetensors")
    assert np.array_equal(read_trace(tmp_path / "again.safetensors").tensors["logits"], few)


def test_the_last_few_positions_are_not_looked_for_where_a_row_ends_in_padding(tmp_path):
    mask = np.ones_like(MODEL.tokens)
    mask[0, -2:] = 0
    dump = {"logits": OURS["logits"][:, -4:], "tokens": MODEL.tokens, "attention_mask": mask}
    with pytest.raises(ValueError, match="holds no tensor that is recognised: logits has shape"):
        read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG)


@pytest.mark.parametrize("kept", [1, 4])
def test_a_token_that_was_drawn_and_not_fed(tmp_path, kept):
    """`generate` gives one id more than it fed; hooks saw all positions but that."""
    fed = {n: x[:, :, : T - 1, : T - 1] if x.shape[2:] == (T, T) else x[:, : T - 1] for n, x in hooks_dump().items()}
    fed["lm_head"] = fed["lm_head"][:, -kept:]
    path = write(tmp_path / "theirs.npz", fed | {"input_ids": MODEL.tokens})
    trace = read_foreign(path, CONFIG)
    said = f"{T - 1} positions were fed, {T} tokens given"
    assert trace.notes[0].startswith(said + ": the last, ")
    assert np.array_equal(trace.tokens, MODEL.tokens[:, :-1])
    assert trace.positions.shape == trace.tokens.shape
    assert np.array_equal(trace.tensors["final_norm"], OURS["final_norm"][:, :-1])
    assert np.array_equal(trace.tensors["logits"], OURS["logits"][:, T - 1 - kept : T - 1])
    # Who says what was fed is not corrected, but told.
    with pytest.raises(ValueError, match=said + ": give the tokens that were fed"):
        read_foreign(path, CONFIG, tokens=MODEL.tokens)
    # One tensor of all positions, and nothing is cut.
    whole = fed | {"input_ids": MODEL.tokens, "model.embed_tokens": OURS["embed"]}
    assert read_foreign(write(path, whole), CONFIG).tokens.shape == (B, T)


def test_columns_beyond_the_vocabulary_are_cut_off_and_said(tmp_path):
    V = CONFIG.vocab_size
    padded = np.concatenate([OURS["logits"], np.full((B, T, 128), 7, np.float32)], axis=-1)
    for given, want in [(padded, OURS["logits"]), (padded[:, -1], OURS["logits"][:, -1:])]:
        trace = read_foreign(write(tmp_path / "theirs.npz", {"lm_head": given, "tokens": MODEL.tokens}), CONFIG)
        assert np.array_equal(trace.tensors["logits"], want)
        assert any(note.endswith(f"columns beyond the vocabulary of {V} cut off") for note in trace.notes)
    for columns in (V - 1, V + 2000, CONFIG.hidden_size):
        wrong = {"logits": np.zeros((B, T, columns), np.float32), "tokens": MODEL.tokens}
        with pytest.raises(ValueError, match="holds no tensor that is recognised: logits has shape"):
            read_foreign(write(tmp_path / "theirs.npz", wrong), CONFIG)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_numbers_of_any_format_are_tokens(tmp_path, dtype):
    dump = {"logits": OURS["logits"], "input_ids": MODEL.tokens.astype(dtype)}
    assert np.array_equal(read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG).tokens, MODEL.tokens)


def test_a_mapping_goes_before_names(tmp_path):
    dump = {"blk.0.q": OURS["layers.0.attn.q"], "blk.1.q": OURS["layers.1.attn.q"], "x": OURS["final_norm"]}
    dump |= {"model.norm": OURS["embed"], "tokens": MODEL.tokens}
    mapping = {"blk.{i}.q": "layers.{i}.attn.q", "x": "final_norm"}
    trace = read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG, mapping=mapping)
    assert list(trace.tensors) == ["layers.0.attn.q", "layers.1.attn.q", "final_norm"]
    for name, value in trace.tensors.items():
        assert np.array_equal(value, OURS[name]), name


def test_a_pattern_that_the_file_has_of_some_layers_is_said(tmp_path):
    dump = {"blk.1.q": OURS["layers.1.attn.q"], "tokens": MODEL.tokens}
    trace = read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG, mapping={"blk.{i}.q": "layers.{i}.attn.q"})
    assert list(trace.tensors) == ["layers.1.attn.q"]
    assert trace.notes[0] == "the mapping's 'blk.{i}.q' is not in the file for 1 of 2 layers: 0"


def test_a_mapping_may_be_of_the_last_position(tmp_path):
    dump = {"a": OURS["embed"], "b": OURS["logits"][:, -1], "tokens": MODEL.tokens}
    trace = read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG, mapping={"a": "embed", "b": "logits"})
    assert trace.ends == {"logits"}


def test_the_first_of_two_names_of_one_rank_is_taken(tmp_path):
    """In the order of the file: "lm_head" and "embedder.decode" are both the logits themselves."""
    for order in (("lm_head", "embedder.decode"), ("embedder.decode", "lm_head")):
        dump = {name: OURS["logits"] * k for k, name in enumerate(order, start=1)} | {"tokens": MODEL.tokens}
        trace = read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG)
        assert np.array_equal(trace.tensors["logits"], OURS["logits"])


def test_what_has_no_place_is_said(tmp_path):
    dump = {
        "logits": OURS["logits"],
        "model.rotary_emb.0": OURS["embed"],
        "layers.0.mlp.gate": OURS["layers.0.mlp.gate"][..., :-1],
        "layers.1.mlp.gate": OURS["layers.1.mlp.gate"][..., :-1],
        "layers.0.mlp.up": OURS["layers.0.mlp.up"].astype(np.int64),
        "tokens": MODEL.tokens,
    }
    trace = read_foreign(write(tmp_path / "theirs.npz", dump), CONFIG)
    F = CONFIG.layers[0].intermediate_size
    assert list(trace.tensors) == ["logits"]
    assert trace.notes == (
        f"left out: layers.*.mlp.gate has shape {(B, T, F - 1)}, layers.*.mlp.gate needs {(B, T, F)} (2 of them)",
        "left out: layers.0.mlp.up is int64, expected float16, bfloat16, float32, float64",
        "left out, no known name: 'model.rotary_emb.0'",
    )


def test_positions_follow_the_mask(tmp_path):
    left = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokens = np.ones((2, 5), dtype=int)
    logits = np.zeros((2, 5, CONFIG.vocab_size), np.float32)
    path = write(tmp_path / "theirs.npz", {"logits": logits, "input_ids": tokens, "attention_mask": left})
    trace = read_foreign(path, CONFIG)
    assert trace.positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert any("counted from the first unmasked token" in note for note in trace.notes)
    one_row = {"logits": logits, "input_ids": tokens, "position_ids": np.arange(5)[None] + 3}
    assert read_foreign(write(path, one_row), CONFIG).positions.tolist() == [[3, 4, 5, 6, 7]] * 2
    assert (
        read_foreign(write(path, {"logits": logits, "ids": tokens}), CONFIG).positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    )


def test_deepminds_own_flax_run(tmp_path):
    c = Config.uniform(
        vocab_size=40, hidden_size=24, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=1, head_dim=8,
        max_positions=8192, rope_theta=10_000.0, rms_norm_eps=1e-6, query_scale=8**-0.5, tie_word_embeddings=True,
    )  # fmt: skip
    trace = read_foreign(DEEPMIND, c)
    assert list(trace.tensors) == ["layers.0.out", "layers.1.out", "layers.2.out", "logits"]  # and none of the weights
    with np.load(DEEPMIND) as arrays:
        assert np.array_equal(trace.tokens, arrays["tokens"])
        assert np.array_equal(trace.tensors["layers.1.out"], arrays["hidden/layer_1"])


LOGITS = {"logits": OURS["logits"]}


@pytest.mark.parametrize(
    ("dump", "options", "words"),
    [
        (LOGITS, {}, "holds no token ids (tokens, input_ids, token_ids): give the tokens that were run"),
        (LOGITS | {"tokens": MODEL.tokens + 1000}, {}, "is outside the vocabulary of"),
        (LOGITS | {"tokens": MODEL.tokens[None]}, {}, "expected token ids, (T,) or (B, T)"),
        (
            LOGITS | {"tokens": MODEL.tokens},
            {"tokens": MODEL.tokens[:, ::-1]},
            "has other tokens: row 0 has ",
        ),
        (LOGITS | {"tokens": MODEL.tokens}, {"tokens": [1, 2]}, "has other tokens: their shape is"),
        (
            LOGITS | {"tokens": MODEL.tokens, "position_ids": np.zeros((7, 2), int)},
            {},
            "'position_ids' has shape (7, 2): expected that of tokens",
        ),
        (
            LOGITS | {"tokens": MODEL.tokens, "positions": MODEL.positions - 5},
            {},
            "invalid position -6: expected 0 or more",
        ),
        ({"a": OURS["embed"], "tokens": MODEL.tokens}, {}, "holds no tensor that is recognised: it has 'a'; a mapping"),
        ({"tokens": MODEL.tokens}, {}, "holds no tensor that is recognised: it has none"),
        (
            {"logits": OURS["embed"], "tokens": MODEL.tokens},
            {},
            "holds no tensor that is recognised: logits has shape",
        ),
        (
            LOGITS | {"tokens": MODEL.tokens},
            {"mapping": {"x": "logits"}},
            "the mapping names 'x', which is not in the file",
        ),
        (
            LOGITS | {"tokens": MODEL.tokens},
            {"mapping": {"logits": "embed"}},
            f"an entry of the mapping does not fit: logits has shape {OURS['logits'].shape}, embed needs",
        ),
        (
            LOGITS | {"tokens": MODEL.tokens, "x": OURS["embed"]},
            {"mapping": {"logits": "logits", "x": "logits"}},
            "the mapping has both 'logits' and 'x' for 'logits': leave one out",
        ),
        (
            {"blk.0.q": OURS["layers.0.attn.q"], "tokens": MODEL.tokens},
            {"mapping": {"blk.0.q": "layers.{i}.attn.q"}},
            "'layers.{i}.attn.q' contains {i}, 'blk.0.q' does not; write it in both, or the number of a layer",
        ),
        (
            {"blk.0.q": OURS["layers.0.attn.q"], "tokens": MODEL.tokens},
            {"mapping": {"blk.{i}.q": "layers.0.attn.q"}},
            "'blk.{i}.q' contains {i}, 'layers.0.attn.q' does not; write it in both, or the number of a layer",
        ),
        (
            LOGITS | {"tokens": MODEL.tokens, "attention_mask": np.zeros_like(MODEL.tokens)},
            {},
            "every position is padding (-1, or masked): there is nothing to compare",
        ),
        (
            LOGITS | {"tokens": MODEL.tokens, "positions": np.full_like(MODEL.tokens, -1)},
            {},
            "every position is padding (-1, or masked): there is nothing to compare",
        ),
        (LOGITS | {"tokens": MODEL.tokens + 0.5}, {}, "'tokens' holds numbers that are not whole: expected token ids"),
        (LOGITS | {"tokens": MODEL.tokens > 9}, {}, "'tokens' holds true and false, as masks do: expected token ids"),
        (LOGITS | {"tokens": MODEL.tokens.astype(np.float16)}, {}, "'tokens' is float16, which rounds token ids"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, dump, options, words):
    path = write(tmp_path / "theirs.npz", dump)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        read_foreign(path, CONFIG, **options)
    assert "\n" not in str(raised.value)
