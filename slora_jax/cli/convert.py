"""``slora-jax convert``."""

import argparse
from pathlib import Path

from slora_jax.errors import ModelError
from slora_jax.loading import load_model, save_orbax
from slora_jax.memory import weight_bytes
from slora_jax.progress import progress_bar


def run(args: argparse.Namespace) -> int:
    if Path(args.out).expanduser().exists() and not args.overwrite:  # told before the model is read
        raise ModelError(f"{args.out} exists; choose another path or add --overwrite")
    with progress_bar("loading", not args.quiet) as progress:
        model = load_model(args.model, dtype=args.dtype, progress=progress)
    path = save_orbax(
        args.out,
        model.config,
        model.params,
        tokenizer=model.tokenizer,
        eos_token_ids=model.eos_token_ids,
        name=model.name,
        overwrite=args.overwrite,
    )
    size = weight_bytes(model.config, args.dtype) / 2**30
    tokenizer = "with its tokenizer" if model.tokenizer else "which has no tokenizer"
    print(f"wrote {model.name}, {size:.2f} GiB in {args.dtype}, {tokenizer}, to {path}")
    return 0
