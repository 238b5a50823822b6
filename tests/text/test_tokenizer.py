"""The three meanings of control text, decoding, and what a wrong file or argument says."""

import random

import numpy as np
import pytest
import sentencepiece

from refgemma.text.tokenizer import Tokenizer
from tests import vocabulary
from tests.conftest import SHARED
from tests.text.adversarial import random_text

# How the vectors name the ways to encode.
MODES = {
    "spm_plain": {"control": "markers"},
    "hf_encode_bos": {"control": "all", "bos": True},
    "hf_encode_nobos": {"control": "all"},
}

# Texts and ids of Gemma 1 and 2 as other projects print them.
PUBLISHED = [
    # huggingface/transformers, tests/models/gemma/test_tokenization_gemma.py
    ("This is a test", "all", [2, 1596, 603, 476, 2121]),
    ("Hi  Hello", "all", [2, 2151, 139, 4521]),
    (" Hello", "all", [2, 25957]),
    ("<s>", "all", [2, 204]),
    ("生活的真谛是", "all", [2, 122182, 235710, 245467, 235427]),
    ("\t\t\t\t \n\n61", "all", [2, 255971, 235248, 109, 235318, 235274]),
    (" " * 47, "markers", [168, 153]),
    # eliben/go-sentencepiece, processor_test.go
    ("12345", "markers", [235274, 235284, 235304, 235310, 235308]),
    (" <mask>  <pad>", "markers", [235248, 4, 139, 235322, 8939, 235313]),
    ("ҔӌԐڎ", "markers", [427, 365, 428, 357, 429, 361, 435, 359]),
    # keras-team/keras-hub, keras_hub/src/models/gemma/gemma_tokenizer_test.py
    ("The quick brown fox.", "markers", [651, 4320, 8426, 25341, 235265]),
]


def names_of(ids, tokenizer):
    """Control and marker names among `ids`."""
    special = {i: name for name, i in {**tokenizer.controls, **tokenizer.markers}.items()}
    return [special[i] for i in ids if i in special]


def gemma3_tokenizer():
    path = SHARED / "tokenizer/gemma3/tokenizer.model"
    if not path.exists():
        pytest.skip("needs ../shared/tokenizer/gemma3, which is not part of the project")
    return Tokenizer(path)


@pytest.mark.parametrize(("text", "control", "ids"), PUBLISHED)
def test_ids_printed_by_other_projects(gemma_tokenizer, text, control, ids):
    assert gemma_tokenizer.encode(text, bos=control == "all", control=control) == ids


def test_published_vectors(gemma_tokenizer, shared_json):
    tokenizers = {"gemma": gemma_tokenizer, "gemma3": gemma3_tokenizer()}
    # Hugging Face matches raw runs of U+2581 before it turns spaces into U+2581; that is not what Gemma was trained on.
    peculiar = [v for v in shared_json("tokenizer/vectors.json")["published"] if not v["pass"]]
    vectors = [v for v in shared_json("tokenizer/vectors.json")["published"] if v["pass"]]
    assert len(vectors) > 90
    assert [("\u2581" in v["text"], v["mode"]) for v in peculiar] == [(True, "hf_encode_bos")]
    wrong = [v for v in vectors if tokenizers[v["tokenizer"]].encode(v["text"], **MODES[v["mode"]]) != v["ids"]]
    assert wrong == []


def test_decode_vectors(gemma_tokenizer, shared_json):
    vectors = shared_json("tokenizer/vectors.json")["decode"]
    assert len(vectors) > 20
    assert [v for v in vectors if gemma_tokenizer.decode(v["ids"]) != v["text"]] == []


def test_computed_vectors(gemma_tokenizer, shared_json):
    vectors = shared_json("tokenizer/vectors.json")["computed"]
    assert len(vectors) > 300
    for name, tokenizer in (("gemma", gemma_tokenizer), ("gemma3", gemma3_tokenizer())):
        assert [v["text"] for v in vectors if tokenizer.encode(v["text"], control="markers") != v[name]] == []
    returns = [gemma_tokenizer.decode(v["gemma"]) == v["text"] for v in vectors]
    assert returns == [v["roundtrip_gemma"] for v in vectors]


def test_markers_are_found_by_their_rule(gemma_tokenizer):
    unused = {f"<unused{i}>" for i in range(100)}
    named = {"<mask>", "<2mass>", "[@BOS@]", "[toxicity=0]", "<start_of_turn>", "<end_of_turn>"}
    assert set(gemma_tokenizer.markers) == named | unused
    assert (gemma_tokenizer.start_of_turn_id, gemma_tokenizer.end_of_turn_id) == (106, 107)


def test_learnt_pieces_are_no_markers(small_tokenizer):
    assert set(small_tokenizer.markers) == {*vocabulary.MARKERS, "[toxicity=0]"}
    learnt = small_tokenizer.encode("[...]", control="markers")
    assert [small_tokenizer.piece(i) for i in learnt] == ["[...]"]  # bracketed, too, but from the sentences


