"""One whole step (all layers, lm_head, greedy sampling) on one GPU against the bytes that it must read.

    python -m benchmarks.decode_step --case 64x512x64 --profile --json out.json
    python -m benchmarks.decode_step --case 8x256x0p --case 8x256x8p --targets q,k,v,o,gate,up,down --json out.json

A case is SEQUENCES x CONTEXT x ADAPTERS: that many sequences of that length, spread over that many distinct adapters
(0: base model only). One token of each is computed; with a "p" at the end (prompts) all of them are. The batch stays on
the device, the pool is donated, and steps are dispatched back to back.
With --few-adapters, small steps whose adapters are few say so to their kernels (Batch.few_adapters).
Floor: bytes of weights, of keys and values and of the distinct adapters, over the measured copy bandwidth, or the base
model's operations over the measured rate of a large matrix product, whichever takes longer.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
import contextlib
import dataclasses
import fcntl
import glob
import json
from pathlib import Path
import tempfile
import time
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from benchmarks.kernels.bench_attention import ceilings
from benchmarks.record import environment
from pallas_kernels import MOST_FEW, few_ranks, small_for_few
from pallas_kernels.geometry import GROUPS, MODULES, PAGE_TOKENS, TILE_RANKS, ceil_div
from pallas_kernels.lora.arg_specs import LoraSpec
from pallas_kernels.lora.table import AdapterTable
from slora_jax.batch import Batch, State
from slora_jax.loading import load_model
from slora_jax.model_config import ModelConfig
from slora_jax.sampling_batch import build_sampling
from slora_jax.step import compiler_options, make_batch_step


@dataclasses.dataclass(frozen=True)
class Case:
    """seqs sequences of `context` tokens each, of which the last `query` are computed, over `adapters` adapters of
    `ranks` in turn.
    """

    seqs: int
    context: int
    adapters: int
    query: int = 1
    ranks: tuple[int, ...] = (16,)
    modules: tuple[str, ...] = ("q", "k", "v", "o")

    @classmethod
    def parse(cls, text: str, ranks: tuple[int, ...], modules: tuple[str, ...]) -> "Case":
        seqs, context, adapters = map(int, text.removesuffix("p").split("x"))
        query = context if text.endswith("p") else 1
        return cls(seqs, context, min(adapters, seqs), query, ranks, modules)

    def lora_spec(self, config: ModelConfig) -> LoraSpec:
        segments = [len(part) * self.query for part in np.array_split(np.arange(self.seqs), self.adapters)]
        ranks = tuple(self.ranks[i % len(self.ranks)] for i in range(self.adapters))
        return LoraSpec(geometry=config.geometry, segments=tuple(segments), ranks=ranks, modules=self.modules)


def step_bytes(case: Case, config: ModelConfig, params: dict[str, jax.Array]) -> dict[str, int]:
    """Bytes that one step must read: weights (of the embedding only what is looked up), keys and values, adapters."""
    weights = sum(p.nbytes for name, p in params.items() if name != "embed" or config.tied_embeddings)
    kv = case.seqs * case.context * 2 * config.kv_size * config.num_layers * 2
    spec = case.lora_spec(config) if case.adapters else None
    lora = sum(sum(spec.weight_bytes(group)) for group in GROUPS) * config.num_layers if spec else 0
    return dict(weights=weights, kv=kv, adapters=lora)


def step_flops(case: Case, config: ModelConfig) -> int:
    """Operations of the base model in one step: matrix products, and attention to the tokens before."""
    g, tokens = config.geometry, case.seqs * case.query
    layer = sum(a * b for a, b in zip(g.in_sizes, g.out_sizes, strict=True))
    head = case.seqs * config.hidden_size * config.vocab_size
    seen = case.seqs * case.query * (2 * case.context - case.query + 1) // 2
    return 2 * (tokens * layer * config.num_layers + head + 2 * seen * config.q_size * config.num_layers)


def make_batch(case: Case, config: ModelConfig) -> tuple[Batch, int]:
    """The batch of a case, with pages in random order, and the number of pages that the pool needs."""
    g, n = config.geometry, case.seqs
    per_seq = ceil_div(case.context, PAGE_TOKENS)
    kv_pages = n * per_seq
    rng = np.random.default_rng(0)
    if case.adapters:
        spec = case.lora_spec(config)
        layout = spec.layout()
        adapter_pages = int(layout["num_pages"].sum())
        seg_start, rows = np.cumsum([0, *spec.segments]), case.adapters
    else:
        layout, adapter_pages, seg_start, rows = None, 0, np.array([0, n * case.query]), 1
    num_pages = kv_pages + adapter_pages
    order = rng.permutation(num_pages).astype(np.int32)
    tables = order[:kv_pages].reshape(n, per_seq)
    empty = np.zeros((rows, g.num_layers), np.int32)
    zeros = np.zeros((rows, g.num_layers, len(MODULES)), np.int32)
    seq = np.repeat(np.arange(n), case.query)
    position = np.tile(np.arange(case.context - case.query, case.context, dtype=np.int32), n)
    q_start = np.arange(n + 1, dtype=np.int32) * case.query
    batch = Batch(
        tokens=rng.integers(3, config.vocab_size, len(seq)).astype(np.int32),
        positions=position,
        page_ids=tables[seq, position // PAGE_TOKENS],
        slots=position % PAGE_TOKENS,
        q_start=q_start,
        kv_lens=np.full(n, case.context, np.int32),
        page_tables=tables,
        seg_start=seg_start.astype(np.int32),
        seg_adapter=np.arange(rows, dtype=np.int32) if case.adapters else np.full(1, -1, np.int32),
        adapters=AdapterTable(
            pages=order[kv_pages:] if adapter_pages else np.zeros(1, np.int32),
            page_start=layout["page_start"].astype(np.int32) if layout else np.zeros(rows, np.int32),
            tile_start=layout["tile_start"] if layout else empty,
            granules=layout["granules"] if layout else zeros,
            scaling=np.ones(zeros.shape, np.float32),
        ),
        logit_rows=q_start[1:] - 1,
        sampling=build_sampling([], n),
        max_query=case.query,
        use_adapters=bool(case.adapters),
    )
    return batch, num_pages


def has_few_adapters(batch: Batch, config: ModelConfig) -> bool:
    """Whether Batch.few_adapters would hold for a batch of make_batch, in which each segment has its own adapter."""
    ranks = few_ranks(batch.adapters.granules * TILE_RANKS).sum(axis=0).max()
    is_small = len(batch.tokens) > 1 and small_for_few(len(batch.tokens), config.geometry)
    return batch.use_adapters and is_small and bool(ranks <= MOST_FEW)


def random_pages(config: ModelConfig, num_pages: int, dtype: Any) -> jax.Array:
    """A pool of small random numbers: keys, values and weights alike."""
    shape = (num_pages, config.geometry.page_elements)

    @jax.jit
    def fill(keys):
        def layer(key):
            return (jax.random.bits(key, shape, jnp.uint8).astype(dtype) - 127.5) * jnp.asarray(2e-4, dtype)

        return jax.lax.map(layer, keys)

    return fill(jax.random.split(jax.random.key(0), config.num_layers))


def kernel_times(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Kernel name -> (seconds, launches) on the GPU while `run` runs, from the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        found = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        total: dict[str, list[float]] = defaultdict(list)
        for plane in jax.profiler.ProfileData.from_file(found[0]).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        total[event.name].append(event.duration_ns * 1e-9)
    return {name: (sum(times), len(times)) for name, times in total.items()}


@contextlib.contextmanager
def gpu_turn(path: Path | None):
    """Waits for the other processes that share the file: one runs on the GPU while the others compile."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(
    case: Case, config: ModelConfig, params, args, found: dict[str, float], programs: dict[Case, Any]
) -> dict[str, Any]:
    """programs: what was compiled, by case; this one's is added if it is new, and if not, compiling takes no time."""
    dtype = params["embed"].dtype
    batch, num_pages = make_batch(case, config)
    batch = dataclasses.replace(batch, few_adapters=args.few_adapters and has_few_adapters(batch, config))
    state = State(pages=random_pages(config, num_pages, dtype))
    batch = jax.device_put(batch)
    start = time.perf_counter()
    if case not in programs:
        options: dict[str, Any] = dict(dtype=dtype, implementation=args.implementation, loop=args.loop)
        if case.adapters:
            options |= dict(max_rank=max(case.ranks), lora_groups=case.lora_spec(config).groups)
        step = make_batch_step(config, **options)
        program = jax.jit(step, donate_argnums=1, compiler_options=compiler_options())
        programs[case] = program.lower(params, state, batch).compile()
    compiled = programs[case]
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def run(steps: int) -> float:
        nonlocal state, output
        start = time.perf_counter()
        for _ in range(steps):
            state, output = compiled(params, state, batch)
        jax.block_until_ready(output)
        return (time.perf_counter() - start) / steps

    output = None
    with gpu_turn(args.turns):
        run(3)
        times = [run(args.steps) for _ in range(5)]
        kernels = kernel_times(lambda: run(3)) if args.profile else {}
    seconds = float(np.median(times))
    moved = step_bytes(case, config, params)
    floor = max(sum(moved.values()) / found["copy"], step_flops(case, config) / found["gemm"])
    result: dict[str, Any] = dict(
        case=dataclasses.asdict(case),
        implementation=args.implementation,
        few_adapters=batch.few_adapters,
        step_ms=seconds * 1e3,
        floor_ms=floor * 1e3,
        ratio=seconds / floor,
        bytes=moved,
        flops=step_flops(case, config),
        compile_seconds=compile_seconds,
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        tokens=np.asarray(output.tokens).tolist(),  # to compare variants
    )
    if args.profile:
        by_time = sorted(kernels.items(), key=lambda item: -item[1][0])
        result["kernels"] = [
            dict(name=name, ms=s / 3 * 1e3, launches=n / 3, us_each=s / n * 1e6) for name, (s, n) in by_time
        ]
        result["kernels_ms"] = sum(k["ms"] for k in result["kernels"])
    del state
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", help="named shape of the base model")
    parser.add_argument("--case", action="append", help="as 64x512x64 or 8x256x8p; may be repeated")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--targets", default="q,k,v,o")
    parser.add_argument("--few-adapters", action="store_true", help="small steps say so if their adapters are few")
    parser.add_argument("--implementation", default="auto", choices=("auto", "mosaic", "xla"))
    parser.add_argument("--loop", default="unroll", choices=("unroll", "scan"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="list the step's kernels")
    parser.add_argument("--turns", type=Path, help="a file that processes which measure in turn have in common")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with gpu_turn(args.turns):
        found = ceilings()
    copy = found["copy"]
    print(f"copy {copy / 1e12:.2f} TB/s on {jax.devices()[0].device_kind}", flush=True)
    model = load_model(f"random:{args.shape}", dtype=args.dtype)
    results: list[dict[str, Any]] = []
    programs: dict[Case, Any] = {}
    for text in args.case or ("64x512x64", "64x512x0", "1x512x1", "256x256x256"):
        case = Case.parse(text, tuple(map(int, args.ranks.split(","))), tuple(args.targets.split(",")))
        result = measure(case, model.config, model.params, args, found, programs)
        results.append(result)
        print(
            f"{text:14s} {result['step_ms']:8.3f} ms  floor {result['floor_ms']:7.3f}  x{result['ratio']:.3f}  "
            f"compile {result['compile_seconds']:.0f} s  temp {(result['temp_bytes'] or 0) / 2**20:.0f} MiB",
            flush=True,
        )
        for kernel in result.get("kernels", [])[:40]:
            count = f"{kernel['launches']:6.0f} x {kernel['us_each']:8.2f} us"
            print(f"    {kernel['ms']:8.3f} ms {count}  {kernel['name'][:90]}")
        if args.json:  # after every case: a run cut short leaves what it has
            args.json.write_text(
                json.dumps(
                    dict(environment=environment(), ceilings=found, copy=copy, shape=args.shape, results=results),
                    indent=1,
                )
                + "\n"
            )


if __name__ == "__main__":
    main()
