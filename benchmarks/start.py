"""Seconds from the start of a process to its first token, with an empty compile cache and again with what that left.

    python -m benchmarks.start --model random:llama-2-7b --json FILE

Each of the two is a process of its own that makes an engine with some adapters, compiles everything ahead (see
EngineConfig.warm_up) and then answers a request of one token with an adapter. Nothing may be compiled after that: the
request is followed by one without an adapter and by 32 together, and what the engine then counts is in the result.
"""

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.record import write_result
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model

_RANKS = (8, 16, 32, 64)


def start(args: argparse.Namespace) -> dict[str, Any]:
    """One start, of this process."""
    model = load_model(args.model, dtype=args.dtype)
    loaded = time.time()
    dtype, targets = model.params["embed"].dtype, args.targets.split(",")
    adapters = {f"rank-{r}": random_adapter(model.config, r, targets, seed=r, dtype=dtype) for r in _RANKS}
    settings = EngineConfig(
        dtype=args.dtype,
        max_seqs=args.max_seqs,
        max_model_len=args.max_model_len,
        warm_up=args.warm_up if args.warm_up == "greedy" else True,
        page_pool_bytes=args.page_pool,
        compile_cache_dir=args.cache,
        progress=True,
    )
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    prompt = [t % (model.config.vocab_size - 3) + 3 for t in range(16)]
    with Engine(model, settings, adapters) as engine:
        ready = time.time()
        engine.generate([Request(None, "rank-64", params, prompt)])
        first = time.time()
        engine.generate([Request(None, None, params, prompt)])
        engine.generate([Request(None, f"rank-{_RANKS[i % 4]}", params, [*prompt, i + 3]) for i in range(32)])
        compiles = engine.stats()["compiles"]
    found = dict(model_loaded=loaded, engine_ready=ready, first_token=first)
    return {name: round(at - args.began, 2) for name, at in found.items()} | dict(compiled_while_serving=compiles)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--targets", default="q,k,v,o")
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--page-pool", type=int, help="bytes")
    parser.add_argument("--warm-up", choices=("greedy", "all"), default="greedy")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # in one of the two processes
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.began:
        found = start(args)
        print(json.dumps(found))
        return found
    result: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("json", "began", "cache")}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first_start", "second_start"):
            command = [sys.executable, "-m", "benchmarks.start", *given, "--cache", cache, "--began", str(time.time())]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result[name] = json.loads(process.stdout.splitlines()[-1])
            print(f"{name:12} {result[name]}", flush=True)
    if args.json:
        write_result(args.json, result)
    return result


if __name__ == "__main__":
    main()