def test_markers_of_gemma_3():
    tokenizer = gemma3_tokenizer()
    unused = {f"<unused{i}>" for i in range(6242)}
    images = {"<start_of_image>", "<end_of_image>"}
    assert set(tokenizer.markers) == {"<mask>", "[multimodal]", "<start_of_turn>", "<end_of_turn>"} | images | unused
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (105, 106)


def test_ids_by_name(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    ids = [*range(4), tokenizer.start_of_turn_id, tokenizer.end_of_turn_id]
    assert [tokenizer.piece(i) for i in ids] == names
    assert sorted(tokenizer.byte_values.values()) == list(range(256))
    assert all(tokenizer.piece(i) == f"<0x{value:02X}>" for i, value in tokenizer.byte_values.items())


@pytest.mark.parametrize(
    ("control", "found"),
    [
        ("none", []),
        ("markers", ["<start_of_turn>", "<mask>", "[@BOS@]", "<unused3>", "<end_of_turn>"]),
        (
            "all",
            ["<bos>", "<start_of_turn>", "<mask>", "<pad>", "[@BOS@]", "<unused3>", "<unk>", "<end_of_turn>", "<eos>"],
        ),
    ],
)
def test_what_each_control_mode_finds(tokenizer, control, found):
    text = "<bos><start_of_turn>user\n<mask>a<pad>[@BOS@]b <unused3><unk> <end_of_turn>\n<eos>"
    ids = tokenizer.encode(text, control=control)
    assert names_of(ids, tokenizer) == found
    if control != "all":
        assert tokenizer.decode(ids) == text


def test_none_is_the_default(tokenizer):
    text = "<start_of_turn>model"
    assert tokenizer.encode(text) == tokenizer.encode(text, control="none") != tokenizer.encode(text, control="markers")


def test_markers_is_plain_sentencepiece(tokenizer):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    rng = random.Random(3)
    texts = [random_text(rng, tokenizer) for _ in range(300)]
    assert [tokenizer.encode(text, control="markers") for text in texts] == [plain.encode(text) for text in texts]


def test_runs_and_tags_are_ordinary_text(tokenizer):
    for piece in ("\n\n\n", "    ", "\t\t", "<b>", "</b>", "<s>", "</s>"):
        ids = [tokenizer.encode(piece, control=control) for control in ("none", "markers", "all")]
        assert ids[0] == ids[1] == ids[2]
        assert len(ids[0]) == 1


def test_inert_markers_spell_their_name(gemma_tokenizer):
    # The ids of "Hi", "<", "end", "_", "of", "_", "turn", ">": the text is cut after "<", and nowhere else.
    assert gemma_tokenizer.encode("Hi<end_of_turn>") == [2151, 235322, 615, 235298, 559, 235298, 15508, 235313]
    assert gemma_tokenizer.encode("Hi<bos>") == gemma_tokenizer.encode("Hi<bos>", control="markers")


def test_bos_comes_once_and_first(tokenizer):
    bos, hello = tokenizer.bos_id, tokenizer.encode("Hello")
    for control in ("none", "markers", "all"):
        assert tokenizer.encode("Hello", bos=True, control=control) == [bos, *hello]
        assert tokenizer.encode("", bos=True, control=control) == [bos]
        assert tokenizer.encode("", control=control) == []
    assert tokenizer.encode("<bos>Hello", bos=True, control="all") == [bos, *hello]
    assert tokenizer.encode("<bos>Hello", control="all") == [bos, *hello]
    # As text it is no <bos> yet, so one is still added.
    assert tokenizer.encode("<bos>Hello", bos=True) == [bos, *tokenizer.encode("<bos>Hello")]
    assert tokenizer.encode("<bos>Hello", bos=True).count(bos) == 1


def test_no_text_becomes_a_control_token(tokenizer):
    rng = random.Random(7)
    texts = [random_text(rng, tokenizer) for _ in range(3000)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert names_of(ids, tokenizer) == [], text
        assert tokenizer.decode(ids) == text.replace("\u2581", " "), text
    # The texts are dangerous: plain SentencePiece finds a marker in many, and so does it after a filter that deletes
    # the markers it sees, because deleting the inner one joins the outer.
    assert sum(names_of(tokenizer.encode(text, control="markers"), tokenizer) != [] for text in texts) > 1000
    assert (
        sum(names_of(tokenizer.encode(deleted(text, tokenizer), control="markers"), tokenizer) != [] for text in texts)
        > 20
    )


def deleted(text, tokenizer):
    for marker in tokenizer.markers:
        text = text.replace(marker, "")
    return text


def test_nested_markers(tokenizer):
    for text in (
        "<start_<start_of_turn>of_turn>",
        "<<end_of_turn>end_of_turn>",
        "<start_of_turn<start_of_turn>>",
        "[[@BOS@]@BOS@]",
    ):
        assert names_of(tokenizer.encode(text), tokenizer) == []
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(names_of(tokenizer.encode(text, control="markers"), tokenizer)) == 1


def test_text_without_markers_is_the_same_in_all_modes(tokenizer):
    rng = random.Random(11)
    for _ in range(200):
        text = "".join(rng.choices(["<", ">", "[", "]", "Hello", " ", "\n", "<b>", "é", "🤗", "user", "3"], k=20))
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text, control="markers") == tokenizer.encode(text, control="all")


def test_only_the_named_markers_are_inert(tokenizer):
    ids = tokenizer.encode_inert("<mask><end_of_turn><unused0>", ["<end_of_turn>"])
    assert names_of(ids, tokenizer) == ["<mask>", "<unused0>"]


def test_decode_of_control_and_broken_bytes(tokenizer):
    byte = {value: i for i, value in tokenizer.byte_values.items()}
    hello = tokenizer.encode("Hello")
    assert tokenizer.decode([tokenizer.bos_id, *hello, tokenizer.eos_id, tokenizer.pad_id]) == "Hello"
    assert tokenizer.decode([tokenizer.unk_id, *hello]) == " \u2047 Hello"
    assert tokenizer.decode([tokenizer.start_of_turn_id, *hello]) == "<start_of_turn>Hello"
    assert tokenizer.decode([byte[0xE2], byte[0x82], byte[0xAC]]) == "€"
    assert tokenizer.decode([byte[0xE2], byte[0x82], *hello]) == "\ufffd\ufffdHello"
    assert tokenizer.decode([]) == ""


def test_decode_takes_numpy_integers_and_any_iterable(tokenizer):
    ids = tokenizer.encode("Hello world")
    for same in (np.array(ids), np.array(ids, dtype=np.uint32), [np.int64(i) for i in ids], tuple(ids), iter(ids)):
        assert tokenizer.decode(same) == "Hello world"


@pytest.mark.parametrize("ids", ["12", [1.0], ["1"], [None], 5, None, [[1, 2]], np.array([[1, 2]]), np.array([1.5])])
def test_decode_of_anything_but_a_flat_list_of_ids(small_tokenizer, ids):
    with pytest.raises(TypeError, match="expected a flat list of whole numbers"):
        small_tokenizer.decode(ids)


@pytest.mark.parametrize("token", [-1, 500, 2**40])
def test_ids_outside_the_vocabulary(small_tokenizer, token):
    message = f"^token id {token} is outside the vocabulary: expected 0 to 499$"
    with pytest.raises(ValueError, match=message):
        small_tokenizer.decode([4, token])
    with pytest.raises(ValueError, match=message):
        small_tokenizer.piece(token)


@pytest.mark.parametrize("control", ["none", "markers", "all"])
@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"]])
def test_text_must_be_str(small_tokenizer, text, control):
    with pytest.raises(TypeError, match=r"expected a str$"):
        small_tokenizer.encode(text, control=control)


@pytest.mark.parametrize("control", ["none", "markers", "all"])
def test_half_a_surrogate_pair(small_tokenizer, control):
    with pytest.raises(
        ValueError, match=r"^text holds half a surrogate pair, U\+D83E at index 2: expected whole characters$"
    ):
        small_tokenizer.encode("ab\ud83ec", control=control)


def test_unknown_control_mode(small_tokenizer):
    with pytest.raises(ValueError, match="expected 'none', 'markers' or 'all'"):
        small_tokenizer.encode("a", control="some")


def test_a_folder_stands_for_its_file(small_tokenizer):
    assert Tokenizer(small_tokenizer.path.parent).path == small_tokenizer.path
    assert Tokenizer(str(small_tokenizer.path)).vocab_size == small_tokenizer.vocab_size == 500


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model does not exist: a model folder holds"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("broken", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"hello there"])
def test_broken_file(tmp_path, small_tokenizer, broken):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(broken(small_tokenizer.path.read_bytes()))
    with pytest.raises(ValueError, match=r"is not a SentencePiece model \(.*\): expected a complete tokenizer.model$"):
        Tokenizer(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"user_defined_symbols": ["<mask>"]}, "has no <start_of_turn>, <end_of_turn>: expected"),
        ({"bos_piece": "<s>", "user_defined_symbols": [*vocabulary.MARKERS]}, "has no <bos>: expected"),
        ({"normalization_rule_name": "nfkc"}, "normalises text before splitting it"),
        ({"add_dummy_prefix": True}, "normalises text before splitting it"),
        ({"remove_extra_whitespaces": True}, "normalises text before splitting it"),
        ({"byte_fallback": False, "vocab_size": 300}, "has 0 byte pieces: expected 256"),
    ],
)
def test_a_vocabulary_with_other_conventions(tmp_path, overrides, message):
    # With NFKC, for one, a full-width "＜mask＞" would become a marker after we looked for it.
    with pytest.raises(ValueError, match=message):
        Tokenizer(vocabulary.train(tmp_path / "tokenizer.model", **overrides))
