"""One burst of requests, each of one of many adapters, through Engine.generate, on random weights of a named shape.

    python -m benchmarks.many_adapters --shape llama-2-7b --adapters 200 --requests 256

Reports throughput, the page pool, and the temporary memory of the compiled steps, which shows that the pool is never
copied.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import time
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, write_result
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="named shape of the base model")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--ranks", default="8,16,32,64", help="ranks, given out in turn")
    parser.add_argument("--targets", default="q,k,v,o")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", default="8,128", help="prompt lengths: lowest, highest plus one")
    parser.add_argument("--answer", default="8,64", help="answer lengths: lowest, highest plus one")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--max-seqs", type=int, default=256)
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--json", type=Path, default=RESULTS / "many_adapters.json")
    args = parser.parse_args(argv)

    ranks = [int(r) for r in args.ranks.split(",")]
    start = time.perf_counter()
    model = load_model(f"random:{args.shape}", dtype=args.dtype or "bfloat16")
    with ThreadPoolExecutor() as pool:
        made = pool.map(
            lambda i: random_adapter(
                model.config, ranks[i % len(ranks)], args.targets.split(","), seed=i, dtype=model.params["embed"].dtype
            ),
            range(args.adapters),
        )
        adapters = {f"adapter-{i}": a for i, a in enumerate(made)}
    print(f"model and {len(adapters)} adapters made in {time.perf_counter() - start:.1f} s", flush=True)

    start = time.perf_counter()
    settings = EngineConfig(
        dtype=args.dtype or "bfloat16",
        max_seqs=args.max_seqs,
        max_step_tokens=2048,
        seq_buckets=(args.max_seqs,),
        token_buckets=(2048,),
        max_model_len=2048,
        implementation=args.implementation,
        prefix_caching=False,  # the burst is sent twice
        progress=True,
    )
    rng = np.random.default_rng(42)
    prompt_lens = rng.integers(*map(int, args.prompt.split(",")), args.requests)
    answer_lens = rng.integers(*map(int, args.answer.split(",")), args.requests)
    requests = [
        Request(
            None,
            f"adapter-{rng.integers(args.adapters)}",
            SamplingParams(max_tokens=int(m), ignore_eos=True),
            rng.integers(3, model.config.vocab_size, n).tolist(),
        )
        for n, m in zip(prompt_lens, answer_lens, strict=True)
    ]
    with Engine(model, settings, adapters) as engine:
        print(f"engine ready after {time.perf_counter() - start:.1f} s", flush=True)
        warm = time.perf_counter()
        engine.generate(requests)
        first = time.perf_counter() - warm
        print(f"first burst, with compilation: {first:.1f} s", flush=True)
        start = time.perf_counter()
        outputs = engine.generate(requests, progress=True)
        seconds = time.perf_counter() - start
        engine.check_integrity()
        stats = engine.stats()
        runner, n = engine._core.runner, args.max_seqs
        steps = {
            f"decode {n}": runner.builder.padding(n, n, decode_only=True, use_adapters=True),
            "prompt 2048": runner.builder.padding(n, 2048, decode_only=False, use_adapters=True),
        }
        temp = {name: runner.temp_bytes(batch) for name, batch in steps.items()}
    answered = sum(len(o.token_ids) for o in outputs)
    result = dict(
        shape=args.shape,
        adapters=args.adapters,
        ranks=ranks,
        targets=args.targets,
        requests=args.requests,
        prompt_tokens=int(prompt_lens.sum()),
        answer_tokens=answered,
        seconds=seconds,
        seconds_with_compilation=first,
        requests_per_second=args.requests / seconds,
        answer_tokens_per_second=answered / seconds,
        pool_bytes=stats["num_pages"] * stats["page_bytes"],
        num_pages=stats["num_pages"],
        pages=stats["pages"],
        preemptions=stats["preemptions"],
        adapter_loads=stats["adapter_loads"],
        temp_bytes=temp,
        ok=all(o.finish_reason == "length" for o in outputs),
    )
    write_result(args.json, result)
    for key, value in result.items():
        print(f"{key:28} {value}")
    return result


if __name__ == "__main__":
    main()
