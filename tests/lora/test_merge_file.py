"""Checkpoints with adapters merged into them: every byte, the files beside them, and nothing at all after a failure."""

import errno
import itertools
import json
import os
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import safetensors

import refgemma
from refgemma import lora
from refgemma.config import read_config
from refgemma.files.safetensors import read_safetensors
from refgemma.lora import merged_checkpoint, tiles
from refgemma.lora.merged_checkpoint import merge_checkpoint
from refgemma.lora.tiles import rounded
from refgemma.numerics import from_bfloat16
from tests.checkpoint.files import one_sentence, write_model, write_shards
from tests.lora.folders import PREFIX, factors, model, write
from tests.models import random_model

FORMS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@pytest.fixture(scope="module")
def m():
    return model()


@pytest.fixture
def adapter(tmp_path, m):
    return write(tmp_path / "adapter", m, dtype="float32")


def untied(m):
    rng = np.random.default_rng(3)
    head = rng.normal(size=m.params["embed"].shape).astype(np.float32)
    return replace(m, config=replace(m.config, tie_word_embeddings=False), params={**m.params, "head": head})


def stored(folder):
    """Format and numbers of every tensor, as the safetensors library reads them; bfloat16 as bits."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            assert name not in found
            data = np.frombuffer(bytes(entry["data"]), NUMPY[entry["dtype"]]).reshape(entry["shape"])
            found[name] = (entry["dtype"], data)
    return found


def wide(dtype, data):
    return (from_bfloat16(data) if dtype == "BF16" else data).astype(np.float64)


def low_rank(tensors, name, scale=2.0):
    """``scale B A`` of a weight, as the adapter's float32 files hold the factors; None without factors."""
    key = PREFIX + name.removesuffix("weight")
    if key + "lora_A.weight" not in tensors:
        return None
    a, b = (tensors[key + part].astype(np.float32).astype(np.float64) for part in ("lora_A.weight", "lora_B.weight"))
    return scale * (b @ a)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kept", ["BF16", "F16", "F32"])
def test_every_weight_is_the_base_plus_the_update_rounded_once(tmp_path, m, adapter, kept, dtype):
    base = write_model(tmp_path / "base", m, kept)
    merged = merge_checkpoint(base, adapter, tmp_path / "out", dtype)
    before, after, tensors = stored(base), stored(tmp_path / "out"), factors(m)
    assert after.keys() == before.keys()
    changed = 0
    for name, (form, data) in after.items():
        old = before[name]
        assert FORMS[form] == (dtype or FORMS[kept])
        update = low_rank(tensors, name)
        if update is None:
            if form == kept:
                assert data.tobytes() == old[1].tobytes()
            else:
                assert data.tobytes() == rounded(wide(*old), FORMS[form]).tobytes()
            continue
        changed += 1
        want = wide(*old) + update
        # Sums of three products in another order, and four roundings in float64; then half a step of the format, which
        # near a tie may go either way. 2 ** -25 is half the smallest number of float16.
        step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}[form]
        slack = 8 * 2.0**-53 * (np.abs(want) + np.abs(update))
        assert np.all(
            np.abs(wide(form, data) - want) <= step * np.abs(want) * (1 + step) + slack + 2.0**-25 * (form == "F16")
        )
        assert np.any(np.abs(wide(form, data) - wide(*old)) > 2 * step * np.abs(want))
    assert changed == len(merged.changed) == 4
    assert merged.nbytes == sum(data.nbytes for _, data in after.values())
    assert (merged.files, merged.untied, merged.dtype) == (1, False, dtype or FORMS[kept])


