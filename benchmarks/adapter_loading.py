"""How fast adapters come from host memory to pages, and what that costs those who wait and those who run.

    python -m benchmarks.adapter_loading --shape llama-2-7b --ranks 64 --running 64

Three questions, on random weights of a named shape:
- the rate of making images on a worker (lay out, pin) and of copying them to pages;
- the first token of a request whose adapter lies in host memory only, against one whose adapter lies in pages, on an
  engine that does nothing else; the aim is at most 2 x bytes / 43 GB/s more;
- the step time of running requests while adapters are copied all the time, against the same requests in peace, in
  turns; the aim is 5 % more at p99.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.record import RESULTS, write_result
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model

_PATIENCE = 30.0  # seconds
HOST_TO_DEVICE = 43e9  # bytes a second from pinned memory, measured on an H200


class StepTimes:
    """Seconds between the ends of an engine's steps."""

    def __init__(self, engine: Engine):
        self.steps: list[tuple[int, float]] = []
        self._count, self._last = 0, 0.0
        self._scheduler = engine._core.scheduler
        self._complete = self._scheduler.complete
        self._scheduler.complete = self._noted  # type: ignore[method-assign]

    def _noted(self, *args: Any, **kw: Any) -> None:
        now = time.perf_counter()
        self._count += 1
        if self._last:
            self.steps.append((self._count, now - self._last))
        self._last = now
        self._complete(*args, **kw)

    def during(self, work: Callable[[], object]) -> np.ndarray:
        """Numbers and times of the steps that end while `work` runs, but for the first, which may have begun before."""
        self.steps = []
        work()
        return np.array(self.steps[1:]).reshape(-1, 2)


def evict(engine: Engine, names: Sequence[str]) -> None:
    """Takes adapters out of their pages; they stay in host memory."""
    digests = {row["name"]: row["digest"] for row in engine.list_adapters()}
    pages = engine._core.scheduler.adapters
    engine._loop.call(lambda: [pages.forget(digests[name]) for name in names])


def measure_rates(engine: Engine, names: Sequence[str], repeats: int) -> dict[str, float]:
    """Bytes a second of the two stages, each by itself."""
    records = [engine._registry.get(name) for name in names]
    runner, loader = engine._core.runner, engine._core.tiers.loader
    began = time.perf_counter()
    made = [runner.images.make(record.contents) for record in records]  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    nbytes = sum(image.nbytes for image in made)
    images = [image for record in records if (image := loader.image(record)) is not None]

    def copy() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            for image in images:
                count = sum(chunk.shape[0] for chunk in image.chunks)
                nowhere = [runner.num_pages] * count  # past the end: the copy is made and the write is dropped
                runner.write_adapter(runner.send(image, 0, count), nowhere)
        jax.block_until_ready(runner.state)
        return time.perf_counter() - began

    engine._loop.call(copy)  # compiles
    copied = repeats * sum(image.nbytes for image in images)
    return dict(
        make_bytes_per_second=nbytes / seconds,
        copy_bytes_per_second=copied / engine._loop.call(copy),
    )


def first_token(engine: Engine, name: str, prompt: list[int]) -> float:
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    output = engine.generate([Request(None, name, params, prompt)])[0]
    assert output.finish_reason == "length" and output.timings.ttft is not None, output
    return output.timings.ttft


def measure_first_token(engine: Engine, names: Sequence[str], prompt: list[int], repeats: int) -> dict[str, Any]:
    """Seconds to the first token, cold (host memory) and warm (pages), medians; and what the engine's thread did with
    them, means.
    """
    cold, warm = [], []
    host: list[Counter[str]] = [Counter(), Counter()]
    for i in range(repeats):
        name = names[i % len(names)]
        evict(engine, [name])
        for seconds, parts in zip((cold, warm), host, strict=True):
            before = engine.stats()["step_seconds"]["host"]
            seconds.append(first_token(engine, name, prompt))
            parts.update({k: v - before[k] for k, v in engine.stats()["step_seconds"]["host"].items()})
    nbytes = engine._images.nbytes(engine._registry.get(names[0]).shape)
    more = statistics.median(cold) - statistics.median(warm)
    return dict(
        adapter_bytes=nbytes,
        cold_seconds=statistics.median(cold),
        warm_seconds=statistics.median(warm),
        more_seconds=more,
        allowed_seconds=2 * nbytes / HOST_TO_DEVICE,
        share_of_allowed=more / (2 * nbytes / HOST_TO_DEVICE),
        cold_host_seconds={part: sum_ / repeats for part, sum_ in host[0].items()},
        warm_host_seconds={part: sum_ / repeats for part, sum_ in host[1].items()},
    )


