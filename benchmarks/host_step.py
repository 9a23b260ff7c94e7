"""Host work of a step: planning, building, dispatching and taking results, for a model that takes no time.

    python -m benchmarks.host_step [--seqs 256] [--adapters 2000] [--json FILE]

The engine's own loop body runs; only the forward pass and the sampler are empty programs that take the same arguments.
So the sum is what the device would wait for if steps did not overlap, and what must stay below a step's time if they
do. Delivery (detokenising and calling back) runs on a thread of its own and is timed apart. Decode steps are given by
their lower quartile: other work on the machine can only add.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
import json
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np

from benchmarks.empty_programs import EmptyPrograms
from benchmarks.record import write_result
from pallas_kernels.geometry import MODULES
from slora_jax.adapter_loader import AdapterLoader
from slora_jax.adapters import AdapterFiles, AdapterShape
from slora_jax.batch import Batch, Output, Sampling
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.core import EngineCore
from slora_jax.delivery import Event
from slora_jax.jobs import Generation, Job
from slora_jax.model_config import ModelConfig
from slora_jax.page_pool import PagePool
from slora_jax.placement import HostImage
from slora_jax.registry import AdapterRecord, AdapterRegistry
from slora_jax.requests import Completion, Request, RequestOutput, Timings
from slora_jax.sampling_params import SamplingParams
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Sequence
from slora_jax.shapes import named_shape
from slora_jax.staging import Staging
from slora_jax.text_stream import TextStream

_PAGES = 13_000  # of Llama-2-7B beside its weights on an H200
_RANKS = (8, 16, 32, 64)


class _Images:
    """Sizes of images that nobody makes."""

    def num_pages(self, shape: AdapterShape) -> int:
        return shape.max_rank // 8  # of Llama-2-7B

    def nbytes(self, shape: AdapterShape) -> int:
        return self.num_pages(shape) << 23


def _registry(count: int, config: ModelConfig) -> AdapterRegistry:
    """Adapters on q, k, v and o whose digests are known, without weights."""
    registry = AdapterRegistry()
    shapes = []
    for rank in _RANKS:
        ranks = np.zeros((config.num_layers, len(MODULES)), np.int32)
        ranks[:, :4] = rank
        scaling = np.where(ranks, np.float32(1), np.float32(0))
        sizes = dict(in_sizes=config.in_sizes, out_sizes=config.out_sizes)
        shapes.append(AdapterShape(ranks=ranks, scaling=scaling, **sizes))
    for i in range(count):
        digest = f"adapter-{i:05d}"
        record, _ = registry.add(digest, AdapterFiles("", shapes[i % len(shapes)], digest.encode()))
        registry.read(record, digest, digest)
    return registry


def _loader(registry: AdapterRegistry) -> AdapterLoader:
    """A loader that has read all of them."""
    loader = AdapterLoader(1 << 60, _Images(), None, lambda: None)  # type: ignore[arg-type]
    for digest, record in registry.items():
        loader.tier.reserve(digest, loader.images.nbytes(record.shape), ())
        loader.tier.fill(digest, digest, HostImage((), 0))
    return loader


class _EmptyRunner(EmptyPrograms):
    """A Runner whose programs take all arguments and do nothing with them."""

    def __init__(self, buckets: Buckets, config: ModelConfig):
        super().__init__(buckets.max_seqs)
        self._staging = Staging(jax.device_put, jax.device_put)
        place = (config.geometry, buckets, _PAGES, config.max_position)
        self.builder = BatchBuilder(*place, put=self._staging.table)
        self.compiles = 0

    def send(self, image, start: int, stop: int) -> list:
        return []

    def write_adapter(self, chunks, page_ids) -> None:
        pass

    def put(self, batch: Batch) -> Batch:
        return self._staging.batch(batch)

    def fetch(self, output: Output | None, logits: jax.Array) -> Output | None:
        return jax.tree.map(np.asarray, output)

    def keep(self, sampling: Sampling) -> Sampling:
        return jax.device_put(sampling)


def _timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - began

    return call


def _job(index: int, name: str, record: AdapterRecord, prompt_len: int, max_tokens: int, params: SamplingParams) -> Job:
    use = AdapterUse(name, _Images().num_pages(record.shape), 1e-3, record)
    seq = Sequence(
        seq_id=(f"req-{index}", 0, index),
        tokens=[index] * prompt_len,
        prompt_len=prompt_len,
        max_tokens=max_tokens,
        adapter=use,
        adapter_name=name,
    )
    request = Request(None, name, params, seq.tokens)
    completion = Completion(0)
    output = RequestOutput(
        request_id=f"req-{index}",
        prompt=None,
        prompt_token_ids=seq.tokens,
        adapter=name,
        adapter_digest=name,
        completions=[completion],
        prompt_logprobs=None,
        timings=Timings(time.monotonic()),
    )
    job = Job(request, record, output, lambda delta: None)
    job.generations.append(Generation(job, seq, completion, TextStream(None, ()), index, frozenset((2,))))
    return job


def measure(seqs: int, num_adapters: int, steps: int, temperature: float) -> dict[str, Any]:
    """Milliseconds a step, by part: lower quartiles over decode steps; and of all steps, those with prompts too."""
    config = named_shape("llama-2-7b")
    rng = np.random.default_rng(0)
    registry = _registry(num_adapters, config)
    adapters = registry.items()
    pool = PagePool(_PAGES)
    scheduler = Scheduler(pool, max_seqs=seqs, max_step_tokens=2048, prefix_page_cost=1e-3)
    buckets = Buckets(seqs=(seqs,), tokens=(2048,))
    runner = _EmptyRunner(buckets, config)
    builder = runner.builder
    events: list[Event] = []
    core = EngineCore(runner, pool, scheduler, registry, _loader(registry), events.extend)  # type: ignore[arg-type]
    params = SamplingParams(temperature=temperature, max_tokens=512)
    for i in range(seqs * 8):
        name, record = adapters[int(rng.integers(num_adapters))]
        core.start(_job(i, name, record, int(rng.integers(8, 512)), int(rng.integers(8, 512)), params))
    seconds: dict[str, float] = defaultdict(float)
    plans = []

    def schedule():
        plans.append(plain())
        return plans[-1]

    plain = scheduler.schedule
    scheduler.schedule = _timed(seconds, "schedule", schedule)  # type: ignore[method-assign]
    builder.build = _timed(seconds, "build", builder.build)  # type: ignore[method-assign]
    for name in ("put", "forward", "sample", "fetch"):
        setattr(runner, name, _timed(seconds, name, getattr(runner, name)))
    delivery = 0.0
    decode: dict[str, list[float]] = defaultdict(list)
    every = []
    for step in range(steps):
        seconds.clear()
        began = time.perf_counter()
        core.step()
        total = time.perf_counter() - began
        began = time.perf_counter()
        for generation, token, logprob, reason, error in events:
            generation.take(token, logprob, reason, error, lambda generation: None)
        delivery = time.perf_counter() - began
        events.clear()
        if step < 50:
            continue  # the first steps compile, and start the batch
        every.append(total)
        if len(plans[-1].chunks) >= 0.9 * seqs and all(c.length == 1 for c in plans[-1].chunks):
            parts = dict(seconds, rest=total - sum(seconds.values()), total=total, delivery_thread=delivery)
            for name, value in parts.items():
                decode[name].append(value)
    return dict(
        decode_ms={name: round(float(np.percentile(values, 25)) * 1e3, 3) for name, values in decode.items()},
        decode_steps=len(decode["total"]),
        all_steps_mean_ms=round(float(np.mean(every)) * 1e3, 3),
        all_steps_p99_ms=round(float(np.percentile(every, 99)) * 1e3, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqs", type=int, default=256, help="running sequences")
    parser.add_argument("--adapters", type=int, default=2000, help="adapters that requests choose from")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    result = measure(args.seqs, args.adapters, args.steps, args.temperature)
    print(json.dumps(result, indent=2))
    if args.json:
        write_result(args.json, dict(result, seqs=args.seqs, adapters=args.adapters, temperature=args.temperature))


if __name__ == "__main__":
    main()
