"""`refgemma vectors`: exact by another hand, bounds that an honest port keeps and a wrong one does not."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

import refgemma
from refgemma.checkpoint.folder import find_model
from refgemma.cli import main
from refgemma.config import SIZES
from refgemma.numerics import PROFILES, from_bfloat16, to_bfloat16
from refgemma.ops.attention import allowed_keys, attention_mix, attention_probs, attention_scores
from refgemma.ops.embedding import embed
from refgemma.ops.linear import linear
from refgemma.ops.mlp import gelu
from refgemma.ops.norm import rms_norm
from refgemma.ops.rope import rope, rope_table
from refgemma.oracle.test_vectors.write import write_vectors
from refgemma.text.tokenizer import Tokenizer
from tests import truth
from tests.models import hf_config, random_config

PROFILE = {"float32": "float32", "bfloat16": "bf16-transformers"}


class Folder:
    """What a reader of the files has."""

    def __init__(self, path):
        self.path = path
        self.index = json.loads((path / "operations.json").read_text(encoding="utf-8"))
        self.tensors = load_file(path / "operations.safetensors")
        self.operations = {entry["name"]: entry for entry in self.index["operations"]}
        self.config = self.index["config"]
        self.weights = {w["name"]: self.weight(w) for w in self.index["weights"]}

    def weight(self, entry):
        """By the formula in README.md, written from it."""
        n = np.arange(math.prod(entry["shape"]), dtype=np.uint64)
        x = (0x9E3779B9 * (entry["number"] + 1) + n) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        b = (x ^ (x >> 16)) >> 24
        w = ((2 * b.astype(np.float64) - 255) / 2.0 ** entry["exponent"]).reshape(entry["shape"])
        if "quiet_row" in entry:
            w[entry["quiet_row"]] /= 2.0 ** entry["quiet"]
        return w.astype(np.float32)

    def inputs(self, name):
        return [self.tensors[key] for key in self.operations[name]["inputs"]]

    def ratio(self, name, arithmetic, ours, kind="worst"):
        """Largest error over its bound."""
        entry = self.operations[name][arithmetic]
        return float(np.max(np.abs(ours - self.tensors[entry["exact"]]) / self.tensors[entry[kind]]))


def port(folder, name, numerics):
    """One operation, as a port computes it: `refgemma.ops` in some arithmetic, from the files alone."""
    c, w, given = folder.config, folder.weights, folder.inputs(name)
    N, K, H, B, T = c["num_heads"], c["num_kv_heads"], c["head_dim"], *given[0].shape[:2]
    positions = folder.tensors["in/positions"]

    def turned(x):
        return rope(x, *rope_table(positions, H, c["rope_theta"], numerics=numerics), numerics=numerics)

    def scores(q, k):
        return attention_scores(q, k.swapaxes(1, 2), scale=c["query_scale"], numerics=numerics)

    def probs(s):
        return attention_probs(s, allowed_keys(positions, positions), numerics=numerics)

    def mix(p, v):
        return attention_mix(p, v.swapaxes(1, 2), numerics=numerics)

    def gated(act, up):
        return numerics.round("mlp.gated", act * up)

    def project(x, weight):
        return linear(x.reshape(B, T, -1), w[weight], numerics=numerics)

    match name:
        case "embed":
            return embed(given[0], w["embed"], numerics=numerics)
        case "attn.norm" | "mlp.norm" | "final_norm":
            return rms_norm(given[0], w[name], eps=c["rms_norm_eps"], numerics=numerics)
        case "attn.q":
            return project(given[0], name).reshape(B, T, N, H)
        case "attn.k" | "attn.v":
            return project(given[0], name).reshape(B, T, K, H)
        case "attn.q_rope" | "attn.k_rope":
            return turned(given[0])
        case "attn.scores":
            return scores(*given)
        case "attn.probs":
            return probs(given[0])
        case "attn.mix":
            return mix(*given)
        case "attn.out" | "mlp.gate" | "mlp.up" | "mlp.down":
            return project(given[0], name)
        case "logits":
            return project(given[0], "embed")
        case "mlp.act":
            return gelu(given[0], numerics=numerics)
        case "mlp.gated":
            return gated(*given)
        case "attn.residual" | "out":
            return numerics.round(name, given[0] + given[1])
        case "attention":
            q, k, v, _ = given
            return mix(probs(scores(turned(q), turned(k))), v)
        case "mlp":
            up = project(given[0], "mlp.up")
            return project(gated(gelu(project(given[0], "mlp.gate"), numerics=numerics), up), "mlp.down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Vectors of the shipped model, by the command."""
    path = tmp_path_factory.mktemp("vectors") / "out"
    assert main(["vectors", str(path)]) == 0
    return Folder(path)


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """The same, and of models with K = 1, K = N, 1 < K < N."""
    made = [folder]
    for kind in range(3):
        config = random_config(np.random.default_rng([5, kind]), kind)
        path = tmp_path_factory.mktemp("vectors") / str(kind)
        write_vectors(path, config)
        made.append(Folder(path))
    return made


