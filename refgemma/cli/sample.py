"""Choose tokens from logits of any model, or choose again what a record holds, and see why.

LOGITS are (V,), or (T, V) for T tokens in a row: .npy, .npz, .safetensors or .json. No model is loaded.

examples:
  refgemma sample logits.npy --top-p 0.9 --seed 7
  refgemma sample logits.npy --tokenizer tokenizer.model --why-not 0:2134
  refgemma sample logits.npy --temperature 2 --top-p 0.6 --compare transformers,llama.cpp
  refgemma generate "Tell me a story." --seed 7 --record run.jsonl
  refgemma sample --replay run.jsonl --temperature 0.8
  refgemma sample --replay run.jsonl --explain 12 --page run.html
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from refgemma.cli.options import (
    add_json,
    add_outputs,
    add_sampling,
    outputs,
    sampling_settings,
    text_argument,
    token_ids,
)
from refgemma.cli.terminal import print_json, progress_bar, show
from refgemma.errors import InputError
from refgemma.sampling import Record, Replay, SamplingParams, read_record, record_logits, uniform
from refgemma.sampling import show as draw
from refgemma.sampling.comparison import compare
from refgemma.sampling.logits_file import read_logits
from refgemma.sampling.record import no_piece
from refgemma.sampling.show.table import settings, texts
from refgemma.text.token_texts import read_pieces

_LISTED = 100  # kept tokens of each engine in JSON


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("logits", nargs="?", metavar="LOGITS", help="file of logits, (V,) or (T, V)")
    parser.add_argument("--replay", metavar="FILE.jsonl", help="a record, in place of LOGITS")
    parser.add_argument("--tensor", metavar="NAME", help="which array of LOGITS (default: the only one, or logits)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="texts of tokens: any SentencePiece model, tokenizer.json, a JSON list"
    )
    parser.add_argument(
        "--prompt-tokens", type=token_ids, default=(), metavar="IDS", help="the prompt, for the repetition penalty"
    )
    parser.add_argument("--tokens", type=token_ids, metavar="IDS", help="what another engine chose, one token per row")
    parser.add_argument("--uniforms", type=_numbers, metavar="U,U", help="uniform numbers of the draws, one per row")
    ask = parser.add_argument_group("questions")
    ask.add_argument(
        "--explain",
        type=int,
        metavar="T",
        help="how token T was chosen, counted from 0; also what --picture shows",
    )
    ask.add_argument(
        "--why-not", type=text_argument, metavar="T:TOKEN", help="why token T is not TOKEN, an id or a text"
    )
    ask.add_argument(
        "--compare",
        metavar="A,B",
        help="engines to compare at token T of --explain (default: 0), such as transformers,llama.cpp",
    )
    ask.add_argument(
        "--logits-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="format in which the engines of --compare have the logits (default: float16 for float16, else float32)",
    )
    add_json(parser)
    add_outputs(parser)
    add_sampling(parser, generates=False)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    changes = sampling_settings(args)
    _check(args)
    with outputs(args) as save:
        record, outcome = _read(args, changes)
        at = _checked_index(record, args.explain, "--explain") if args.explain is not None else None
        answers = _answers(args, record, at)
        save(record, args.logits or args.replay, at)
    if args.json:
        print_json(_report(record, outcome, answers))
    else:
        _print(record, outcome, answers, at)
    return 1 if outcome is not None and outcome.first_difference is not None and not changes else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other."""
    if (args.logits is None) == (args.replay is None):
        given = "no logits were given" if args.logits is None else "LOGITS and --replay were both given"
        raise InputError(f"{given}: expected a file of logits, or --replay FILE.jsonl")
    for name in ("tensor", "prompt_tokens", "tokens", "uniforms"):
        if args.replay is not None and getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} and --replay were both given: the record has its own; leave out {option}")
    if args.logits_dtype is not None and args.compare is None:
        raise InputError("--logits-dtype was given without --compare: only other engines round as the logits do")
    if args.uniforms is not None and hasattr(args, "seed"):
        raise InputError("--uniforms and --seed were both given: a seed decides the uniform numbers; leave out one")


def _read(args: argparse.Namespace, changes: dict[str, Any]) -> tuple[Record, Replay | None]:
    """The record to show: new, as read, or as read under other settings; and the outcome of a replay."""
    if args.replay is not None:
        with progress_bar(f"reading {args.replay}"):
            record = read_record(args.replay)
        if args.tokenizer:
            record = replace(record, piece=_piece(args.tokenizer, record.vocab_size))
        with progress_bar("deciding again"):
            outcome = record.replay(**changes)
        return _changed(record, outcome, changes), outcome
    with progress_bar(f"reading {args.logits}"):
        logits = read_logits(args.logits, args.tensor)
    piece = _piece(args.tokenizer, logits.shape[1]) if args.tokenizer else no_piece
    params = SamplingParams(**changes)
    options: dict[str, Any] = {"prompt_tokens": args.prompt_tokens, "uniforms": args.uniforms, "tokens": args.tokens}
    return record_logits(logits, params, piece=piece, **options), None


