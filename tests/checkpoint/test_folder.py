import json
import mmap
import shutil

import pytest

from refgemma.checkpoint.folder import read_folder
from tests.checkpoint.files import base_of, one_sentence, safetensors_bytes, stored_as, write_model, write_shards
from tests.models import hf_tensors, random_model

MODEL = random_model(1, num_layers=11)
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "sharded", MODEL, "BF16")


def edit_index(folder, edit):
    """Let `edit` change the weight map."""
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_describe_lists_every_tensor_in_the_order_of_layers_without_reading(tmp_path):
    folder = write_model(tmp_path, MODEL, "BF16")
    tensors = list(read_folder(folder).values())
    assert [tensor.name for tensor in tensors[-3:]] == [
        "model.layers.10.self_attn.q_proj.weight",
        "model.layers.10.self_attn.v_proj.weight",
        "model.norm.weight",
    ]
    expected = hf_tensors(MODEL.params)
    assert {tensor.name: tensor.shape for tensor in tensors} == {name: array.shape for name, array in expected.items()}
    assert {tensor.dtype for tensor in tensors} == {"BF16"}
    assert sum(tensor.nbytes for tensor in tensors) == 2 * MODEL.config.num_parameters
    assert {tensor.file for tensor in tensors} == {folder / "model.safetensors"}
    assert all(isinstance(base_of(tensor.data), mmap.mmap) for tensor in tensors)


def test_shards_hold_what_one_file_holds(tmp_path, shards):
    single = read_folder(write_model(tmp_path / "single", MODEL, "BF16"))
    sharded = read_folder(shards)
    assert list(sharded) == list(single)
    assert all(sharded[name].data.tobytes() == single[name].data.tobytes() for name in single)
    assert {tensor.file.name for tensor in sharded.values()} == set(SHARDS)


def test_missing_shards_are_all_named(shards):
    (shards / SHARDS[0]).unlink()
    (shards / SHARDS[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {SHARDS[0]}, {SHARDS[2]}") as error:
        read_folder(shards)
    one_sentence(error)


def test_a_damaged_shard_is_named(shards):
    content = (shards / SHARDS[1]).read_bytes()
    (shards / SHARDS[1]).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is cut off"):
        read_folder(shards)


def test_an_index_that_places_a_tensor_wrongly_is_refused(shards):
    def edit(weight_map):
        del weight_map["model.norm.weight"]
        weight_map["model.embed_tokens.weight"] = SHARDS[2]
        weight_map["model.layers.99.mlp.up_proj.weight"] = SHARDS[2]

    edit_index(shards, edit)
    with pytest.raises(ValueError, match="does not fit its shards") as error:
        read_folder(shards)
    text = one_sentence(error)
    assert f"it places 'model.norm.weight' in no shard, found in {SHARDS[1]}" in text
    assert f"it places 'model.embed_tokens.weight' in {SHARDS[2]}, found in {SHARDS[0]}" in text
    assert f"it places 'model.layers.99.mlp.up_proj.weight' in {SHARDS[2]}, found in no shard" in text


def test_a_tensor_in_two_shards_is_refused(shards):
    norm = {"model.norm.weight": stored_as(hf_tensors(MODEL.params), "BF16")["model.norm.weight"]}
    (shards / "again.safetensors").write_bytes(safetensors_bytes(norm))
    edit_index(shards, lambda weight_map: weight_map.update({"x": "again.safetensors"}))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' twice, in again\.safetensors and in") as error:
        read_folder(shards)
    one_sentence(error)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3, None, ""])
def test_an_index_cannot_name_a_file_elsewhere(shards, shard):
    edit_index(shards, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(ValueError, match="expected a safetensors file in the same folder") as error:
        read_folder(shards)
    one_sentence(error)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": [["a", "b"]]}',
        "\xff",
        '{"weight_map": ' + "[" * 100_000,
    ],
)
def test_a_damaged_index_is_refused(shards, text):
    (shards / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"index\.json is damaged") as error:
        read_folder(shards)
    one_sentence(error)


def test_an_empty_index_is_refused(shards):
    (shards / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="names no shard"):
        read_folder(shards)


def test_two_models_in_one_folder_are_not_chosen_from(shards):
    write_model(shards, MODEL)
    with pytest.raises(ValueError, match="holds two models") as error:
        read_folder(shards)
    one_sentence(error)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([], "fetch the weights"),
        (["pytorch_model.bin", "config.json"], r"pytorch_model\.bin is pickled and never opened"),
        (["model.ckpt"], "pickled"),
        (["gemma-2b.gguf"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
        (["model-00001-of-00002.safetensors"], "only the index is missing"),
        (["gemma-2b-it.safetensors", "gemma-2b.gguf"], r"rename it to model\.safetensors"),
    ],
)
def test_a_folder_in_another_layout_is_told_what_it_is(tmp_path, found, sentence):
    for name in found:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=sentence) as error:
        read_folder(tmp_path)
    assert "holds neither model.safetensors nor model.safetensors.index.json" in one_sentence(error)


def test_a_link_to_a_deleted_file_is_told_from_a_missing_one(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs")  # as a pruned hub cache leaves it
    with pytest.raises(FileNotFoundError, match="a link to a file that is gone"):
        read_folder(tmp_path)


def test_a_folder_that_is_none_is_one_sentence(tmp_path):
    for path in (tmp_path / "absent", write_model(tmp_path, MODEL) / "config.json"):
        with pytest.raises(FileNotFoundError, match="is not a folder") as error:
            read_folder(path)
        one_sentence(error)


def test_an_index_to_a_single_file_is_fine(tmp_path):
    folder = write_model(tmp_path, MODEL)
    index = {"weight_map": dict.fromkeys(hf_tensors(MODEL.params), "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    assert len(read_folder(folder)) == len(index["weight_map"])
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")  # what the index does not name is not read
    assert len(read_folder(folder)) == len(index["weight_map"])
