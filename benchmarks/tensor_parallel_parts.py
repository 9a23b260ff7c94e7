"""What benchmarks/tensor_parallel.py measures: decode steps beside their floor, and served requests.

A decode step is timed alone, as the engine runs it (step, then sampler): a pool of random numbers stands for keys,
values and adapters, because their values change no time, and every sequence uses the next adapter in turn.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
import gc
import time
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from benchmarks.tensor_parallel_subject import Subject
from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from slora_jax import Engine, Request, RequestOutput, SamplingParams
from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import Adapter
from slora_jax.adapters.shards import shard_adapter
from slora_jax.batch import Batch, State
from slora_jax.memory import weight_bytes
from slora_jax.model_config import ModelConfig, param_specs
from slora_jax.page_pool import PagePool
from slora_jax.parallel import Parallel
from slora_jax.placement import adapter_pages
from slora_jax.program_shapes import StepShape
from slora_jax.programs import Programs
from slora_jax.sampling_batch import build_sampling
from slora_jax.seats import sequence_owner
from slora_jax.sequence import AdapterUse, Chunk
from slora_jax.sequence import Sequence as Seq
from slora_jax.traces import synthetic_trace


class Decode:
    """Decode steps of one layout with `count` adapters, `seqs` sequences of `context` tokens each."""

    def __init__(self, subject: Subject, layout: str, count: int, seqs: int):
        self.subject, self.seqs = subject, seqs
        self.parallel: Parallel | None = subject.parallels[layout, count]
        self.programs: Programs = subject.programs[subject.key(layout, count)]
        self.adapters = subject.used(layout, count, seqs)
        self.context = subject.context(seqs)
        self.shape = StepShape(seqs, seqs, seqs, True, layout != "base")

    def batch(self) -> Batch:
        """Sequences of one adapter stand together. Raises CapacityError if they do not fit."""
        pool = PagePool(self.programs.builder.num_pages)
        chunks = []
        for i in range(self.seqs):
            adapter = self.adapters[i * len(self.adapters) // self.seqs] if self.adapters else None
            use = None
            if adapter is not None:
                use = AdapterUse(adapter.digest, adapter_pages(adapter, self.subject.config, self.parallel))
                if not pool.holds(adapter_owner(adapter.digest)):
                    pool.allocate(adapter_owner(adapter.digest), use.num_pages)
            seq = Seq(seq_id=i, tokens=[1] * self.context, prompt_len=1, max_tokens=self.context, adapter=use)
            pool.allocate(sequence_owner(seq), ceil_div(self.context, PAGE_TOKENS))
            chunks.append(Chunk(seq, self.context - 1, 1))
        return self.programs.builder.build(chunks, pool, {a.digest: a for a in self.adapters})[0]

    def caller(self, hold: "Pool") -> Callable[[], Any]:
        """A call that dispatches a step and its sampler, with all arguments on the devices already."""
        params, programs = self.subject.model.params, self.programs
        batch = jax.device_put(self.batch(), programs.step(self.shape).input_shardings[0][3])
        sampling = build_sampling([], self.seqs)
        last = jax.device_put(
            np.zeros(self.subject.args.max_seqs, np.int32), programs.step(self.shape).input_shardings[0][2]
        )
        rows = np.arange(self.seqs, dtype=np.int32)

        def call():
            nonlocal last
            state, hold.state = hold.state, None  # a step gives its own away
            hold.state, logits, _ = programs.forward(params, state, last, batch)
            output, last = programs.sample(logits, sampling, last, rows)
            return output.tokens

        return call

    def floor_bytes(self) -> int:
        """Bytes that the busiest device must read: weights, keys and values, and each adapter's tiles there once."""
        config, dtype = self.subject.config, self.subject.args.dtype
        layout = self.parallel.layout if self.parallel else None
        geometry = layout.local if layout else config.geometry
        itemsize = jnp.dtype(dtype).itemsize
        weights = weight_bytes(config, dtype, self.parallel)
        spec = param_specs(config)["embed"]
        if not config.tied_embeddings:  # an embedding table is not read but for a few rows
            weights -= spec.shape[0] * spec.shape[1] * itemsize // (layout.devices if layout else 1)
        kv = self.seqs * self.context * 2 * geometry.num_kv_heads * geometry.head_dim * config.num_layers
        return weights + kv * itemsize + sum(adapter_bytes(a, config, self.parallel) for a in self.adapters)


