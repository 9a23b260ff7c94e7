"""What benchmarks/tensor_parallel.py measures: a model in several layouts, its adapters, its pool and its programs.

All layouts share one number of pages and one set of shapes, so each needs one program a shape: decode steps and served
bursts run the same ones. They are compiled before the weights exist, since compiling needs shapes only.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import fcntl
import os
import time
from typing import Any, Literal

import jax
from jax import numpy as jnp
from jax.sharding import SingleDeviceSharding

from pallas_kernels import GROUPS, MODULES
from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from sharding import WHOLE, CostModel, Shards, make_mesh, partition
from slora_jax import EngineConfig, ModelConfig
from slora_jax.adapters import Adapter, random_adapter
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.layout_choice import auto_layout
from slora_jax.loading import LoadedModel, load_model
from slora_jax.loading.random import compile_random_params
from slora_jax.memory import device_memory, page_bytes, step_options, weight_bytes
from slora_jax.model_config import param_specs
from slora_jax.parallel import Parallel, make_parallel, param_shards
from slora_jax.placement import HostImage, HostImages, adapter_pages
from slora_jax.program_shapes import StepShape
from slora_jax.programs import Programs
from slora_jax.shapes import named_shape
from slora_jax.step import compiler_options
from slora_jax.traces import SETTINGS, Setting

MODELS = {
    setting.shape: setting
    for setting in (
        SETTINGS["S6"],
        SETTINGS["S5"],
        Setting("llama-3.1-70b", (16,), MODULES),
        Setting("tiny-gqa", (8, 16), MODULES),
    )
}
LAYOUTS = ("base", "comm-free", "s-lora", "auto")
_MARGIN_BYTES = 3 << 30  # of steps' temporaries and fragmentation
_THREADS = 24  # compiling at once; XLA works without the interpreter's lock

Key = tuple[str, ...]  # "base", or the layouts of the groups that the adapters target


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


class SharedImages(HostImages):
    """Host images of which clones share one: hundreds of adapters in the pool, a few in host memory."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._made: dict[int, HostImage] = {}

    def make(self, adapter: Adapter) -> HostImage:
        key = id(adapter.weights)
        if key not in self._made:
            self._made[key] = super().make(adapter)
        return self._made[key]


