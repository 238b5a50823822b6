"""Answer requests for the Gemma models of Cloudflare Workers AI on this machine.

Without --model and --lora, the shipped model and its adapters answer for both hosted models.

examples:
  refgemma serve
  refgemma serve --model @cf/google/gemma-2b-it-lora=google/gemma-2b-it --weights bfloat16 --lora mine=my-adapter
  refgemma serve --finetunes kept --token secret
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from refgemma.cli.options import add_json, named_folder
from refgemma.cli.terminal import print_json, progress_bar, show
from refgemma.device import DEVICES
from refgemma.errors import InputError
from refgemma.gemma import Gemma, load

TOKEN = "REFGEMMA_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this subcommand."""
    parser.add_argument(
        "--model",
        action="append",
        type=named_folder,
        metavar="NAME=DIR",
        help="what answers under a hosted name: folder, shipped name, or hub id fetched before; may be given twice",
    )
    parser.add_argument(
        "--lora",
        action="append",
        type=named_folder,
        metavar="NAME=DIR",
        help="an adapter that requests may name; may be given several times",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8787, help="its port, 0 for a free one (default: 8787)")
    parser.add_argument("--token", help=f"bearer token that requests must carry (default: {TOKEN} of the environment)")
    parser.add_argument("--pad", action="store_true", help="pad the chunks of streams, as the service does")
    parser.add_argument("--finetunes", metavar="DIR", help="keep uploaded finetunes there (default: until the end)")
    parser.add_argument(
        "--weights", choices=("bfloat16", "float32"), default="float32", help="how matrices stay in memory"
    )
    add_json(parser)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    try:
        from refgemma.workers_ai.server.app import create_app
        from refgemma.workers_ai.server.start import greeting, hosts_of, serve, state
    except ModuleNotFoundError as error:
        raise InputError(f'serving needs {error.name}, which is not installed: pip install "refgemma[serve]"') from None
    app = create_app(
        _loaded(args) if args.model else None,
        dict(args.lora) if args.lora else None,
        pad=args.pad,
        token=os.environ.get(TOKEN) if args.token is None else args.token,
        hosts=hosts_of(args.host),
        finetunes=args.finetunes,
    )

    def tell(address: str) -> None:
        if args.json:
            print_json(state(app, address))
        else:
            show(greeting(app, address))
        sys.stdout.flush()  # a program may be waiting for it at the other end of a pipe

    serve(app, args.host, args.port, tell)
    return 0


def _loaded(args: argparse.Namespace) -> dict[str, Gemma]:
    """Models by hosted name, each folder loaded once."""
    loaded: dict[str, Gemma] = {}
    for _, folder in args.model:
        if folder not in loaded:
            with progress_bar(f"loading {Path(folder).name}") as progress:
                loaded[folder] = load(folder, weights=args.weights, device=args.device, progress=progress)
    return {name: loaded[folder] for name, folder in args.model}
