"""Record every named tensor of one run, streamed to a file.

The names are those of the model's page: embed, layers.0.attn.q, ..., final_norm, logits.

examples:
  refgemma trace "What is 17 + 25?" --output trace.safetensors
  refgemma trace --tokens 2,106,645 --output trace.safetensors --names "layers.0.*" --names logits
  refgemma trace --raw "The capital of France is" --last --output last.safetensors
"""

from __future__ import annotations

import argparse

import numpy as np

from refgemma import oracle
from refgemma.cli.options import add_json, add_model, add_prompt, check_apart, load_model, read_prompt_or_tokens
from refgemma.cli.terminal import print_json, print_table, progress_bar, size
from refgemma.errors import InputError
from refgemma.files.atomic import check_file_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    add_prompt(parser, tokens=True)
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="where the trace goes")
    parser.add_argument(
        "--names",
        action="append",
        metavar="PATTERN",
        help='keep only tensors of such names, such as "*.attn.probs"; may be given several times',
    )
    parser.add_argument("--last", action="store_true", help="keep the last position only")
    add_json(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    if not args.output.endswith(".safetensors"):
        raise InputError(f"{args.output} does not end in .safetensors: that is the format of a trace")
    check_apart({"--messages": args.messages}, {"--output": args.output})
    check_file_place(args.output)
    prompt = read_prompt_or_tokens(args)
    gemma = load_model(args)
    tokens = list(args.tokens) if args.tokens is not None else gemma.encode_prompt(prompt, raw=args.raw)
    with progress_bar(f"running {len(tokens)} tokens") as progress:
        trace = oracle.trace(
            gemma,
            tokens,
            names=args.names or "*",
            last=args.last,
            to=args.output,
            progress=progress,
        )
    shapes = {name: tensor.shape for name, tensor in trace.tensors.items()}
    itemsize = {name: np.dtype(dtype).itemsize for name, dtype in trace.dtypes.items()}
    nbytes = sum(int(np.prod(shape)) * itemsize[name] for name, shape in shapes.items())
    if args.json:
        listed = {name: {"shape": list(shape), "dtype": trace.dtypes[name]} for name, shape in shapes.items()}
        print_json({"model": args.model, "file": args.output, "tokens": trace.tokens[0].tolist(), "tensors": listed})
        return 0
    print(f"{args.output}: {len(shapes)} tensors of {len(tokens)} tokens, {size(nbytes)}")
    kinds: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        kind = ".".join("*" if word.isdecimal() else word for word in name.split("."))
        kinds[kind, shape] = kinds.get((kind, shape), 0) + 1
    rows = [(kind, str(count), " x ".join(map(str, shape))) for (kind, shape), count in kinds.items()]
    print_table(("tensor", "layers", "shape"), rows, text=(0,))
    return 0