@pytest.mark.parametrize("kept", ["BF16", "F32"])
def test_it_is_what_merging_in_memory_gives(tmp_path, kept, small_tokenizer, monkeypatch):
    m = random_model(2, vocab_size=small_tokenizer.vocab_size, num_layers=2)
    base = write_model(tmp_path / "base", m, kept)
    shutil.copy(small_tokenizer.path, base / "tokenizer.model")
    adapter = write(tmp_path / "adapter", m, dtype="float32")
    monkeypatch.setattr(merged_checkpoint, "_BLOCK", 1000)  # a few rows at a time
    monkeypatch.setattr(tiles, "TILE", 300)
    merge_checkpoint(base, f"{adapter}:0.5", tmp_path / "out")
    gemma = refgemma.load(base, weights=FORMS[kept]).merge_lora(lora.read(adapter), 0.5)
    again = refgemma.load(tmp_path / "out", weights=FORMS[kept])
    assert np.array_equal(gemma.logits([2, 3, 4]), again.logits([2, 3, 4]))


def test_several_adapters_are_summed(tmp_path, m):
    base = write_model(tmp_path / "base", m, "F32")
    one = write(tmp_path / "one", m, factors(m, seed=1), dtype="float32")
    two = write(tmp_path / "two", m, factors(m, seed=2), dtype="float32")
    merge_checkpoint(base, [f"{one}:0.5", lora.read(two)], tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    (_, old), (_, new) = stored(base)[name], stored(tmp_path / "out")[name]
    want = old + low_rank(factors(m, seed=1), name, 1.0) + low_rank(factors(m, seed=2), name, 2.0)
    # One rounding to float32; what float64 does is far below.
    assert np.all(np.abs(new - want) <= 1.001 * 2.0**-24 * np.abs(want))
    swapped = old + low_rank(factors(m, seed=1), name, 2.0) + low_rank(factors(m, seed=2), name, 1.0)
    assert np.any(np.abs(new - swapped) > 1e-3)


# ---- the head


def embed_factors(m, *, head="none"):
    """Factors for the embedding, for the head, or for both: alike, or different."""
    rng = np.random.default_rng(4)
    V, D = m.config.vocab_size, m.config.hidden_size
    a, b = rng.normal(size=(2, V)), rng.normal(size=(D, 2))
    embed = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
    }
    second = {"lora_A.weight": b.T.copy(), "lora_B.weight": a.T.copy() * (1.0 if head == "alike" else 0.5)}
    return (embed if head != "only" else {}) | (
        {f"{PREFIX}lm_head.{part}": w for part, w in second.items()} if head != "none" else {}
    )


@pytest.mark.parametrize(
    ("head", "targets", "changed", "stays_tied"),
    [
        ("none", ["embed_tokens"], ("embed",), False),
        ("only", ["lm_head"], ("head",), False),
        ("other", ["embed_tokens", "lm_head"], ("embed", "head"), False),
        ("alike", ["embed_tokens", "lm_head"], ("embed", "head"), True),
    ],
)
@pytest.mark.parametrize("kept", ["BF16", "F32"])
def test_a_tied_head_stays_tied_only_if_it_comes_out_alike(tmp_path, m, kept, head, targets, changed, stays_tied):
    base = write_model(tmp_path / "base", m, kept)
    options = {"r": 2, "lora_alpha": 2, "target_modules": targets}
    adapter = write(tmp_path / "adapter", m, embed_factors(m, head=head), "float32", **options)
    merged = merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    assert merged.changed == changed
    assert merged.untied is not stays_tied
    assert read_config(tmp_path / "out").tie_word_embeddings is stays_tied
    assert ("lm_head.weight" in after) is not stays_tied
    old = before["model.embed_tokens.weight"]
    tables = {"embed": after["model.embed_tokens.weight"], "head": after.get("lm_head.weight")}
    for path, table in tables.items():
        if table is not None:
            assert (table[1].tobytes() == old[1].tobytes()) is (path not in changed)
    a, b = (
        embed_factors(m)[f"{PREFIX}model.embed_tokens.lora_embedding_{x}"].astype(np.float32).astype(float)
        for x in "AB"
    )
    if "embed" in changed:
        want = wide(*old) + (b @ a).T
        step = {"BF16": 2.0**-8, "F32": 2.0**-24}[kept]
        assert np.all(np.abs(wide(*tables["embed"]) - want) <= 1.01 * step * np.abs(want) + 1e-15)