@pytest.mark.parametrize("arithmetic", PROFILE)
def test_a_port_keeps_every_bound(folders, arithmetic):
    """The suspicious one, too, which a millionth of honest tensors may leave."""
    for folder in folders:
        for name in folder.operations:
            ours = port(folder, name, PROFILES[PROFILE[arithmetic]])
            assert folder.ratio(name, arithmetic, ours, "likely") <= 1, name


def test_exact_means_exact(folders):
    """Against the truth by hand, whose float64 errs by 1e-15 of the size of what is summed, at most 1,000 terms."""
    for folder in folders:
        c, w = folder.config, {name: weight.astype(np.float64) for name, weight in folder.weights.items()}
        T = folder.tensors["in/tokens"].shape[1]
        wide = {key: value.astype(np.float64) for key, value in folder.tensors.items() if key.startswith("in/")}
        positions = folder.tensors["in/positions"][0]
        token = folder.tensors["in/tokens"][0]
        N, K = c["num_heads"], c["num_kv_heads"]
        want = {
            "embed": math.sqrt(c["hidden_size"]) * w["embed"][token],
            "attn.norm": truth.norm(wide["in/embed"][0], w["attn.norm"], c["rms_norm_eps"]),
            "mlp.act": truth.activation(wide["in/mlp.gate"][0]),
            "mlp.down": wide["in/mlp.gated"][0] @ w["mlp.down"].T,
            "logits": wide["in/final_norm"][0] @ w["embed"].T,
            "attn.q_rope": np.array(
                [truth.turn(wide["in/attn.q"][0, t], int(positions[t]), c["rope_theta"]) for t in range(T)]
            ),
            "attn.mix": np.array(
                [
                    [wide["in/attn.probs"][0, n, t] @ wide["in/attn.v"][0, :, n // (N // K)] for n in range(N)]
                    for t in range(T)
                ]
            ),
        }
        for name, value in want.items():
            exact = folder.tensors[folder.operations[name]["float32"]["exact"]][0]
            assert np.abs(exact - value).max() <= 1e-12 * np.abs(value).max(), name


def wrong_ports(folder):
    """Known bugs: operation, and what a port with the bug computes in float32."""
    c, w = folder.config, folder.weights
    D, N, K = c["hidden_size"], c["num_heads"], c["num_kv_heads"]
    x, q = folder.inputs("attn.norm")[0], folder.inputs("attn.q_rope")[0]
    positions = folder.tensors["in/positions"][0]
    eps, theta = c["rms_norm_eps"], c["rope_theta"]

    def turned(bugs=frozenset(), by=int):
        return np.array([[truth.turn(q[0, t], by(p), theta, bugs) for t, p in enumerate(positions)]])

    def normed(bug):
        return truth.norm(x[0], w["attn.norm"], eps, {bug})[None]

    yield "A1", "embed", w["embed"][folder.tensors["in/tokens"]]
    yield "A2", "embed", w["embed"][folder.tensors["in/tokens"]] * from_bfloat16(to_bfloat16(np.array([D**0.5])))[0]
    for bug in ("B1", "B2", "B9", "B9 1e-5"):
        yield bug, "attn.norm", normed(bug)
    for bug in ("C1", "C2"):
        yield bug, "mlp.act", truth.activation(folder.inputs("mlp.act")[0], {bug})
    gate, up = (folder.tensors[f"in/mlp.{part}"] for part in ("gate", "up"))
    yield "C3", "mlp.gated", truth.activation(up) * gate
    yield "D2", "attn.q_rope", turned(by=truth.bfloat16)
    yield "D7", "attn.q_rope", turned({"D7"})
    query, key = folder.inputs("attn.scores")
    yield "E2", "attn.scores", attention_scores(query, key.swapaxes(1, 2), scale=(D / N) ** -0.5)
    if 1 < K < N:
        tiled = np.concatenate([key] * (N // K), axis=2)
        yield "E6", "attn.scores", np.einsum("btnh,bsnh->bnts", query, tiled) * c["query_scale"]


def test_known_bugs_leave_the_bounds(folders):
    seen = set()
    for folder in folders:
        for bug, name, ours in wrong_ports(folder):
            assert folder.ratio(name, "float32", ours) > 10, (bug, name)
            seen.add(bug)
    assert seen == {"A1", "A2", "B1", "B2", "B9", "B9 1e-5", "C1", "C2", "C3", "D2", "D7", "E2", "E6"}


def test_the_two_files_hold_the_same(folder):
    listed = folder.index["tensors"]
    assert listed.keys() == folder.tensors.keys()
    for name, entry in listed.items():
        array = folder.tensors[name]
        assert (entry["dtype"], entry["shape"]) == (str(array.dtype), list(array.shape))
        if entry["values"] is not None:
            assert np.array_equal(np.array(entry["values"], array.dtype).reshape(array.shape), array), name
    outputs = [name for name in listed if name.startswith(("in/", "out/"))]
    assert all(listed[name]["values"] is not None for name in outputs)  # a small model's are all in JSON


def test_weights_follow_from_the_formula(folder):
    for entry in folder.index["weights"]:
        weight = folder.weights[entry["name"]]
        assert entry["first"] == weight.reshape(-1)[:4].tolist()
        assert entry["sum_of_squares"] == pytest.approx(np.sum(weight.astype(np.float64) ** 2), rel=1e-12)
        assert entry["stored"]
        assert np.array_equal(folder.tensors[f"weight/{entry['name']}"], weight)
        assert np.array_equal(from_bfloat16(to_bfloat16(weight)), weight)


def test_inputs_are_bfloat16_numbers(folder):
    for name, array in folder.tensors.items():
        if name.startswith("in/") and array.dtype == np.float32:
            assert np.array_equal(from_bfloat16(to_bfloat16(array)), array)
    assert folder.tensors["in/positions"].tolist() == [[0, 1, 257, 301]]


def test_sampler(folder):
    held = json.loads((folder.path / "sampler.json").read_text())
    logits = np.array(held["logits"])
    names = {stage["name"] for case in held["cases"] for stage in case["stages"]}
    assert names >= {"temperature", "top_k", "top_p", "min_p", "typical", "logit_bias", "banned", "repetition_penalty"}
    for case in held["cases"]:
        final = case["stages"][-1]["logits"] if case["stages"] else held["logits"]
        z = np.array([-np.inf if value is None else value for value in final])
        probs, worst = np.array(case["probs"]), np.array(case["probs_worst_float32"])
        assert case["kept"] == np.flatnonzero(probs).tolist()
        if case["settings"].get("temperature") == 0:
            assert {one["token"] for one in case["tokens"]} == {int(logits.argmax())}
            continue
        with np.errstate(over="ignore"):
            single = np.exp(z.astype(np.float32) - np.float32(z.max()))
        single = single / single.sum(dtype=np.float32)
        assert np.all(np.abs(single - probs) <= worst)
        softer = np.exp((z - z.max()) * 0.999)  # a temperature off by a thousandth is seen, where there is a choice
        assert len(case["kept"]) == 1 or np.any(np.abs(softer / softer.sum() - probs) > worst)
        running = np.cumsum(probs)
        for one in case["tokens"]:
            assert one["token"] == int(np.flatnonzero(running > one["u"] * running[-1])[0])
            assert one["margin"] > worst.sum()  # float32 decides alike
    assert {(one["seed"], one["t"]): round(one["u"], 8) for one in held["uniform"]}["7", 1] == 0.08284269


def test_chat_and_tokenizer(folder):
    spm = sentencepiece.SentencePieceProcessor(model_file=str(find_model("tiny-it") / "tokenizer.model"))
    held = json.loads((folder.path / "tokenizer.json").read_text(encoding="utf-8"))
    for case in held["cases"]:
        assert case["markers"] == spm.encode(case["text"])
        assert case["decoded"] == case["text"]
    assert any(case["none"] != case["markers"] for case in held["cases"])
    assert any(case["all"] != case["markers"] for case in held["cases"])
    chats = json.loads((folder.path / "chat.json").read_text(encoding="utf-8"))["cases"]
    first = chats[0]["default"]
    assert first["text"] == "<bos><start_of_turn>user\nWhat is 2 + 3?<end_of_turn>\n<start_of_turn>model\n"
    assert first["ids"] == [2, *spm.encode(first["text"].removeprefix("<bos>"))]
    assert chats[-1]["default"]["ids"] != chats[-1]["published"]["ids"]  # the one that tries to end its turn


def test_the_folder(folder, tmp_path, capsys):
    names = {path.name for path in folder.path.iterdir()}
    assert names == {
        "README.md", "chat.json", "operations.json", "operations.safetensors", "published.json", "sampler.json",
        "tokenizer.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in folder.path.iterdir()) < 4_000_000
    assert (folder.path / "README.md").read_text(encoding="utf-8").startswith("# Test vectors of tiny-it\n")
    capsys.readouterr()
    assert main(["vectors", str(folder.path)]) == 2  # there already
    assert "exists: expected the name of a folder to make" in capsys.readouterr().err
    again = tmp_path / "again"
    program = [sys.executable, "-m", "refgemma", "vectors", str(again)]
    subprocess.run(program, check=True, capture_output=True)
    for name in names:
        assert (again / name).read_bytes() == (folder.path / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing half-made


def test_other_ways_to_choose(tmp_path, capsys, small_tokenizer):
    config = random_config(np.random.default_rng(3), 1)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    code = main(["vectors", str(tmp_path / "a"), "--config", str(tmp_path / "config.json"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert "tokenizer.json" not in shown["files"]
    made = Folder(tmp_path / "a")
    assert made.config["hidden_size"] == config.hidden_size
    assert "ids" not in json.loads((tmp_path / "a" / "chat.json").read_text())["cases"][0]["default"]
    write_vectors(tmp_path / "b", config, Tokenizer(small_tokenizer.path))
    assert json.loads((tmp_path / "b" / "tokenizer.json").read_text())["vocab_size"] == 500
    assert main(["vectors", str(tmp_path / "c"), "--size", "gemma-2b", "--model", "tiny-it"]) == 2
    assert main(["vectors", str(tmp_path / "absent" / "c")]) == 2
    assert not (tmp_path / "c").exists()


def test_an_interruption_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "out", refgemma.load("tiny-it").config, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(tmp_path, size):
    """Memory of a layer, seconds; weights by the formula alone."""
    assert main(["vectors", str(tmp_path / "out"), "--size", size]) == 0
    folder = Folder(tmp_path / "out")
    assert sum(path.stat().st_size for path in folder.path.iterdir()) < 20_000_000
    for name in folder.operations:
        assert folder.ratio(name, "float32", port(folder, name, PROFILES["float32"]), "likely") <= 1, name
