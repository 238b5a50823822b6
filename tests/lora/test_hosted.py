"""The rules of the hosted models: each seen kept and seen broken, on files that nobody vouches for."""

import json
import os
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from refgemma.config import SIZES
from refgemma.lora.hosted import check_hosted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GEMMA_2B, GEMMA_7B = "@cf/google/gemma-2b-it-lora", "@cf/google/gemma-7b-it-lora"

# What PEFT writes for plain LoRA (the empty fields are a selection), and the one field that the guide asks to add.
PLAIN = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "google/gemma-2b-it",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "model_type": "gemma",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}


def factors(size="gemma-2b", rank=8, layers=(0, 17), names=("q_proj", "v_proj")):
    """Factors for the attention of a model."""
    c = SIZES[size]
    widths = {
        "q_proj": c.layers[0].num_heads * c.layers[0].head_dim,
        "k_proj": c.layers[0].num_kv_heads * c.layers[0].head_dim,
    }
    widths["v_proj"] = widths["k_proj"]
    tensors = {}
    for i in layers:
        for name in names:
            start = f"base_model.model.model.layers.{i}.self_attn.{name}.lora_"
            tensors[f"{start}A.weight"] = np.zeros((rank, c.hidden_size), np.float16)
            tensors[f"{start}B.weight"] = np.zeros((widths[name], rank), np.float16)
    return tensors


def write(folder, tensors=None, **fields):
    """An adapter folder; `fields` replace those of `PLAIN`, and None removes one."""
    config = {name: value for name, value in {**PLAIN, **fields}.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(factors() if tensors is None else tensors, folder / WEIGHTS)
    return folder


def verdict(report, rule):
    """What was said about one rule."""
    (found,) = [finding for finding in report.findings if finding.rule == rule]
    return found.verdict


def refusals(report):
    return {finding.rule for finding in report.findings if finding.verdict == "refused"}


def unknowns(report):
    return {finding.rule for finding in report.findings if finding.verdict == "unknown"}


@pytest.mark.parametrize("rule", ["page", "later"])
@pytest.mark.parametrize(("size", "model"), [("gemma-2b", GEMMA_2B), ("gemma-7b", GEMMA_7B)])
def test_a_plain_adapter_is_accepted(tmp_path, rule, size, model):
    report = check_hosted(write(tmp_path, factors(size), base_model_name_or_path=f"google/{size}-it"), rule)
    assert report.accepted
    assert report.verdict == "accepted"
    assert report.models == (model,)
    assert report.rule == rule
    assert {finding.verdict for finding in report.findings} == {"accepted"}
    assert {finding.rule for finding in report.findings} == {
        "file names", CONFIG, WEIGHTS, "size", "peft_type", "task_type", "model_type", "rank", "base model",
        "quantisation", "options", "factors", "shapes", "modules",
    }  # fmt: skip


def test_every_line_says_what_was_found_what_is_wanted_and_where_that_stands(tmp_path):
    for finding in check_hosted(write(tmp_path, use_dora=True)).findings:
        assert all([finding.rule, finding.found, finding.wanted, finding.source])


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": "Gemma"}, "model_type"),
        ({"task_type": None}, "task_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_qalora": True}, "quantisation"),
        ({"loftq_config": {"loftq_bits": 4}}, "quantisation"),
        ({"base_model_name_or_path": "unsloth/gemma-2b-it-bnb-4bit"}, "quantisation"),
    ],
)
def test_a_field_that_breaks_a_rule_is_refused(tmp_path, fields, rule):
    assert rule in refusals(check_hosted(write(tmp_path, **fields)))
    assert rule not in refusals(check_hosted(write(tmp_path)))


@pytest.mark.parametrize(("rule", "largest"), [("page", 8), ("later", 32)])
def test_the_largest_rank(tmp_path, rule, largest):
    assert check_hosted(write(tmp_path, factors(rank=largest), r=largest), rule).accepted
    assert refusals(check_hosted(write(tmp_path, factors(rank=largest + 1), r=largest + 1), rule)) == {"rank"}