def measure_steps(
    engine: Engine, names: Sequence[str], prompts: list[list[int]], max_tokens: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """Step times of running requests, in peace and while adapters are copied, in short turns, of which every other pair
    begins with the latter. A round in which a request ended does not count, and is the last.

    Every step lengthens every context, so that steps take longer and longer whatever is copied: by a tenth in a hundred
    steps of 64 requests of Llama-2-7B. So growth is that of steps' times over the line through the quiet ones.
    """
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    streams = [engine.stream(Request(None, None, params, prompt)) for prompt in prompts]
    for stream in streams:
        next(stream)
    times = StepTimes(engine)
    tiers = engine._core.tiers

    def load() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            load_all()

    def load_all() -> None:
        evict(engine, names)
        done = tiers.page_loads
        for name in names:
            engine.prefetch_adapter(name)
        limit = time.perf_counter() + _PATIENCE
        while tiers.page_loads < done + len(names):
            if time.perf_counter() > limit:
                raise SystemExit(f"{len(names)} adapters did not come to their pages in {_PATIENCE:.0f} s")
            time.sleep(0.0005)

    work = dict(quiet=lambda: time.sleep(seconds), loading=load)
    found: dict[str, list[np.ndarray]] = dict(quiet=[], loading=[])
    loaded, loading_seconds = 0, 0.0
    load_all()
    for i in range(rounds):
        order = ["quiet", "loading"] if i % 2 else ["loading", "quiet"]
        before, parts = tiers.page_loads, {}
        for kind in order:
            parts[kind] = times.during(work[kind])
        if len(engine.list_requests()) < len(streams):
            break
        for kind, part in parts.items():
            found[kind].append(part)
        loaded += tiers.page_loads - before
        loading_seconds += float(parts["loading"][:, 1].sum())
    for stream in streams:
        stream.close()
    if not found["quiet"]:
        raise SystemExit("the running requests ended in the first round; give a larger --max-tokens")
    return summary(**{kind: np.concatenate(parts) for kind, parts in found.items()}) | dict(
        adapters_loaded=loaded,
        loaded_bytes_per_second=loaded * engine._images.nbytes(engine._registry.get(names[0]).shape) / loading_seconds,
    )


def summary(quiet: np.ndarray, loading: np.ndarray) -> dict[str, Any]:
    """Percentiles of step times. Arguments: [n, 2], a step's number and its seconds."""
    slope, start = np.polyfit(quiet[:, 0], quiet[:, 1], 1)
    result: dict[str, Any] = dict(steps_quiet=len(quiet), steps_loading=len(loading))
    for q in (50, 99):
        values = []
        for name, steps in (("quiet", quiet), ("loading", loading)):
            values.append(float(np.percentile(steps[:, 1] / (start + slope * steps[:, 0]), q)))
            result[f"p{q}_{name}_seconds"] = float(np.percentile(steps[:, 1], q))
            result[f"p{q}_{name}_over_line"] = values[-1]
        result[f"p{q}_growth"] = values[1] / values[0] - 1
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="named shape of the base model")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--targets", default="q,k,v,o")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--running", type=int, default=64, help="requests that run while adapters are copied")
    parser.add_argument("--context", type=int, default=512, help="tokens of their prompts")
    parser.add_argument("--max-tokens", type=int, default=1500, help="of their answers; they must outlast it all")
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each quiet and each loading turn, at least")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--chunk-mib", type=float, default=64)
    parser.add_argument("--step-mib", type=float, default=128)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--page-pool-bytes", type=int, default=None)
    parser.add_argument("--json", type=Path, default=RESULTS / "adapter_loading.json")
    args = parser.parse_args(argv)
    model = load_model(f"random:{args.shape}", dtype=args.dtype or "bfloat16")
    dtype = model.params["embed"].dtype
    targets = args.targets.split(",")
    adapters = {
        f"adapter-{i}": random_adapter(model.config, args.rank, targets, seed=i, dtype=dtype)
        for i in range(args.adapters)
    }
    settings = EngineConfig(
        dtype=args.dtype or "bfloat16",
        max_seqs=args.running + 1,
        max_step_tokens=args.max_step_tokens,
        seq_buckets=(args.running + 1,),
        token_buckets=(args.max_step_tokens,),
        max_model_len=args.context + args.max_tokens,
        prefix_caching=False,  # the same prompt again must be computed again
        adapter_chunk_bytes=int(args.chunk_mib * 2**20),
        adapter_step_bytes=int(args.step_mib * 2**20),
        page_pool_bytes=args.page_pool_bytes,
        progress=True,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab_size, args.context).tolist() for _ in range(args.running)]
    names = list(adapters)
    with Engine(model, settings, adapters) as engine:
        engine.warm_up(adapters=True, greedy_only=True)
        for name in names:
            engine.prefetch_adapter(name).result()
        first_token(engine, names[0], prompts[0])
        result = dict(
            shape=args.shape,
            rank=args.rank,
            targets=args.targets,
            chunk_bytes=settings.adapter_chunk_bytes,
            step_bytes=settings.adapter_step_bytes,
            running=args.running,
            context=args.context,
            rates=measure_rates(engine, names, args.repeats),
            first_token=measure_first_token(engine, names, prompts[0][:64], args.repeats),
            steps=measure_steps(engine, names, prompts, args.max_tokens, args.seconds, args.rounds),
        )
        result["tiers"] = engine.stats()["adapter_tiers"]
        engine.check_integrity()
    write_result(args.json, result)
    for key, value in result.items():
        print(f"{key:14} {value}")
    return result


if __name__ == "__main__":
    main()