def test_a_head_of_its_own_stays_one(tmp_path, m):
    m = untied(m)
    base = write_model(tmp_path / "base", m, "BF16")
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    adapter = write(tmp_path / "adapter", m, embed_factors(m, head="only"), "float32", **options)
    merged = merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    assert (merged.changed, merged.untied) == (("head",), False)
    assert read_config(tmp_path / "out").tie_word_embeddings is False
    assert np.array_equal(before["model.embed_tokens.weight"][1], after["model.embed_tokens.weight"][1])
    assert not np.array_equal(before["lm_head.weight"][1], after["lm_head.weight"][1])


def test_what_was_trained_whole_is_rounded_once(tmp_path, m):
    """A norm in float64 whose way by float32 would end at another bfloat16 number."""
    base = write_model(tmp_path / "base", m, "BF16")
    norm = np.ones(m.config.hidden_size)
    norm[1] += 2.0**-8 + 2.0**-40
    tensors = factors(m) | {f"{PREFIX}model.norm.weight": norm}
    adapter = write(tmp_path / "adapter", m, tensors, "float64", modules_to_save=["model.norm"])
    merged = merge_checkpoint(base, adapter, tmp_path / "out")
    assert "final_norm" in merged.changed
    _, bits = stored(tmp_path / "out")["model.norm.weight"]
    assert list(from_bfloat16(bits[:3])) == [1, 1 + 2.0**-7, 1]


# ---- files


def test_configuration_and_tokenizer_come_along(tmp_path, m, adapter):
    base = write_model(tmp_path / "base", m, "BF16")
    kept = {
        "generation_config.json": b'{"eos_token_id": 1}',
        "tokenizer.model": b"pieces",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{ }",
        "special_tokens_map.json": b"{  }",
        "added_tokens.json": b"{   }",
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"terms",
    }
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
        (base / name).symlink_to(tmp_path / name)  # as in the hub's cache
    (base / "README.md").write_text("about another model")
    (base / "optimizer.pt").write_bytes(b"")
    merge_checkpoint(base, adapter, tmp_path / "out")
    found = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert found.keys() == {*kept, "config.json", "model.safetensors"}
    assert all(found[name].read_bytes() == data and not found[name].is_symlink() for name, data in kept.items())
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "written"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({}, {"torch_dtype": "float32"}),
    ],
)
def test_the_configuration_names_the_format(tmp_path, m, adapter, names, written):
    base = write_model(tmp_path / "base", m, "BF16")
    fields = json.loads((base / "config.json").read_text()) | names
    fields.pop("tie_word_embeddings")  # true if it is not there
    (base / "config.json").write_text(json.dumps(fields))
    merge_checkpoint(base, adapter, tmp_path / "out", "float32")
    assert json.loads((tmp_path / "out/config.json").read_text()) == fields | written | {"tie_word_embeddings": True}