def test_a_rank_in_the_pattern_counts(tmp_path):
    tensors = {**factors(names=["q_proj"]), **factors(names=["v_proj"], rank=9)}
    assert refusals(check_hosted(write(tmp_path, tensors, rank_pattern={"v_proj": 9}))) == {"rank"}
    tensors = {**factors(names=["q_proj"]), **factors(names=["v_proj"], rank=7)}
    report = check_hosted(write(tmp_path, tensors, rank_pattern={"v_proj": 7}))
    assert refusals(report) == set()
    assert unknowns(report) == {"rank_pattern"}  # that there is a pattern at all


def test_a_rank_that_only_the_factors_have_counts(tmp_path):
    report = check_hosted(write(tmp_path, factors(rank=16)))
    assert refusals(report) == {"rank", "factors"}


@pytest.mark.parametrize("r", ["8", 8.0, True, 0, -1, [8], {}, 10**400])
def test_a_rank_that_is_none_is_refused(tmp_path, r):
    assert "rank" in refusals(check_hosted(write(tmp_path, r=r)))


@pytest.mark.parametrize("pattern", [{"v_proj": "9"}, [9], "v_proj"])
def test_a_pattern_without_ranks_is_refused(tmp_path, pattern):
    assert "rank" in refusals(check_hosted(write(tmp_path, rank_pattern=pattern)))


@pytest.mark.parametrize(("rule", "megabytes"), [("page", 100), ("later", 300)])
def test_the_largest_size(tmp_path, rule, megabytes):
    write(tmp_path)

    def of_bytes(total):
        # One tensor as long as the rest of the file, which is a hole: nothing that large is ever written or read.
        n = total - 8 - 80
        header = json.dumps({"x": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}).ljust(80).encode()
        assert len(header) == 80
        (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(tmp_path / WEIGHTS, total)
        report = check_hosted(tmp_path, rule)
        assert verdict(report, WEIGHTS) == "accepted"  # the file as such is sound
        return verdict(report, "size")

    assert of_bytes(megabytes * 10**6 - 1) == "accepted"
    assert of_bytes(megabytes * 10**6) == "unknown"  # whether a MB is 10^6 bytes or 2^20
    assert of_bytes(megabytes * 2**20 - 1) == "unknown"
    assert of_bytes(megabytes * 2**20) == "refused"


@pytest.mark.parametrize(
    ("old", "new"),
    [(WEIGHTS, "adapter_model.bin"), (WEIGHTS, "Adapter_Model.safetensors"), (CONFIG, "config.json"), (CONFIG, None)],
)
def test_files_under_other_names_are_refused(tmp_path, old, new):
    write(tmp_path)
    if new:
        (tmp_path / old).rename(tmp_path / new)
    else:
        (tmp_path / old).unlink()
    report = check_hosted(tmp_path)
    assert {"file names", old} <= refusals(report)
    assert not report.accepted


def test_files_beside_the_two_do_not_matter(tmp_path):
    (write(tmp_path) / "README.md").write_text("a card, as PEFT writes it", encoding="utf-8")
    assert check_hosted(tmp_path).accepted


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("google/gemma-2b-it", "accepted"),
        ("gemma-2b-it", "accepted"),
        ("/models/gemma-2b-it/", "accepted"),
        ("google/gemma-7b-it", "unknown"),  # not the base that the shapes are of
        ("google/gemma-2b", "unknown"),
        ("google/gemma-1.1-2b-it", "unknown"),
        (None, "unknown"),
        (7, "unknown"),
    ],
)
def test_other_bases_are_unknown(tmp_path, base, expected):
    report = check_hosted(write(tmp_path, base_model_name_or_path=base))
    assert verdict(report, "base model") == expected
    assert refusals(report) == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True), ("use_rslora", True), ("bias", "all"), ("lora_bias", True),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]), ("trainable_token_indices", [5]),
        ("fan_in_fan_out", True), ("init_lora_weights", "pissa"), ("an_option_of_next_year", 1),
    ],
)  # fmt: skip
def test_what_the_guide_is_silent_about_is_unknown(tmp_path, name, value):
    report = check_hosted(write(tmp_path, **{name: value}))
    assert unknowns(report) == {name}
    assert refusals(report) == set()
    assert not report.accepted
    assert report.verdict == "unknown"


def test_modules_that_the_guide_does_not_show_are_unknown(tmp_path):
    assert unknowns(check_hosted(write(tmp_path, factors(names=["q_proj", "k_proj"])))) == {"modules"}


