"""What deterministic mode costs, and that it keeps its word: the same requests with and without it.

    python -m benchmarks.deterministic [--model random:llama-2-7b] [--adapters 64] [--json FILE]

First some requests run alone; then they run again among all others, and every bit of their answers is compared. Without
the mode differences are counted: they are the near-ties that fall the other way, and all that follows from them.
Requests of the same lengths come before, so that everything is compiled. Adapters of one rank share their weights.
"""

import argparse
import gc
from pathlib import Path
import time
from typing import Any

import numpy as np

from benchmarks.record import write_result
from slora_jax import Engine, EngineConfig, Request, RequestOutput, SamplingParams
from slora_jax.adapters import clone, random_adapter
from slora_jax.loading import LoadedModel, load_model

_RANKS = (8, 16, 32, 64)
_TARGETS = ("q", "k", "v", "o")


def _requests(args: argparse.Namespace, vocab_size: int, seed: int) -> list[Request]:
    """The lengths are the same for every seed, the prompts are not."""
    rng, tokens = np.random.default_rng(0), np.random.default_rng(seed)
    names = [None, *(f"adapter-{i}" for i in range(args.adapters))]
    return [
        Request(
            None,
            names[i % len(names)],
            SamplingParams(max_tokens=int(rng.integers(8, args.longest)), ignore_eos=True, logprobs=1),
            tokens.integers(3, vocab_size, int(rng.integers(8, args.longest))).tolist(),
        )
        for i in range(args.requests)
    ]


def _bits(output: RequestOutput) -> list[tuple[int, bytes]]:
    return [(p.token_id, np.float32(p.logprob).tobytes()) for p in output.completions[0].logprobs or ()]


def _measure(model: LoadedModel, adapters: dict, args: argparse.Namespace, deterministic: bool) -> dict[str, Any]:
    settings = EngineConfig(
        max_model_len=2 * args.longest,
        max_lora_rank=max(_RANKS),
        lora_targets=_TARGETS,
        page_pool_bytes=int(args.page_pool_gib * 2**30),
        max_seqs=args.max_seqs,
        max_step_tokens=args.max_step_tokens,
        **({} if deterministic else dict(seq_buckets=args.seqs, token_buckets=args.tokens)),
        deterministic=deterministic,
        progress=True,
    )
    others, requests = (_requests(args, model.config.vocab_size, seed) for seed in (1, 0))
    with Engine(model, settings, adapters) as engine:
        engine.generate(others)
        engine.generate(others[:1])
        compiles = engine.stats()["compiles"]
        alone = [_bits(engine.generate([request])[0]) for request in requests[: args.check]]
        start = time.perf_counter()
        outputs = engine.generate(requests)
        seconds = time.perf_counter() - start
        stats = engine.stats()
        engine.check_integrity()
    among = [_bits(output) for output in outputs[: args.check]]
    tokens = [([t for t, _ in a], [t for t, _ in b]) for a, b in zip(alone, among, strict=True)]
    return dict(
        requests_per_second=round(args.requests / seconds, 3),
        answer_tokens_per_second=round(sum(len(o.token_ids) for o in outputs) / seconds, 1),
        checked=args.check,
        answers_with_other_bits=sum(a != b for a, b in zip(alone, among, strict=True)),
        answers_with_other_tokens=sum(a != b for a, b in tokens),
        preemptions=stats["preemptions"],
        compiles=stats["compiles"] - compiles,
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a prompt, and of an answer, at most")
    parser.add_argument("--check", type=int, default=16, help="requests that also run alone")
    parser.add_argument("--page-pool-gib", type=float, default=48, help="small enough that some requests are preempted")
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--seqs", type=_sizes, default=(64, 128, 256), help="sizes of default steps; see EngineConfig")
    parser.add_argument("--tokens", type=_sizes, default=(512, 768, 1024, 2048), help="the same of steps with prompts")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    model = load_model(args.model)
    dtype = model.params["embed"].dtype
    first = [random_adapter(model.config, rank, _TARGETS, seed=rank, dtype=dtype) for rank in _RANKS]
    adapters = {f"adapter-{i}": clone(first[i % len(first)], i) for i in range(args.adapters)}
    result = {}
    for mode in (False, True):
        name = "deterministic" if mode else "default"
        result[name] = _measure(model, adapters, args, mode)
        print(f"{name:14} {result[name]}", flush=True)
        gc.collect()  # the engine's pool
    cost = 1 - result["deterministic"]["requests_per_second"] / result["default"]["requests_per_second"]
    result = dict(result, arguments={k: str(v) for k, v in vars(args).items()}, cost=round(cost, 3))
    print(f"cost           {cost:.3f} of requests/s")
    if args.json:
        write_result(args.json, result)
    if result["deterministic"]["answers_with_other_bits"]:
        raise SystemExit("deterministic mode gave other bits in a batch than alone")


if __name__ == "__main__":
    main()