def _changed(record: Record, outcome: Replay, changes: dict[str, Any]) -> Record:
    """The same tokens under the changed settings."""
    if not changes:
        return record
    seed = changes.get("seed")
    uniforms = record.uniforms if seed is None else tuple(uniform(seed, t) for t in range(len(record)))
    return replace(record, params=outcome.params, uniforms=uniforms)


def _piece(path: str, V: int) -> Callable[[int], str]:
    pieces = read_pieces(path)
    if len(pieces) > V:
        raise InputError(
            f"{path} has {len(pieces)} tokens, the logits have {V} entries: these files do not belong together"
        )
    return lambda token: pieces[token] if token < len(pieces) else ""


def _answers(args: argparse.Namespace, record: Record, at: int | None) -> dict[str, Any]:
    """Answers to the questions, by option."""
    answers: dict[str, Any] = {}
    if at is not None:
        answers["explain"] = record.explain(at)
    if args.why_not is not None:
        place, found, token = args.why_not.partition(":")
        if not found or not place.isdecimal():
            raise InputError(f"--why-not is {args.why_not!r}: expected T:TOKEN, such as 0:2134")
        t = _checked_index(record, int(place), "--why-not")
        answers["why_not"] = record.why_not(t, _token(record, token))
    if args.compare is not None:
        t = at or 0
        engines = [name.strip() for name in args.compare.split(",")]
        answers["compare"] = compare(
            record.logits[t],
            record.params,
            engines,
            record.prompt_tokens,
            record.tokens[:t],
            logits_dtype=args.logits_dtype,
        )
    return answers


def _checked_index(record: Record, t: int, option: str) -> int:
    if not 0 <= t < len(record):
        raise InputError(f"{option} asks for token {t}: expected 0 to {len(record) - 1}")
    return t


def _token(record: Record, name: str) -> int:
    """Id of a token, from the id or the text."""
    if name.isdecimal():
        return int(name)
    piece = name.replace(" ", "\u2581")
    found = [token for token in range(record.vocab_size) if record.piece(token) in {piece, name} and name]
    if not found:
        raise InputError(f"--why-not: no token is known by the text {name!r}: give its id, or --tokenizer FILE")
    return found[0]


def _print(record: Record, outcome: Replay | None, answers: dict[str, Any], at: int | None) -> None:
    """For people: the answers, or else an overview."""
    show(settings(record), style="dim")
    if outcome is not None:
        show(outcome.reason)
        at = outcome.first_difference if at is None else at
    if "explain" in answers:
        show(answers["explain"])
    if "why_not" in answers:
        show(answers["why_not"])
    if "compare" in answers:
        print(answers["compare"])
    if len(record) == 1 and not answers:
        show(record.explain(0))
    if at is not None or (len(record) == 1 and not answers):
        show(draw.candidates(record, at or 0))
    elif not answers:
        show(draw.overview(record))


def _report(record: Record, outcome: Replay | None, answers: dict[str, Any]) -> dict[str, Any]:
    """For programs."""
    out: dict[str, Any] = {
        "tokens": list(record.tokens),
        "texts": texts(record),
        "settings": asdict(record.params),
        "decisions": [entry.to_json() for entry in record],
    }
    if outcome is not None:
        out["replay"] = {
            "tokens": list(outcome.tokens),
            "first_difference": outcome.first_difference,
            "reason": outcome.reason,
        }
    out |= {name: answers[name] for name in ("explain", "why_not") if name in answers}
    if "compare" in answers:
        comparison = answers["compare"]
        out["compare"] = {
            "engines": {name: _kept(one) for name, one in comparison.distributions.items()},
            "refusals": comparison.refusals,
            "partings": [vars(parting) for parting in comparison.partings],
        }
    return out


def _kept(distribution: Any) -> dict[str, Any]:
    """The most likely tokens that an engine keeps."""
    likely = distribution.kept[np.argsort(-distribution.probs[distribution.kept], kind="stable")][:_LISTED]
    top = [{"id": int(token), "probability": float(distribution.probs[token])} for token in likely]
    return {"kept": len(distribution.kept), "top": top}


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.strip("[] ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, such as 0.5,0.25, not {text!r}") from None
