"""`refgemma generate` says what the library says, wherever its answer goes."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

import refgemma
from refgemma.errors import InputError
from refgemma.sampling import SamplingParams

# Hot enough that the random model leaves its favourite token, so that settings and seeds matter.
HOT = ("--temperature", "3", "--seed", "7", "--max-tokens", "12")
HOT_SETTINGS = {"temperature": 3.0, "seed": 7, "max_tokens": 12}


def test_the_answer_is_the_library_s_and_ends_with_a_newline(run, gemma):
    want = gemma.generate("hello world", **HOT_SETTINGS).text
    assert len(set(want)) > 3
    assert run("generate", "hello world", *HOT) == (0, want + "\n", "")
    assert run("generate", "hello world", *HOT, "--seed", "8")[1] != want + "\n"


def test_an_answer_that_ends_with_a_newline_gets_no_second_one(run, gemma):
    settings = {"temperature": 0.0, "max_tokens": 2}
    assert gemma.generate("hello", raw=True, **settings).text == "hellohello"  # its habit: it repeats the last token
    assert run("generate", "\n", "--raw", "--temperature", "0", "--max-tokens", "2")[1] == "\n\n"


def test_json_is_the_whole_result(run, gemma, folder):
    want = gemma.generate("hello world", **HOT_SETTINGS)
    code, out, err = run("generate", "hello world", "--json", *HOT)
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "text": want.text,
        "tokens": want.tokens,
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": want.usage.prompt_tokens,
            "completion_tokens": 12,
            "total_tokens": want.usage.prompt_tokens + 12,
        },
        "seed": 7,
        "model": str(folder),
    }


def test_a_drawn_seed_is_told_and_gives_the_same_answer_again(run):
    code, out, err = run("generate", "hello", "--verbose", "--temperature", "3", "--max-tokens", "12")
    assert code == 0
    assert run("generate", "hello", "--seed", err.split()[-1], "--temperature", "3", "--max-tokens", "12")[1] == out


def test_verbose_tells_the_time_to_the_first_token_and_the_rate(run, gemma):
    err = run("generate", "hello", "--verbose", "--temperature", "0", "--max-tokens", "12")[2]
    prompt = len(gemma.encode_prompt("hello"))
    said = rf"prompt: {prompt} tokens, first token after \d+\.\d\d s; answer: 12 tokens, [\d.]+ tokens/s; end: length;"
    assert re.match(said, err)


def test_every_setting_reaches_the_sampler(run, asked):
    settings = {
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "frequency_penalty": -0.25,
        "presence_penalty": 0.5,
        "penalty_window": 64,
        "min_p": 0.05,
        "typical_p": 0.95,
        "seed": 11,
        "max_tokens": 3,
    }
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--logit-bias", "5:-2.5", "--logit-bias", "7:1e3", "--banned", "3,4"]
    settings |= {"stop": ("END", "\n\n"), "logit_bias": [(5, -2.5), (7, 1000.0)], "banned": (3, 4)}
    assert settings.keys() == {field.name for field in fields(SamplingParams)}
    assert all(value != getattr(SamplingParams, name) for name, value in settings.items())
    run("generate", "hello", *options, "--stop", "END", "--stop", "\n\n")
    assert {name: asked[0][1][name] for name in settings} == settings


def test_settings_not_given_are_the_library_s_defaults(run, asked):
    run("generate", "hello")
    assert SamplingParams(**{f.name: asked[0][1][f.name] for f in fields(SamplingParams)}) == SamplingParams()


def test_a_prompt_comes_from_the_arguments_standard_input_or_a_file(run, asked, type_in, tmp_path):
    run("generate", "an argument", "--max-tokens", "1")
    type_in("from \u00e9lsewhere\n".encode())
    run("generate", "-", "--raw", "--max-tokens", "1")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "h\u00e9llo"}]
    (tmp_path / "m.json").write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")
    run("generate", "--messages", str(tmp_path / "m.json"), "--max-tokens", "1")
    assert [prompt for prompt, _ in asked] == ["an argument", "from \u00e9lsewhere\n", messages]
    assert [options["raw"] for _, options in asked] == [False, True, False]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_output_goes_to_a_file_and_not_to_the_screen(run, tmp_path, form):
    printed = run("generate", "hello", *HOT, *form)[1]
    path = tmp_path / "answer"
    path.write_text("old")
    assert run("generate", "hello", *HOT, *form, "--output", str(path)) == (0, "", "")
    assert path.read_text(encoding="utf-8") == printed
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [InputError("a reason"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_an_old_file_as_it_was(run, tmp_path, monkeypatch, error):
    def fail(self, prompt, **options):
        yield refgemma.Event(text="half", token=0, row=0, decision=None)
        raise error

    monkeypatch.setattr(refgemma.Gemma, "stream", fail)
    path = tmp_path / "answer"
    path.write_text("old")
    code, out, _ = run("generate", "hello", "--output", str(path))
    assert (code, out) == ({KeyboardInterrupt: 130, InputError: 2, RuntimeError: 70}[type(error)], "")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("refgemma.cli.options.load", lambda *_, **__: pytest.fail("loaded"))
    for path in (tmp_path / "no folder" / "file", tmp_path):
        code, out, err = run("generate", "hello", "--output", str(path))
        assert (code, out) == (2, "")
        assert err.startswith(f"refgemma: cannot write {path}: ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anything")
def test_a_write_protected_file_is_not_replaced(run, tmp_path):
    path = tmp_path / "answer"
    path.write_text("old")
    path.chmod(0o400)
    assert run("generate", "hello", "--output", str(path))[0] == 2
    assert path.read_text() == "old"


def test_a_link_stays_a_link_and_a_device_a_device(run, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    assert run("generate", "hello", *HOT, "--output", str(link))[0] == 0
    assert link.is_symlink()
    assert real.is_file()
    assert run("generate", "hello", *HOT, "--output", os.devnull)[0] == 0
    assert not Path(os.devnull).is_file()


def test_the_record_goes_to_a_file_a_page_and_a_picture(run, gemma, tmp_path):
    pytest.importorskip("matplotlib")
    endings = {"record": "jsonl", "page": "html", "picture": "svg"}
    paths = {name: tmp_path / f"run.{ending}" for name, ending in endings.items()}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    code, out, err = run("generate", "hello world", *HOT, *options)
    assert (code, out, err) == run("generate", "hello world", *HOT)
    record = refgemma.sampling.read_record(paths["record"])
    assert list(record.tokens) == gemma.generate("hello world", **HOT_SETTINGS).tokens
    assert record.piece(record.tokens[0]) == gemma.tokenizer.piece(record.tokens[0])
    assert paths["page"].read_text().startswith("<!doctype html>")
    assert paths["picture"].read_text().startswith("<?xml")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.jsonl", "run.logits.safetensors", "run.html", "run.svg"}


@pytest.mark.parametrize(
    ("arguments", "pair"),
    [
        (["--output", "m.json"], "--output and --messages"),
        (["--record", "m.json"], "--record and --messages"),
        (["--output", "a", "--page", "a"], "--page and --output"),
    ],
)
def test_no_file_is_written_over_another(run, tmp_path, monkeypatch, arguments, pair):
    monkeypatch.setattr("refgemma.cli.options.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    talk = '[{"role": "user", "content": "Hi"}]'
    Path("m.json").write_text(talk)
    code, out, err = run("generate", "--messages", "m.json", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"refgemma: {pair} are the same file, ")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.json", talk)]


def test_nothing_is_recorded_unless_asked(run, asked):
    run("generate", "hello", "--max-tokens", "1")
    assert not asked[0][1]["record"]


@pytest.mark.parametrize("option", ["--record", "--page", "--picture"])
def test_places_of_the_record_are_tried_before_the_model_is_loaded(run, tmp_path, monkeypatch, option):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("refgemma.cli.options.load", lambda *_, **__: pytest.fail("loaded"))
    code, out, err = run("generate", "hello", option, str(tmp_path / "no folder" / "run.png"))
    assert (code, out) == (2, "")
    assert err.startswith(f"refgemma: cannot write {tmp_path}")
    assert list(tmp_path.iterdir()) == []