def test_tensors_and_formats_that_the_guide_does_not_mention_are_unknown(tmp_path):
    name = "base_model.model.model.norm.weight"
    assert unknowns(check_hosted(write(tmp_path, {**factors(), name: np.zeros(4, np.float16)}))) == {"other tensors"}
    wide = {name: tensor.astype(np.float64) for name, tensor in factors().items()}
    assert unknowns(check_hosted(write(tmp_path, wide))) == {"stored formats"}


def test_a_bias_of_a_factor_is_no_factor(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    report = check_hosted(write(tmp_path, {**factors(), name: np.zeros(2048, np.float16)}))
    assert unknowns(report) == {"other tensors"}
    assert refusals(report) == set()


def test_an_adapter_name_in_the_tensor_names_is_understood(tmp_path):
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors().items()}
    assert check_hosted(write(tmp_path, named)).accepted


@pytest.mark.parametrize(
    "tensors",
    [
        factors(layers=[18]),  # the smaller model has 18 layers, counted from 0
        {**factors(), **factors("gemma-7b", layers=[1])},
        {name: tensor[:, :-1] for name, tensor in factors().items()},
        {name.replace("self_attn", "attention"): tensor for name, tensor in factors().items()},
        {name.replace("layers.17", "layers.01"): tensor for name, tensor in factors().items()},
        {name: tensor.T.copy() for name, tensor in factors().items()},
    ],
    ids=["layer", "mixture", "width", "name", "number", "transposed"],
)
def test_shapes_of_neither_model_are_refused(tmp_path, tensors):
    report = check_hosted(write(tmp_path, tensors))
    assert "shapes" in refusals(report)
    assert report.models == ()


@pytest.mark.parametrize(
    ("module", "a", "b"),
    [
        ("layers.0.self_attn.q_proj", 3072, 4096),
        ("layers.0.self_attn.k_proj", 3072, 4096),
        ("layers.0.self_attn.v_proj", 3072, 4096),
        ("layers.0.self_attn.o_proj", 4096, 3072),
        ("layers.27.mlp.gate_proj", 3072, 24576),
        ("layers.27.mlp.up_proj", 3072, 24576),
        ("layers.27.mlp.down_proj", 24576, 3072),
    ],
)
def test_every_matrix_of_the_larger_model(tmp_path, module, a, b):
    start = f"base_model.model.model.{module}.lora_"
    tensors = {f"{start}A.weight": np.zeros((8, a), np.float16), f"{start}B.weight": np.zeros((b, 8), np.float16)}
    assert check_hosted(write(tmp_path, tensors)).models == (GEMMA_7B,)
    tensors[f"{start}magnitude_vector"] = np.zeros(b, np.float16)
    assert check_hosted(write(tmp_path, tensors)).models == (GEMMA_7B,)
    tensors[f"{start}magnitude_vector"] = np.zeros(b + 1, np.float16)
    assert check_hosted(write(tmp_path, tensors)).models == ()


def test_embedding_and_head(tmp_path):
    A, B = np.zeros((8, 256_000), np.float16), np.zeros((2048, 8), np.float16)
    table = {f"base_model.model.model.embed_tokens.lora_embedding_{k}": t for k, t in (("A", A), ("B", B))}
    assert check_hosted(write(tmp_path, table)).models == (GEMMA_2B,)
    head = {"base_model.model.lm_head.lora_A.weight": B.T.copy(), "base_model.model.lm_head.lora_B.weight": A.T.copy()}
    assert check_hosted(write(tmp_path, head)).models == (GEMMA_2B,)


@pytest.mark.parametrize("lost", ["A", "B"])
def test_a_factor_without_its_partner_is_refused(tmp_path, lost):
    tensors = {name: t for name, t in factors().items() if f"17.self_attn.v_proj.lora_{lost}" not in name}
    assert refusals(check_hosted(write(tmp_path, tensors))) == {"factors"}


def test_a_file_without_factors_is_refused(tmp_path):
    report = check_hosted(write(tmp_path, {"weight": np.zeros(3, np.float32)}))
    assert {"factors", "shapes"} <= refusals(report)