def test_mixed_formats_are_kept_and_named_by_the_widest(tmp_path):
    """Widths are odd: float32 numbers that follow a matrix in float16 would begin in the middle of one."""
    odd = random_model(2, num_layers=3, hidden_size=45, intermediate_size=77)

    def narrow(tensors):
        return {name: w.astype(np.float16) if "up_proj" in name else w for name, w in tensors.items()}

    base = write_model(tmp_path / "base", odd, "F32", change=narrow)
    merged = merge_checkpoint(base, write(tmp_path / "adapter", odd, dtype="float32"), tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    assert {name: form for name, (form, _) in after.items()} == {name: form for name, (form, _) in before.items()}
    assert merged.dtype == json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"
    narrow_sizes = [data.nbytes for form, data in after.values() if form == "F16"]
    assert sum(narrow_sizes) % 4
    for tensor in read_safetensors(tmp_path / "out/model.safetensors").values():
        assert tensor.data.flags.aligned


def test_many_new_rows_take_no_room_for_a_matrix_of_ones_and_zeros(tmp_path, m, monkeypatch):
    """At a vocabulary of 256,000, a thousand columns of float64 would be 2 GB."""
    monkeypatch.setattr(merged_checkpoint, "_BLOCK", 2**14)
    monkeypatch.setattr(tiles, "TILE", 2**12)
    big = random_model(2, num_layers=1, vocab_size=20_000, hidden_size=40, num_tokens=9)
    base = write_model(tmp_path / "base", big, "BF16")
    ids = list(range(5, 20_000, 40))[::-1]
    rows = np.random.default_rng(5).normal(size=(len(ids), 40))
    tensors = factors(big) | {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    adapter = write(tmp_path / "adapter", big, tensors, "float32", trainable_token_indices=ids)
    tracemalloc.start()
    try:
        merged = merge_checkpoint(base, adapter, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not merged.untied  # both tables get the rows
    old, new = (from_bfloat16(stored(folder)["model.embed_tokens.weight"][1]) for folder in (base, tmp_path / "out"))
    want = old.copy()
    want[ids] = from_bfloat16(rounded(rows.astype(np.float32).astype(np.float64), "bfloat16"))
    assert np.array_equal(new, want)
    # A byte for each table, which is counted though nearly all of it is never touched; in float64 it would be eight.
    assert peak < 3 * 20_000 * len(ids)


@pytest.mark.parametrize("given", [write_model, write_shards])
def test_shards_hold_the_same_as_one_file(tmp_path, m, adapter, given):
    base = given(tmp_path / "base", m, "BF16")
    whole = merge_checkpoint(base, adapter, tmp_path / "whole")
    largest = max(data.nbytes for _, data in stored(base).values())
    limit = largest + 1000
    steps = []
    merged = merge_checkpoint(base, adapter, tmp_path / "out", shard_bytes=limit, progress=lambda *s: steps.append(s))
    assert merged.files > 3
    assert steps[-1] == (whole.nbytes, whole.nbytes)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{i:05}-of-{merged.files:05}.safetensors" for i in range(1, merged.files + 1)
    ]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.nbytes == merged.nbytes
    held = []
    for shard in shards:
        with safetensors.safe_open(shard, "np") as file:
            names = set(file.keys())
            assert file.metadata() == {"format": "pt"}
        assert names == {name for name, place in index["weight_map"].items() if place == shard.name}
        held.append([tensor.nbytes for tensor in read_safetensors(shard).values()])
    assert max(map(sum, held)) <= limit
    assert all(sum(sizes) + following[0] > limit for sizes, following in itertools.pairwise(held))  # as few as can be
    one, several = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert one.keys() == several.keys()
    assert all(one[name][1].tobytes() == several[name][1].tobytes() for name in one)
    assert not (tmp_path / "whole/model.safetensors.index.json").exists()


def test_leftovers_of_old_conversions_are_left_behind(tmp_path, m, adapter):
    def add(tensors):
        old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
        return tensors | old | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    base = write_model(tmp_path / "base", m, "F32", change=add)
    merge_checkpoint(base, adapter, tmp_path / "out")
    names = stored(tmp_path / "out").keys()
    assert names == stored(base).keys() - set(add({"model.embed_tokens.weight": 0})) | {"model.embed_tokens.weight"}


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(merged_checkpoint, "_BLOCK", 2**14)
    monkeypatch.setattr(tiles, "TILE", 2**12)
    big = random_model(2, hidden_size=200, intermediate_size=4000, num_layers=4, num_tokens=9)
    base = write_model(tmp_path / "base", big, "F32")
    adapter = write(tmp_path / "adapter", big, factors(big, 1), "float32", r=1)
    size = (base / "model.safetensors").stat().st_size
    peaks = []
    for attempt in range(3):  # a thread of another test may allocate meanwhile, but not each time
        tracemalloc.start()
        try:
            merge_checkpoint(base, adapter, tmp_path / f"out{attempt}")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    peak = min(peaks)
    # Blocks of 16,384 numbers, tiles of 4,096 on each core with some ten arrays in float64: well below a megabyte each.
    # The rest is Python's. The model has 40 MB, its largest weight 3 MB.
    assert size > 30e6
    assert peak < 2.5e6


# ---- refusals, and what is left after them


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def setting(tmp_path, m, adapter):
    """``setting(**options)`` merges and sees that an error leaves nothing behind; gives the error."""
    base = write_model(tmp_path / "base", m, "BF16")

    def attempt(error, out="out", **options):
        before = everything(tmp_path)
        with pytest.raises(error) as caught:
            merge_checkpoint(**{"base": base, "adapters": adapter, "out": tmp_path / out} | options)
        assert everything(tmp_path) == before
        return one_sentence(caught) if str(caught.value) else ""

    return attempt


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_what_exists_is_not_touched(tmp_path, setting, what):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to(tmp_path / "nowhere")}[what]()
    assert "exists: expected the name of a folder to make" in setting(FileExistsError)


def test_bad_requests(tmp_path, setting):
    assert "is not a folder" in setting(FileNotFoundError, out="no/such/place")
    assert "dtype is 'int8': expected 'bfloat16', 'float16' or 'float32'" in setting(ValueError, dtype="int8")
    assert "no adapter was given" in setting(ValueError, adapters=[])
    assert "no adapter 'nobody'" in setting(FileNotFoundError, adapters="nobody")
    assert "no model 'nobody'" in setting(FileNotFoundError, base="nobody")


def test_an_adapter_that_cannot_be_merged(tmp_path, m, setting):
    tensors = factors(m)
    for name in list(tensors):
        if "lora_B" in name:
            tensors[name.replace("lora_B.weight", "lora_B.bias")] = np.ones(len(tensors[name]))
    biased = write(tmp_path / "biased", m, tensors, lora_bias=True)
    text = setting(ValueError, adapters=biased)
    assert text.startswith("layers.0.attn.q: the adapter adds a bias to the output")


def test_numbers_that_float16_cannot_hold_name_the_weight(adapter, setting):
    text = setting(ValueError, adapters=f"{adapter}:1e8", dtype="float16")
    assert text.startswith("layers.0.attn.q: row 0, column 0 becomes ")
    assert "too large for float16" in text


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path, setting, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setattr(merged_checkpoint, "write_weights", lambda *_: pytest.fail("written"))
    text = setting(OSError)
    assert text.startswith("there is no room for ")
    assert f"the disk of {tmp_path} has 10,000 left" in text


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, setting):
    """A limit on the size of files takes the place of a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        text = setting(OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = os.strerror(errno.EFBIG).lower()
    assert text == f"cannot write {tmp_path / 'out'}: {reason}; nothing was written"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(setting, interruption):
    seen = []

    def stop(done, total):
        seen.append(done)
        if done > total / 2:
            raise interruption

    setting(interruption, progress=stop)
    assert len(seen) > 3


def test_a_place_taken_meanwhile_is_not_overwritten(tmp_path, m, adapter):
    base = write_model(tmp_path / "base", m, "BF16")
    out = tmp_path / "out"

    def take(done, total):
        out.mkdir(exist_ok=True)

    with pytest.raises(FileExistsError):
        merge_checkpoint(base, adapter, out, progress=take)
    assert list(out.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


# ---- transformers


@pytest.mark.peers
@pytest.mark.parametrize("head", ["none", "alike"])
@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_it(tmp_path, m, dtype, shard_bytes, head):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    base = write_model(tmp_path / "base", m, "BF16")
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"] + ["lm_head"] * (head == "alike")}
    adapter = write(tmp_path / "adapter", m, embed_factors(m, head=head), "float32", **options)
    merge_checkpoint(base, adapter, tmp_path / "out", dtype, shard_bytes)
    reloaded, about = transformers.GemmaForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reloaded.dtype == getattr(torch, dtype)
    assert reloaded.config.tie_word_embeddings is (head == "alike")
    loaded = reloaded.state_dict()
    for name, (form, data) in stored(tmp_path / "out").items():
        assert np.array_equal(wide(form, data), loaded[name].double().numpy())
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is (head == "alike")