def adapter_bytes(adapter: Adapter, config: ModelConfig, parallel: Parallel | None) -> int:
    """Bytes of an adapter's tiles on the device that has most of them, in bfloat16."""
    if parallel is None:
        geometry = config.geometry
        widths = [geometry.in_tiles(m) + geometry.out_tiles(m) for m in range(7)]
        return int((adapter.granules * np.array(widths)).sum()) * 1024
    layout = parallel.layout
    shards = shard_adapter(adapter, layout)
    a = (shards.shrink_granules * np.array([layout.shrink.in_tiles(m) for m in range(7)])).sum(axis=(1, 2))
    b = (adapter.granules * np.array([layout.expand.out_tiles(m) for m in range(7)])).sum()
    return int(a.max() + b) * 1024


class Pool:
    """The one pool of all decode steps. state: None while a step has it, and after one that failed."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self.state: State | None = None

    def fill(self) -> None:
        """Fills it with small random numbers, if there is none."""
        if self.state is not None:
            return
        subject = self._subject
        parallel = next(iter(subject.parallels.values()))
        elements = parallel.page_elements if parallel else subject.config.geometry.page_elements
        shape, dtype = (subject.config.num_layers, subject.num_pages, elements), jnp.dtype(subject.args.dtype)
        layer, u = shape[1:], jnp.uint32

        def body(i, pages):
            row, column = (lax.broadcasted_iota(u, layer, axis) for axis in range(2))
            hashed = (row * u(2654435761) + column * u(2246822519) + u(i) * u(3266489917)) * u(668265263)
            values = ((hashed >> 24).astype(dtype) - 127.5) * jnp.asarray(1e-4, dtype)
            return lax.dynamic_update_index_in_dim(pages, values, i, 0)

        def fill():
            return lax.fori_loop(0, shape[0], body, jnp.zeros(shape, dtype))

        self.state = State(pages=jax.jit(fill, out_shardings=parallel.pool if parallel else None)())


def serve(subject: Subject, layout: str, count: int) -> dict[str, Any]:
    """Requests/s of a burst with the lengths and adapters of S-LoRA's synthetic trace. Before the clock starts every
    adapter is used once, so that it lies in host memory, and in the pool if there is room.
    """
    args, key = subject.args, subject.key(layout, count)
    adapters: dict[str, Adapter] = {} if layout == "base" else dict(list(subject.adapters.items())[:count])
    trace = synthetic_trace(adapters=len(adapters), rate=args.requests, seconds=1, lengths=tuple(args.lengths))
    rng, names = np.random.default_rng(0), list(adapters)

    def request(adapter: str | None, prompt: int, answer: int) -> Request:
        tokens = rng.integers(0, subject.config.vocab_size, prompt).tolist()
        return Request(None, adapter, SamplingParams(max_tokens=answer, ignore_eos=True), tokens)

    asked = [request(None if t.adapter is None else names[t.adapter], t.prompt_len, t.output_len) for t in trace]
    first = [request(names[i % len(names)] if names else None, 4, 3) for i in range(max(args.max_seqs, len(names)))]
    start = time.perf_counter()
    with Engine(subject.model, subject.settings(), adapters, subject.parallels[layout, count]) as engine:
        runner, programs = engine._core.runner, subject.programs[key]
        if runner._options != programs.options:
            raise RuntimeError("the engine would run other programs than those that were compiled")
        runner.programs = programs  # compiled already, for all bursts of this layout
        if key in subject.images:
            runner.images.make = subject.images[key].make  # type: ignore[method-assign]
        engine.warm_up(adapters=bool(adapters), base=not adapters, greedy_only=True)
        check(engine.generate(first))
        before, ready = engine.stats(), time.perf_counter() - start
        ended: list[RequestOutput] = []
        with ThreadPoolExecutor(1) as waiting:
            start = time.perf_counter()
            call = waiting.submit(engine.generate, asked, on_delta=lambda d: d.output and ended.append(d.output))
            done = not wait([call], timeout=args.burst_seconds).not_done
            seconds, outputs = time.perf_counter() - start, list(ended)
            after = engine.stats()
            engine.close()  # which ends what is left
    check(outputs)
    del engine, runner
    gc.collect()  # the pool's memory
    return dict(
        finished=done,  # if not, the requests that ended by then count, which are the shorter ones
        requests_per_second=len(outputs) / seconds,
        **{f"{x}_per_second": (after[x] - before[x]) / seconds for x in ("prompt_tokens", "generated_tokens")},
        seconds=seconds,
        seconds_to_start=ready,
        **{x: after[x] - before[x] for x in ("steps", "preemptions", "adapter_loads", "compiles")},
        step_seconds=after["step_seconds"],
        num_pages=after["num_pages"],
    )


def check(outputs: Sequence[Any]) -> None:
    if failed := [o for o in outputs if o.finish_reason != "length"]:
        raise RuntimeError(f"{len(failed)} requests failed, one of them: {failed[0]}")