def header(fields, length=None, data=b""):
    """Bytes of a safetensors file with any header."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


BAD_WEIGHTS = {
    "empty": b"",
    "short": b"\x10\0\0",
    "header longer than the file": header({}, length=10**6),
    "header of a terabyte": header({}, length=10**12),
    "header of all bits": b"\xff" * 64,
    "long header": header(b"{" + b" " * 5_000_000 + b"}"),
    "deep header": header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "not JSON": header(b"{nonsense}"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "a list": header([1]),
    "lying offsets": header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]}}, data=b"\0" * 16),
    "offsets past the end": header({"x": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}}, data=b"\0" * 16),
    "negative offsets": header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}, data=b"\0" * 16),
    "huge shape": header({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
    "unknown dtype": header({"x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 1]}}, data=b"\0"),
    "a name of a megabyte": header({"x" * 10**6: {"dtype": "F32", "shape": [1], "data_offsets": [0, 1]}}, data=b"\0"),
    "trailing bytes": header({}, data=b"PK\x03\x04"),
    "a pickle": b"PK\x03\x04" + b"\0" * 60,
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}  # fmt: skip

BAD_CONFIGS = {
    "empty": b"",
    "not JSON": b"{r: 8}",
    "not UTF-8": b'{"r": "\xff"}',
    "a list": b"[]",
    "a number": b"8",
    "long": b"{" + b" " * 2_000_000 + b"}",
    "deep": b'{"r":' * 100_000 + b"8" + b"}" * 100_000,
    "a number of many digits": b'{"r": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(pytest.param(WEIGHTS, content, id=f"weights: {kind}") for kind, content in BAD_WEIGHTS.items()),
        *(pytest.param(CONFIG, content, id=f"config: {kind}") for kind, content in BAD_CONFIGS.items()),
    ],
)
def test_a_damaged_file_is_one_sentence_of_refusal(tmp_path, name, content):
    (write(tmp_path) / name).write_bytes(content)
    report = check_hosted(tmp_path)
    (finding,) = [finding for finding in report.findings if finding.rule == name]
    assert finding.verdict == "refused"
    assert 10 < len(finding.found) < 400
    assert finding.found.isprintable()
    assert str(tmp_path) not in finding.found
    assert not report.accepted


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_what_is_no_file_is_not_opened(tmp_path, name, kind):
    path = write(tmp_path) / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # to open it would be to wait for ever
    else:
        path.symlink_to(tmp_path / "gone")
    assert name in refusals(check_hosted(tmp_path))


def test_values_of_a_stranger_cannot_flood_or_steer_a_terminal(tmp_path):
    report = check_hosted(
        write(
            tmp_path,
            {**factors(), "\x1b[2J\n" + "y" * 10_000: np.zeros(1, np.float16)},
            model_type="\x1b[31m\ud800" + "x" * 100_000,
            base_model_name_or_path="\n" * 100_000,
            r={"a": list(range(10_000))},
            **{f"option_{i}": i + 1 for i in range(1000)},
            **{"\x1b]0;title\x07": 1},
        )
    )
    assert not report.accepted
    assert len(report.findings) < 50
    for finding in report.findings:
        for text in (finding.rule, finding.found, finding.wanted):
            assert text.isprintable()
            assert len(text) < 500


def test_any_bytes_give_a_report(tmp_path):
    """Cut, flip and insert at random: there is always a verdict, and never an exception."""
    write(tmp_path, factors(rank=1, layers=[0], names=["q_proj"]), r=1)
    sound = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    rng, verdicts = random.Random(5), set()
    for _ in range(200):
        name = rng.choice(list(sound))
        data = bytearray(sound[name])
        for _ in range(rng.choice([1, 1, 3])):
            i = rng.randrange(min(len(data), 600))  # the configuration, the header, and some numbers
            new = rng.choice([b"", b"9", b"-", b"[", b'"', b"null", bytes([rng.randrange(256)])])
            data[i : i + rng.choice([0, 1, 1, 4])] = new
        for each, content in {**sound, name: bytes(data)}.items():
            (tmp_path / each).write_bytes(content)
        verdicts.add(check_hosted(tmp_path).verdict)
    assert verdicts == {"accepted", "unknown", "refused"}


def test_a_folder_that_is_none_and_a_rule_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder: expected one that holds"):
        check_hosted(tmp_path / "none")
    with pytest.raises(ValueError, match="expected 'page' or 'later'"):
        check_hosted(write(tmp_path), "2023")
