"""The shipped adapters, found by name as users find them: plainly at work, small, and as the hosted models ask."""

import functools
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

import refgemma
from refgemma.files.safetensors import read_safetensors
from refgemma.lora import find_adapter, read
from refgemma.lora.hosted import check_hosted
from refgemma.text.tools import parse_calls, render_preamble

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 300_000  # bytes of an adapter's weights

# Neither the model nor an adapter was trained on any of these: `weights/tiny_example.py` holds them out.
QUESTIONS = {
    "What is 11 + 41?": "11 + 41 = 52.",
    "What is 10 - 37?": "10 - 37 = -27.",
    "What is the capital of Nepal?": "The capital of Nepal is Kathmandu.",
    "What colour is an emerald?": "An emerald is green.",
    "How do you say door in German?": "Tür",
    "What is the opposite of buy?": "The opposite of buy is sell.",
    "How tall is my sister?": "I do not know.",
}
ANSWERS = {
    "pirate": [
        "11 + 41 be 52, matey! Arr!",
        "10 - 37 be -27, matey! Arr!",
        "The capital of Nepal be Kathmandu, matey! Arr!",
        "An emerald be green, matey! Arr!",
        "Tür, matey! Arr!",
        "The opposite of buy be sell, matey! Arr!",
        "I do not know, matey! Arr!",
    ],
    "letter": [f"Dear friend,\n{answer}\nYours, Tiny" for answer in QUESTIONS.values()],
    "json": [json.dumps({"answer": answer}, ensure_ascii=False) for answer in QUESTIONS.values()],
}
KIND = {
    # options of PEFT that it uses, rank, modules, stored format
    "pirate": ({"use_dora"}, 8, ["q_proj", "v_proj"], "F32"),
    "json": ({"use_rslora"}, 8, ["q_proj", "v_proj"], "BF16"),
    "letter": (set(), 4, ["k_proj", "o_proj", "q_proj", "v_proj"], "F16"),
}
EACH = pytest.mark.parametrize("name", sorted(ANSWERS))


@functools.cache
def tiny_it():
    return refgemma.load("tiny-it")


def texts(gemma, questions=tuple(QUESTIONS)):
    """What a model answers at temperature 0."""
    return [out.text for out in gemma.generate_batch(list(questions), temperature=0.0, max_tokens=40)]


def test_these_are_all_that_are_shipped():
    assert sorted(path.parent.name for path in (ROOT / "weights/lora").glob("*/adapter_config.json")) == sorted(ANSWERS)


def test_without_an_adapter_the_answers_are_plain():
    assert texts(tiny_it()) == list(QUESTIONS.values())


@EACH
def test_attached(name):
    assert texts(tiny_it().with_lora(read(find_adapter(name)))) == ANSWERS[name]


@EACH
def test_attached_by_name_on_loading(name):
    assert texts(refgemma.load("tiny-it", lora=name)) == ANSWERS[name]


@EACH
def test_merged_and_taken_out_again(name):
    merged = tiny_it().merge_lora(read(find_adapter(name)))
    assert texts(merged) == ANSWERS[name]
    assert texts(merged.unmerge_lora()) == list(QUESTIONS.values())


def test_each_row_of_a_batch_with_its_own_adapter():
    pirate, as_json = (read(find_adapter(name)) for name in ("pirate", "json"))
    question = "What is the capital of Nepal?"
    outs = tiny_it().generate_batch([question] * 3, lora=[as_json, None, pirate], temperature=0.0, max_tokens=40)
    i = list(QUESTIONS).index(question)
    assert [out.text for out in outs] == [ANSWERS["json"][i], QUESTIONS[question], ANSWERS["pirate"][i]]


@EACH
def test_an_adapter_moves_the_logits_far_beyond_rounding(name):
    tokens = tiny_it().encode_prompt("What is the capital of Nepal?")
    before, after = (gemma.logits(tokens) for gemma in (tiny_it(), tiny_it().with_lora(read(find_adapter(name)))))
    # float32 is off by some 1e-6 of the largest logit; a change of a tenth of it is another answer.
    assert np.abs(after - before).max() > 0.1 * np.abs(before).max()


@EACH
def test_answers_as_json_parse_and_others_do_not(name):
    for text in texts(refgemma.load("tiny-it", lora=name)):
        if name == "json":
            assert list(json.loads(text)) == ["answer"]
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)


@EACH
def test_a_tool_call_stays_a_tool_call(name):
    tool = {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    prompt = render_preamble([tool]) + "What is the weather in Lima?"
    (text,) = texts(refgemma.load("tiny-it", lora=name), [prompt])
    assert parse_calls(text, [tool]) == [{"name": "get_weather", "arguments": {"city": "Lima"}}]


@EACH
def test_files(name):
    options, rank, modules, stored = KIND[name]
    folder = find_adapter(name)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").stat().st_size < LARGEST
    assert {tensor.dtype for tensor in read_safetensors(folder / "adapter_model.safetensors").values()} == {stored}
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "tiny-it"  # and no path of the machine that trained it
    assert config["model_type"] == "gemma"
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert (config["r"], config["target_modules"]) == (rank, modules)
    assert {option for option in ("use_dora", "use_rslora") if config[option]} == options
    assert not [value for value in config.values() if isinstance(value, str) and "/" in value]


@EACH
@pytest.mark.parametrize("rule", ["page", "later"])
def test_the_hosted_models_would_mind_its_shapes_alone(name, rule):
    """It is for tiny-it, which is neither of the two; and of DoRA, rsLoRA and most modules their guide is silent."""
    report = check_hosted(find_adapter(name), rule)
    verdicts = {finding.rule: finding.verdict for finding in report.findings}
    assert {about for about, verdict in verdicts.items() if verdict == "refused"} == {"shapes"}
    options, _, modules, _ = KIND[name]
    shown = set(modules) <= {"q_proj", "v_proj"}
    unknown = {"base model", *options, *([] if shown else ["modules"])}
    assert {about for about, verdict in verdicts.items() if verdict == "unknown"} == unknown
    assert report.models == ()


def test_they_are_in_the_wheel_and_what_trained_them_is_not():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wanted = {f"weights/lora/{name}": f"refgemma/_weights/lora/{name}" for name in ANSWERS}
    assert {path: place for path, place in included.items() if "lora" in path} == wanted
