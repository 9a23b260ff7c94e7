"""``slora-jax key``."""

import argparse
from pathlib import Path
import sys

from slora_jax.cli.options import require_server


def run(args: argparse.Namespace) -> int:
    require_server()
    from slora_jax.server.keys import add_key

    fields = {
        "adapters": args.adapter if args.adapter is not None else ["*"],
        "base": not args.no_base,
        "admin": args.admin,
        "max_concurrent": args.max_concurrent,
        "requests_per_minute": args.requests_per_minute,
        "tokens_per_minute": args.tokens_per_minute,
        "weight": args.weight,
    }
    print(add_key(Path(args.file), args.name, **{k: v for k, v in fields.items() if v is not None}))
    print(f"slora-jax key: {args.file} has only its hash; keep the key, it is not shown again", file=sys.stderr)
    return 0
