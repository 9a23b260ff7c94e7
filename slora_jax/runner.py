"""The device side of the engine: parameters, page pool and compiled steps."""

from collections.abc import Sequence, Set
import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from pallas_kernels import GROUPS
from sharding import WHOLE, ShardedTable
from slora_jax.adapter_rows import Table
from slora_jax.batch import Batch, Output, Sampling
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.errors import CapacityError
from slora_jax.free_places import keep_free
from slora_jax.memory import device_memory, page_bytes
from slora_jax.placement import HostImage, HostImages, make_write, new_state
from slora_jax.program_shapes import StepOptions, StepShape
from slora_jax.programs import Programs, Progress
from slora_jax.sampling_batch import build_sampling
from slora_jax.staging import Staging
from slora_jax.step import Params

_SMALL_STEP = 256
"""Tokens of steps that end before a host could have entered all their kernels into a CUDA graph anew."""

Chunks = Sequence[tuple[int, jax.Array | np.ndarray]]
"""Consecutive pages of an adapter's image, each piece with the number of its first page."""


@contextlib.contextmanager
def device_memory_errors(what: str, remedy: str):
    """Turns the runtime's out-of-memory error into a CapacityError that names `what` and the remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CapacityError(f"not enough device memory for {what}; {remedy}") from error


class Runner:
    """Runs steps of one model over one pool. Not thread-safe: the engine's loop owns it.

    There is no pool before `reset` makes one: programs can be compiled first, and take the memory that they need.

    cache_dir: where compiled programs are kept between runs; None keeps none. deterministic, few_adapters: see
    BatchBuilder.
    """

    def __init__(
        self,
        options: StepOptions,
        params: Params,
        *,
        num_pages: int,
        buckets: Buckets,
        max_model_len: int,
        cache_dir: Path | None = None,
        deterministic: bool = False,
        few_adapters: bool = False,
        chunk_bytes: int = 64 << 20,
    ):
        self.params = params
        self.num_pages = num_pages
        self.config, self.dtype, self.parallel = options.config, options.dtype, options.parallel
        layout = self.parallel.layout if self.parallel else None
        # batches travel to other processes as they are, so there the table stays in numpy
        put = self._stage_table if jax.process_count() == 1 else None
        place = (self.config.geometry, buckets, num_pages, max_model_len, layout, put)
        self.builder = BatchBuilder(*place, deterministic=deterministic, few_adapters=few_adapters)
        self.page_bytes = page_bytes(self.config, self.dtype, self.parallel)
        self.chunk_pages = 1 << (max(1, chunk_bytes // self.page_bytes).bit_length() - 1)
        self.images = HostImages(self.config, self.dtype, self.chunk_pages, self.parallel)
        self._write = jax.jit(make_write(self.parallel, options.implementation), donate_argnums=0)
        self._writers: dict[int, jax.stages.Compiled] = {}  # by pages
        whole = NamedSharding(self.parallel.mesh, WHOLE) if self.parallel else None
        self._guards: list[jax.Array] = []
        self._staging = Staging(lambda array: self._put(array, WHOLE), self._put_table, whole)
        self._cache_dir = cache_dir
        self._options = options
        self._compiles = 0  # of programs that were given up
        self.programs = Programs(options, params, self.builder, cache_dir)
        self.state: Any = None

    def reset(self) -> None:
        """Makes a new, empty pool. Raises CapacityError if it does not fit."""
        self.state = None
        size = self.num_pages * self.page_bytes / 2**30
        with device_memory_errors(f"a page pool of {size:.1f} GiB", "set page_pool_bytes lower"):
            self.state = jax.block_until_ready(new_state(self.config, self.num_pages, self.dtype, self.parallel))
        self.last_tokens = self._put(np.zeros(self.builder.buckets.max_seqs, np.int32), WHOLE)

    @property
    def max_rank(self) -> int:
        """Up to which rank of a module steps take adapters."""
        return self._options.max_rank

    @property
    def compiles(self) -> int:
        """Programs that were compiled because a step needed them."""
        return self._compiles + self.programs.compiles

    def require_adapters(self, rank: int, groups: Set[str]) -> bool:
        """Makes the steps take adapters up to `rank` that target modules of `groups`. True if that means they will be
        compiled anew.
        """
        groups = groups | set(self._options.lora_groups)
        if rank <= self.max_rank and len(groups) == len(self._options.lora_groups):
            return False
        self._compiles += self.programs.compiles
        self._options = dataclasses.replace(
            self._options,
            max_rank=max(self.max_rank, 1 << (rank - 1).bit_length()),
            lora_groups=tuple(group for group in GROUPS if group in groups),
        )
        self.programs = Programs(self._options, self.params, self.builder, self._cache_dir)
        return True

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.parallel.mesh, spec) if self.parallel else None)

    def _put_table(self, table: Table) -> Table:
        specs = ShardedTable.specs() if self.parallel else jax.tree.map(lambda _: WHOLE, table)
        return jax.tree.map(self._put, table, specs)

    def _stage_table(self, table: Table, rows: Sequence[int]) -> Table:
        return self._staging.table(table, rows)

    def send(self, image: HostImage, start: int, stop: int) -> Chunks:
        """Begins to copy pages `start` to `stop` of an adapter to the device, for `write_adapter`; returns at once."""
        return [(at, self._place(chunk)) for at, chunk in image.between(start, stop)]

    def write_adapter(self, chunks: Chunks, page_ids: Sequence[int]) -> None:
        """Writes pieces of an adapter's image to its pages, which are all its ids, without waiting for the device. They
        were sent, or lie in host memory still: then the next is on its way while one is written, and no more, so that
        an adapter of any size takes the device's memory for two.
        """
        before: tuple[int, jax.Array | np.ndarray] | None = None
        for at, chunk in chunks:
            placed = at, self._place(chunk)
            if before:
                self._write_piece(page_ids, *before)
            before = placed
        if before:
            self._write_piece(page_ids, *before)

    def _place(self, chunk: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Begins to copy a piece to the device, if it is not there."""
        return self.images.to_device(chunk)

    def _write_piece(self, page_ids: Sequence[int], at: int, chunk: jax.Array | np.ndarray) -> None:
        self._write_chunk(page_ids[at : at + chunk.shape[0]], chunk)

    def put(self, batch: Batch) -> Batch:
        """Begins to copy a batch to the device, in place of the last one of its shape, whose step must have been
        dispatched.

        What is sent after it arrives after it: a copy may begin when what was dispatched before is done, so adapters
        would otherwise begin with the batch, and hold up its step.
        """
        return self._staging.batch(batch)

    def _write_chunk(self, page_ids: Sequence[int], chunk: jax.Array | np.ndarray) -> None:
        args = (self.state, np.array(page_ids, np.int32), self.images.to_device(chunk))
        write = self._writers.get(len(page_ids))
        if write is None:
            self._compiles += 1
            write = self._writers[len(page_ids)] = self._write.lower(*args).compile()
        self.state = write(*args)

    def forward(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Dispatches a step and returns its logits, and its rows' hidden states if the batch asks for them, still on
        the device. Tokens of the batch that are negative, -1 - row, are those that `sample` chose last for that row.
        """
        self.state, logits, hidden = self.programs.forward(self.params, self.state, self.last_tokens, batch)
        return logits, hidden

    def sample(self, logits: jax.Array, sampling: Sampling, rows: np.ndarray) -> Output:
        """Dispatches the choice of tokens, which the device keeps for `rows` (int32 [R]; max_seqs: for none). Its
        results are on their way to the host; `fetch` waits for them.
        """
        output, self.last_tokens = self.programs.sample(logits, sampling, self.last_tokens, rows)
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return output

    def keep(self, sampling: Sampling) -> Sampling:
        """Brings parameters of many steps to the device, or to all of them: from numpy they would go there in each."""
        return jax.tree.map(lambda array: self._put(array, WHOLE), sampling)

    def fetch(self, output: Output | None, logits: jax.Array) -> Output | None:
        """Waits for a step and returns its results in numpy. None for a step that samples nothing."""
        if output is None:
            jax.block_until_ready(logits)
            return None
        return jax.tree.map(np.asarray, output)  # device_get without its search for further kinds of leaves

    def warm_up(
        self,
        *,
        adapters: bool,
        base: bool = True,
        embeddings: bool = False,
        greedy_only: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Compiles what is not compiled yet, and runs every step once on padding: a program's first run is slow, too.
        What is alive then is left out of Python's garbage collection (gc.freeze): looking through what compiling leaves
        took 0.6 s, in the midst of serving.

        Arguments as in Programs.compile_ahead. Raises CapacityError if a step does not fit in the device's memory.
        """
        wanted = dict(adapters=adapters, base=base, embeddings=embeddings, greedy_only=greedy_only)
        self.programs.compile_ahead(**wanted, progress=progress)
        for shape in self.programs.compiled_steps():  # first, as XLA drops its CUDA graphs when it loads a program
            self.put(self.programs.padding(shape))
        for shape in self.programs.compiled_steps():
            remedy = "set max_step_tokens, max_seqs or page_pool_bytes lower"
            with device_memory_errors(f"a {shape}", remedy):
                logits, _ = self.forward(self.put(self.programs.padding(shape)))
                if shape.rows <= self.builder.buckets.max_seqs:
                    nobody = np.full(shape.rows, self.builder.buckets.max_seqs, np.int32)
                    self.fetch(self.sample(logits, build_sampling([], shape.rows), nobody), logits)
                jax.block_until_ready(logits)
        if adapters:  # the programs that copy adapters to pages; ids past the end are dropped
            compiles, size = self._compiles, self.chunk_pages
            while size:
                if size <= self.num_pages:
                    self._write_chunk([self.num_pages] * size, self.images.zeros(size))
                size //= 2
            self._compiles = compiles
        self._keep_free(adapters)
        gc.collect()
        gc.freeze()

    def _keep_free(self, adapters: bool) -> None:
        """See slora_jax/free_places.py. Memory is taken from what the pool left for fragmentation."""
        self._guards = []
        memory = device_memory()
        if memory is None or jax.process_count() > 1:
            return
        limit, used = memory
        wanted = self.programs.buffers(_SMALL_STEP)
        if adapters:  # pieces that are written, and those that are sent meanwhile
            size = self.chunk_pages
            while size:
                wanted[size * self.page_bytes] += 2
                size //= 2
        budget = min(limit // 64, (limit - used - self.programs.temp_bytes()) // 2)
        self._guards = keep_free(wanted, budget, lambda array: self._put(array, WHOLE))

    def close(self) -> None:
        """Ends what steps need; a Runner on its own needs nothing."""

    def temp_bytes(self, batch: Batch) -> int:
        """Temporary device memory of the compiled step of this batch's shape, in bytes."""
        shape = StepShape.of(batch)
        self.programs.compile(shape)
        return self.programs.temp_bytes(shape)
