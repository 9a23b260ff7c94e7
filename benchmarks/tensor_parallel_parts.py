"""What benchmarks/tensor_parallel.py measures: decode steps, served requests, and what XLA made of the collectives.

A decode step is timed alone: a pool of random numbers stands for keys, values and adapters, because their values
change no time, and every sequence uses the next adapter in turn.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
import re
import tempfile
import time
from typing import Any, Literal

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from sharding import Layout
from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import Adapter, random_adapter
from slora_jax.adapters.shards import shard_adapter
from slora_jax.batch import Batch, State
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.loading import LoadedModel
from slora_jax.memory import device_memory, page_bytes, weight_bytes
from slora_jax.model_config import ModelConfig, param_specs
from slora_jax.page_pool import PagePool
from slora_jax.parallel import Parallel
from slora_jax.placement import adapter_pages
from slora_jax.sampling_batch import build_sampling
from slora_jax.seats import sequence_owner
from slora_jax.sequence import AdapterUse, Chunk
from slora_jax.sequence import Sequence as Seq
from slora_jax.step import compiler_options, make_batch_step
from slora_jax.traces import Setting, synthetic_trace

_MARGIN_BYTES = 4 << 30  # of a step's temporaries and fragmentation


def clones(config: ModelConfig, setting: Setting, count: int, dtype: Any) -> dict[str, Adapter]:
    """Adapters in the pool's sense, each with pages of its own; the host keeps one copy of each rank's weights."""
    made = {
        rank: random_adapter(config, rank, setting.targets, seed=rank, dtype=dtype)
        for rank in dict.fromkeys(setting.ranks[:count])
    }
    ranks = [setting.ranks[i % len(setting.ranks)] for i in range(count)]
    return {
        f"adapter-{i}": dataclasses.replace(made[r], digest=f"{i:064x}", weights_digest=f"{i:064x}")
        for i, r in enumerate(ranks)
    }


def seconds_per_call(call: Callable[[], Any], spend: float) -> float:
    """Seconds of a call that is dispatched many times before it is waited for: the best of three rounds."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(3, int(spend / 3 / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def copy_bandwidth(spend: float) -> float:
    """Bytes/s that one device reads and writes in the faster of a copy and of a negation, over a large array."""
    memory = device_memory()
    x = jnp.ones(min(1 << 30, memory[0] // 16) if memory else 1 << 22, jnp.bfloat16)
    ways = (jax.jit(jnp.copy), jax.jit(lambda x: -x))
    return max(2 * x.nbytes / seconds_per_call(lambda way=way: way(x), spend) for way in ways)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """A decode step of `seqs` sequences with `context` tokens each, on a pool of `num_pages` pages."""

    config: ModelConfig
    parallel: Parallel | None
    seqs: int
    context: int
    num_pages: int
    max_rank: int
    dtype: str
    use_adapters: bool
    implementation: Implementation
    loop: Literal["unroll", "scan"]

    @property
    def layout(self) -> Layout | None:
        return self.parallel.layout if self.parallel else None

    def batch(self, adapters: Sequence[Adapter]) -> Batch:
        """Sequence i uses adapter ``i % len(adapters)``; those of one adapter stand together."""
        pool = PagePool(self.num_pages)
        chunks = []
        for i in range(self.seqs):
            adapter = adapters[i * len(adapters) // self.seqs] if adapters else None
            use = None
            if adapter is not None:
                use = AdapterUse(adapter.digest, adapter_pages(adapter, self.config, self.parallel))
                if not pool.holds(adapter_owner(adapter.digest)):
                    pool.allocate(adapter_owner(adapter.digest), use.num_pages)
            seq = Seq(seq_id=i, tokens=[1] * self.context, prompt_len=1, max_tokens=self.context, adapter=use)
            pool.allocate(sequence_owner(seq), ceil_div(self.context, PAGE_TOKENS))
            chunks.append(Chunk(seq, self.context - 1, 1))
        batch, _ = self._builder().build(chunks, pool, {a.digest: a for a in adapters})
        return dataclasses.replace(batch, sampling=build_sampling([], self.seqs), use_adapters=self.use_adapters)

    def _builder(self) -> BatchBuilder:
        buckets = Buckets(seqs=(self.seqs,), tokens=(self.seqs,))
        return BatchBuilder(self.config.geometry, buckets, self.num_pages, self.context, self.layout)

    def _state_shape(self) -> State:
        elements = self.parallel.page_elements if self.parallel else self.config.geometry.page_elements
        shape = (self.config.num_layers, self.num_pages, elements)
        where = self.parallel.pool if self.parallel else None
        return State(pages=jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype), sharding=where))

    def compile(self, params: dict[str, jax.Array]) -> Any:
        """The compiled step, before its pool takes any memory: XLA needs room to try out matrix products."""
        step = make_batch_step(
            self.config,
            dtype=jnp.dtype(self.dtype),
            max_rank=self.max_rank,
            implementation=self.implementation,
            loop=self.loop,
            parallel=self.parallel,
        )
        padding = self._builder().padding(self.seqs, self.seqs, decode_only=True, use_adapters=self.use_adapters)
        padding = dataclasses.replace(padding, sampling=build_sampling([], self.seqs))
        program = jax.jit(step, donate_argnums=1, compiler_options=compiler_options())
        return program.lower(params, self._state_shape(), padding).compile()

    def random_state(self) -> State:
        shape = self._state_shape().pages
        layer = shape.shape[1:]

        u = jnp.uint32

        def body(i, pages):
            row, column = (lax.broadcasted_iota(u, layer, axis) for axis in range(2))
            hashed = (row * u(2654435761) + column * u(2246822519) + u(i) * u(3266489917)) * u(668265263)
            values = ((hashed >> 24).astype(shape.dtype) - 127.5) * jnp.asarray(1e-4, shape.dtype)
            return lax.dynamic_update_index_in_dim(pages, values, i, 0)

        def fill():
            return lax.fori_loop(0, shape.shape[0], body, jnp.zeros(shape.shape, shape.dtype))

        return State(pages=jax.jit(fill, out_shardings=shape.sharding)())

    def seconds(self, compiled, params, state: State, adapters: Sequence[Adapter], spend: float) -> tuple[float, State]:
        """Seconds a step, and the pool for the next measurement (each step gives its own away)."""
        batch = self.device_batch(compiled, adapters)

        def call():
            nonlocal state
            state, output = compiled(params, state, batch)
            return output.tokens

        return seconds_per_call(call, spend), state

    def device_batch(self, compiled: Any, adapters: Sequence[Adapter]) -> Batch:
        """The batch where the program wants it, so that no timing has a transfer in it."""
        batch = self.batch(adapters)
        return jax.device_put(batch, compiled.input_shardings[0][2])

    def floor_bytes(self, adapters: Sequence[Adapter]) -> int:
        """Bytes that the busiest device must read: weights, keys and values, and each adapter's tiles there once."""
        geometry = self.layout.local if self.layout else self.config.geometry
        itemsize = jnp.dtype(self.dtype).itemsize
        weights = weight_bytes(self.config, self.dtype, self.parallel)
        spec = param_specs(self.config)["embed"]
        if not self.config.tied_embeddings:  # an embedding table is not read but for a few rows
            weights -= spec.shape[0] * spec.shape[1] * itemsize // (self.layout.devices if self.layout else 1)
        kv = self.seqs * self.context * 2 * geometry.num_kv_heads * geometry.head_dim * self.config.num_layers
        return weights + kv * itemsize + sum(self._adapter_bytes(a) for a in adapters[: self.seqs])

    def _adapter_bytes(self, adapter: Adapter) -> int:
        if self.parallel is None:
            geometry = self.config.geometry
            widths = [geometry.in_tiles(m) + geometry.out_tiles(m) for m in range(7)]
            return int((adapter.granules * np.array(widths)).sum()) * 1024
        layout = self.parallel.layout
        shards = shard_adapter(adapter, layout)
        a = (shards.shrink_granules * np.array([layout.shrink.in_tiles(m) for m in range(7)])).sum(axis=(1, 2))
        b = (adapter.granules * np.array([layout.expand.out_tiles(m) for m in range(7)])).sum()
        return int(a.max() + b) * 1024


def free_bytes(config: ModelConfig, dtype: str, parallel: Parallel | None) -> int | None:
    """Memory of a device that a pool may take once the steps are compiled; None where the backend does not tell."""
    memory = device_memory()
    return None if memory is None else int(memory[0] * 0.97) - memory[1] - _MARGIN_BYTES


def tuning_bytes(config: ModelConfig, dtype: str, devices: int) -> int:
    """What XLA takes while it tries out matrix products: as much as the largest stacked weight."""
    largest = max(int(np.prod(s.shape)) for s in param_specs(config).values())
    return largest * jnp.dtype(dtype).itemsize // devices


_COLLECTIVE = re.compile(
    r"= (.*?) ((?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?)\("
)
_BACKEND = re.compile(r"backend_config=(\{.*\})")


def collectives(compiled: Any) -> list[dict[str, Any]]:
    """Every kind of collective in a compiled program: operation, result, how often, and XLA's configuration of it."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for line in compiled.as_text().splitlines():
        if found := _COLLECTIVE.search(line):
            result = re.sub(r"\{[^}]*\}", "", found[1]).strip()
            backend = _BACKEND.search(line)
            counts[found[2], result, backend[1] if backend else ""] += 1
    return [dict(operation=o, result=r, count=n, backend_config=b) for (o, r, b), n in counts.most_common()]


def kernel_times(call: Callable[[], Any], calls: int = 3, top: int = 25) -> list[dict[str, Any]]:
    """Milliseconds and launches a step of each kernel on the first GPU, largest first; [] where no GPU was traced."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out)
        files = sorted(Path(directory).rglob("*.xplane.pb"))
        totals: Counter[str] = Counter()
        launches: Counter[str] = Counter()
        for plane in (p for f in files for p in jax.profiler.ProfileData.from_file(str(f)).planes):
            if plane.name != "/device:GPU:0":
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    totals[event.name] += event.duration_ns
                    launches[event.name] += 1
    return [
        dict(kernel=name[:120], milliseconds=ns / calls / 1e6, launches=launches[name] / calls)
        for name, ns in totals.most_common(top)
    ]


def serve(
    model: LoadedModel,
    parallel: Parallel | None,
    adapters: dict[str, Adapter],
    *,
    requests: int,
    lengths: tuple[int, int],
    settings: EngineConfig,
) -> dict[str, Any]:
    """Requests/s of a burst with the lengths and adapters of S-LoRA's synthetic trace, compilation excluded."""
    trace = synthetic_trace(adapters=len(adapters), rate=requests, seconds=1, lengths=lengths)
    rng = np.random.default_rng(0)
    names = list(adapters)
    asked = [
        Request(
            None,
            None if t.adapter is None else names[t.adapter],
            SamplingParams(max_tokens=t.output_len, ignore_eos=True),
            rng.integers(0, model.config.vocab_size, t.prompt_len).tolist(),
        )
        for t in trace
    ]
    start = time.perf_counter()
    with Engine(model, settings, adapters, parallel) as engine:
        ready = time.perf_counter() - start
        start = time.perf_counter()
        outputs = engine.generate(asked)
        seconds = time.perf_counter() - start
        stats = engine.stats()
    tokens = sum(len(o.token_ids) for o in outputs)
    if not all(o.finish_reason == "length" for o in outputs):
        raise RuntimeError(f"a request failed: {next(o for o in outputs if o.finish_reason != 'length')}")
    return dict(
        requests_per_second=requests / seconds,
        answer_tokens_per_second=tokens / seconds,
        seconds=seconds,
        seconds_to_start=ready,
        steps=stats["steps"],
        preemptions=stats["preemptions"],
        adapter_loads=stats["adapter_loads"],
        num_pages=stats["num_pages"],
        pool_bytes=stats["num_pages"] * page_bytes(model.config, settings.resolved().dtype, parallel),
    )
