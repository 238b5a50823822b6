"""Judge a trace of another engine: which operation is the first that rounding does not explain.

CANDIDATE is safetensors, .npz, or a .npy of logits; names of transformers modules and of Flax are recognised.
REFERENCE, from `refgemma trace`, gives the model and the tokens; without it, give --model, and --tokens unless
CANDIDATE holds them.
Exit code 1 if something is wrong.

examples:
  refgemma compare reference.safetensors candidate.safetensors
  refgemma compare reference.safetensors candidate.npz --arithmetic bfloat16 --picture report.png
  refgemma compare --model tiny-it candidate.safetensors --map names.json --json
  refgemma compare --model reveal-gqa logits.npy
  refgemma compare --model tiny-it --tokens 2,106,1645 logits.npy
"""

from __future__ import annotations

import argparse

from refgemma import oracle
from refgemma.cli.options import add_json, check_apart, picture_file, read_json, token_ids
from refgemma.cli.terminal import print_json, progress_bar
from refgemma.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument("reference", nargs="?", metavar="REFERENCE", help="a trace that `refgemma trace` made")
    add_candidate(parser, None)
    parser.add_argument("--picture", metavar="FILE.png|.svg|.pdf", help="save errors against depth as a picture")
    add_json(parser)


def add_candidate(parser: argparse.ArgumentParser, model: str | None) -> None:
    """Add the arguments that say what another engine computed, and how; `model` is the default model."""
    parser.add_argument("candidate", metavar="CANDIDATE", help="what the other engine computed")
    parser.add_argument(
        "--model",
        default=model,
        help="folder, shipped name, hub id fetched before, or formula model"
        f" (default: {model or 'the one of REFERENCE'})",
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="DIR[:SCALE]", help="an adapter that the model ran with"
    )
    parser.add_argument(
        "--arithmetic",
        metavar="NAME",
        help="what CANDIDATE was computed in: float32, bfloat16, float16, float64, or a profile such as bf16-deepmind"
        " (default: recognised from its numbers)",
    )
    parser.add_argument(
        "--tokens", type=token_ids, metavar="IDS", help="the input, such as 2,106,1645, if CANDIDATE does not hold it"
    )
    parser.add_argument(
        "--map", metavar="FILE.json", help='names in CANDIDATE: {"blk.{i}.q": "layers.{i}.attn.q", ...}'
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    read = {"REFERENCE": args.reference, "CANDIDATE": args.candidate, "--map": args.map}
    check_apart(read, {"--picture": args.picture})
    with picture_file(args.picture) as save_picture:
        mapping = read_mapping(args.map)
        with progress_bar(f"judging {args.candidate}") as progress:
            report = oracle.compare(
                args.reference,
                args.candidate,
                model=args.model,
                lora=args.lora,
                arithmetic=args.arithmetic,
                mapping=mapping,
                tokens=args.tokens,
                progress=progress,
            )
        save_picture(report.drawn)
    if args.json:
        print_json(report.as_dict())
    else:
        print(report.text())
    return 0 if report.ok else 1


def read_mapping(path: str | None) -> dict[str, str] | None:
    """Read the file of ``--map``, if any."""
    if path is None:
        return None
    wanted = 'expected an object of names, {"candidate name": "reference name", ...}'
    mapping = read_json(path, dict, wanted)
    if not all(isinstance(name, str) for name in mapping.values()):
        raise InputError(f"{path} holds {mapping!r:.40}: {wanted}")
    return mapping