class Subject:
    """A model on a mesh in every layout that is compared."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.name = args, name
        self.setting, self.config = MODELS[name], named_shape(name)
        self.counts = sorted(set(args.adapters))
        self.adapters = clones(self.config, self.setting, max(self.counts), args.dtype)
        self.groups = next(iter(self.adapters.values())).groups
        # see EngineConfig.loop; compiling unrolled XLA kernels for a CPU would take minutes
        self.loop: Literal["unroll", "scan"] = "unroll" if jax.default_backend() == "gpu" else "scan"
        self.mesh = make_mesh(args.tp)
        self.buckets = Buckets(seqs=tuple(sorted({*args.seqs, args.max_seqs})), tokens=(args.step_tokens,))
        self.max_model_len = 2 * args.lengths[1]
        with quiet(args.lock):
            self.tuning_seconds = self._tune()
            self.cost = CostModel.measure(self.mesh) if args.tp > 1 else CostModel()
        self.parallels = {(layout, n): self._parallel(layout, n) for layout in self.layouts() for n in self.counts}
        self.num_pages = self._num_pages()
        self.programs: dict[Key, Programs] = {}
        self.failed: dict[tuple[Key, StepShape], Exception] = {}
        self.images: dict[Key, SharedImages] = {}
        self._model: LoadedModel | None = None

    def layouts(self) -> tuple[str, ...]:
        return tuple(x for x in LAYOUTS if x in self.args.layouts) if self.args.tp > 1 else ("base", "one-gpu")

    def _parallel(self, layout: str, count: int) -> Parallel | None:
        if self.args.tp == 1:
            return None
        if layout in ("base", "comm-free"):
            return make_parallel(self.config, self.mesh, "comm-free")
        if layout == "s-lora":
            return make_parallel(self.config, self.mesh, "s-lora")
        lora = auto_layout(  # what an engine of these settings takes at its start
            self.config,
            self.mesh,
            dtype=self.args.dtype,
            max_seqs=self.args.max_seqs,
            max_model_len=self.max_model_len,
            adapters=count,
            rank=max(self.setting.ranks),
            groups=self.groups,
            pool_bytes=None,
            model=self.cost,
        )
        return make_parallel(self.config, self.mesh, lora)

    def key(self, layout: str, count: int) -> Key:
        """What a layout's programs depend on."""
        parallel = self.parallels[layout, count]
        if layout == "base" or parallel is None:
            return (layout,)
        return tuple(x for group, x in zip(GROUPS, parallel.layout.lora, strict=True) if group in self.groups)

    def same(self, count: int) -> str | None:
        """The layout that "auto" comes to, if it is the same for all groups that have adapters."""
        lora = set(self.key("auto", count))
        return lora.pop() if len(lora) == 1 else None

    def settings(self) -> EngineConfig:
        """Of every served burst."""
        return EngineConfig(
            dtype=self.args.dtype,
            max_seqs=self.args.max_seqs,
            max_step_tokens=self.args.step_tokens,
            seq_buckets=self.buckets.seqs,
            token_buckets=self.buckets.tokens,
            max_model_len=self.max_model_len,
            page_pool_bytes=self.num_pages * self.page_bytes,
            host_adapter_bytes=1 << 50,  # clones share an image
            adapter_step_bytes=None,
            tensor_parallel=self.args.tp,
            implementation=self.args.implementation,
            loop=self.loop,
            compile_cache_dir="",
        )

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.config, self.args.dtype, next(iter(self.parallels.values())))

    def _num_pages(self) -> int:
        """The same for all layouts and every start: what a device has beside the weights, if there is use for it."""
        memory = device_memory()
        need = max(sum(self._pages(a, key) for a in self.adapters.values()) for key in self.parallels)
        pages = self.args.max_seqs * ceil_div(self.max_model_len, PAGE_TOKENS) + need
        if memory is not None:
            first = next(iter(self.parallels.values()))
            free = int(memory[0] * 0.97) - weight_bytes(self.config, self.args.dtype, first) - _MARGIN_BYTES
            pages = min(pages, free // self.page_bytes)
        if pages < self.args.max_seqs:
            raise ValueError(f"{self.name} leaves no room for {self.args.max_seqs} sequences on {self.args.tp} GPUs")
        return pages - pages % (1 << max(0, pages.bit_length() - 8))

    def _pages(self, adapter: Adapter, key: tuple[str, int]) -> int:
        return 0 if key[0] == "base" else adapter_pages(adapter, self.config, self.parallels[key])

    def used(self, layout: str, count: int, seqs: int) -> list[Adapter]:
        return [] if layout == "base" else list(self.adapters.values())[: min(count, seqs)]

    def context(self, seqs: int) -> int:
        """Tokens of each sequence of a decode step, the same for all layouts: up to --context, as many as leave room
        for the adapters of every layout in which there is room for any.
        """
        rooms = []
        for layout, n in self.parallels:
            need = sum(self._pages(a, (layout, n)) for a in self.used(layout, n, seqs))
            rooms.append((self.num_pages - need) // seqs * PAGE_TOKENS)
        return min([self.args.context, self.max_model_len, *(room for room in rooms if room >= 4 * PAGE_TOKENS)])

    def shapes(self, layout: str, seqs: list[int], served: bool) -> list[StepShape]:
        """Steps that a layout needs."""
        sizes, most = (self.buckets.seqs if served else seqs), self.args.max_seqs
        found = [StepShape(n, n, n, True, layout != "base") for n in sizes]
        mixed = StepShape(most, self.args.step_tokens, most, False, layout != "base")
        return [*found, mixed] if served else found

    def compile(self, wanted: dict[tuple[str, int], list[StepShape]]) -> None:
        """Compiles steps of layouts, all side by side. What fails is kept in `failed`."""
        jobs: dict[tuple[Key, StepShape], None] = {}
        for (layout, n), shapes in wanted.items():
            key = self.key(layout, n)
            self.programs.setdefault(key, self._programs(layout, n))
            jobs |= {(key, shape): None for shape in shapes}
        with ThreadPoolExecutor(min(_THREADS, 4 * (os.cpu_count() or 1))) as pool:
            first = next(iter(self.parallels.values()))
            shards = param_shards(self.config, first) if first else None
            pool.submit(compile_random_params, self.config, self.args.dtype, shards)
            made = {job: pool.submit(self.programs[job[0]].compile, job[1]) for job in jobs}
            for key, parallel in {self.key(*x): self.parallels[x] for x in wanted if x[0] != "base"}.items():
                pool.submit(self._image, key, parallel)
        for job, future in made.items():
            if error := future.exception():
                assert isinstance(error, Exception)
                self.failed[job] = error

    def _image(self, key: Key, parallel: Parallel | None) -> None:
        size = 1 << (max(1, self.settings().adapter_chunk_bytes // self.page_bytes).bit_length() - 1)
        images = self.images.setdefault(key, SharedImages(self.config, self.args.dtype, size, parallel))
        for adapter in self.adapters.values():
            images.make(adapter)

    def _programs(self, layout: str, count: int) -> Programs:
        parallel = self.parallels[layout, count]
        shapes = () if layout == "base" else tuple(self.adapters.values())
        options = step_options(self.config, self.settings().resolved(), shapes, parallel)
        return Programs(options, self._param_shapes(self.config, parallel), self._builder(self.num_pages, parallel))

    def _builder(self, num_pages: int, parallel: Parallel | None) -> BatchBuilder:
        layout = parallel.layout if parallel else None
        return BatchBuilder(self.config.geometry, self.buckets, num_pages, self.max_model_len, layout)

    def _param_shapes(self, config: ModelConfig, parallel: Parallel | None) -> dict[str, Any]:
        """The parameters without their values."""
        dtype, found = jnp.dtype(self.args.dtype), {}
        shards = param_shards(config, parallel) if parallel else {}
        for name, spec in param_specs(config).items():
            where = shards.get(name, SingleDeviceSharding(jax.devices()[0]))
            if isinstance(where, Shards):
                found[name] = jax.ShapeDtypeStruct(where.shape(spec.shape), dtype, sharding=where.sharding)
            else:
                found[name] = jax.ShapeDtypeStruct(spec.shape, dtype, sharding=where)
        return found

    def _tune(self) -> float:
        """XLA tries out ways to compute a matrix product when it compiles one. That all layouts get the same ones, and
        none is tried out while another process uses the GPU, they are compiled first, alone: JAX's compile cache keeps
        what XLA found. Seconds that took.
        """
        if jax.default_backend() != "gpu":
            return 0.0
        start = time.monotonic()
        first = make_parallel(self.config, self.mesh) if self.args.tp > 1 else None
        rows = (*self.buckets.seqs, *self.buckets.tokens)
        with ThreadPoolExecutor(len(rows)) as pool:
            list(pool.map(lambda n: self._products(first, n).compile(), rows))
        return time.monotonic() - start

    def _products(self, parallel: Parallel | None, rows: int) -> jax.stages.Lowered:
        """The matrix products of a layer and of the logits, as in a step of `rows` tokens."""
        names = ("wqkv", "wo", "wgu", "wdown", "lm_head")
        params = {name: x for name, x in self._param_shapes(self.config, parallel).items() if name in names}
        heads, mlp = (
            parallel.layout.columns(axis).size if parallel else self.config.in_sizes[m]
            for axis, m in (("heads", 3), ("mlp", 6))
        )
        widths = (self.config.hidden_size, heads, self.config.hidden_size, mlp, self.config.hidden_size)
        split = (False, True, False, True, False)
        tokens = rows if rows == 1 else 8 * ceil_div(rows, 8)  # as Llama pads them
        lengths = (tokens,) * 4 + (rows,)
        xs = [jax.ShapeDtypeStruct(shape, jnp.dtype(self.args.dtype)) for shape in zip(lengths, widths, strict=True)]

        def products(params, xs):
            *inputs, hidden = xs
            found = [jnp.dot(x, params[name][1]) for x, name in zip(inputs, names, strict=False)]
            least = 0 if self.args.dtype == "float32" else 8  # as Llama.logits
            hidden = jnp.pad(hidden, ((0, max(0, least - rows)), (0, 0)))
            return *found, jnp.einsum("rh,vh->rv", hidden, params["lm_head"], preferred_element_type=jnp.float32)

        if parallel:
            specs = {name: x.sharding.spec for name, x in params.items()}
            columns = partition(None, "heads")
            inputs = [columns if s else WHOLE for s in split]
            products = jax.shard_map(
                products, mesh=parallel.mesh, in_specs=(specs, inputs), out_specs=columns, check_vma=False
            )
        return jax.jit(products, compiler_options=compiler_options()).lower(params, xs)

    @property
    def model(self) -> LoadedModel:
        if self._model is None:
            start = time.monotonic()
            first = next(iter(self.parallels.values()))
            shards = param_shards(self.config, first) if first else None
            self._model = load_model(f"random:{self.name}", dtype=self.args.dtype, shardings=shards)
            print(f"{self.name} made in {time.monotonic() - start:.1f} s", flush=True)
        return self._model


@contextlib.contextmanager
def quiet(path: str | None):
    """Alone on the GPUs among the processes that were given the same lock file."""
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
