"""The device side of the engine: parameters, page pool and compiled steps."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from typing import Any, Literal

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from pallas_kernels import Implementation
from sharding import WHOLE, ShardedTable
from slora_jax.adapter_rows import Table
from slora_jax.adapters import Adapter
from slora_jax.batch import Batch, Output, Sampling, State
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.errors import CapacityError
from slora_jax.memory import page_bytes
from slora_jax.model_config import ModelConfig
from slora_jax.parallel import Parallel
from slora_jax.placement import adapter_images, join_images, make_write, new_state
from slora_jax.sampling import sample
from slora_jax.sampling_batch import build_sampling
from slora_jax.step import Forward, Params, make_forward

Progress = Callable[[int, int, str], None]
_LOAD_BYTES = 16 << 20  # of adapter weights a device copy moves at a time


@contextlib.contextmanager
def device_memory_errors(what: str, remedy: str):
    """Turns the runtime's out-of-memory error into a CapacityError that names `what` and the remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CapacityError(f"not enough device memory for {what}; {remedy}") from error


def _with_last_tokens(forward: Forward) -> Callable[..., tuple[State, jax.Array]]:
    """A step that finds tokens the host does not know among those that were sampled last."""

    def step(params: Params, state: State, last: jax.Array, batch: Batch) -> tuple[State, jax.Array]:
        tokens = jnp.where(batch.tokens < 0, last[jnp.maximum(-1 - batch.tokens, 0)], batch.tokens)
        return forward(params, state, dataclasses.replace(batch, tokens=tokens))

    return step


def _sample_into(logits: jax.Array, sampling: Sampling, last: jax.Array, rows: jax.Array) -> tuple[Output, jax.Array]:
    output = sample(logits, sampling)
    return output, last.at[rows].set(output.tokens, mode="drop")


class Runner:
    """Runs steps of one model over one pool. Not thread-safe: the engine's loop owns it."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        dtype: jnp.dtype,
        num_pages: int,
        buckets: Buckets,
        max_model_len: int,
        max_rank: int,
        implementation: Implementation,
        loop: Literal["unroll", "scan"],
        parallel: Parallel | None = None,
    ):
        self.config = config
        self.params = params
        self.dtype = jnp.dtype(dtype)
        self.num_pages = num_pages
        self.parallel = parallel
        layout = parallel.layout if parallel else None
        self.builder = BatchBuilder(config.geometry, buckets, num_pages, max_model_len, layout, self._put_table)
        self.page_bytes = page_bytes(config, self.dtype, parallel)
        self._load_pages = max(1, _LOAD_BYTES // self.page_bytes)
        self._options: dict[str, Any] = dict(
            dtype=self.dtype, implementation=implementation, loop=loop, parallel=parallel
        )
        self._write = jax.jit(make_write(parallel), donate_argnums=0)
        self._sample = jax.jit(_sample_into)
        self.compiles = 0
        self.max_rank = 0
        self.require_rank(max_rank)
        self.reset()

    def reset(self) -> None:
        """Makes a new, empty pool. Raises CapacityError if it does not fit."""
        self.state = None
        size = self.num_pages * self.page_bytes / 2**30
        with device_memory_errors(f"a page pool of {size:.1f} GiB", "set page_pool_bytes lower"):
            self.state = jax.block_until_ready(new_state(self.config, self.num_pages, self.dtype, self.parallel))
        self.last_tokens = self._put(np.zeros(self.builder.buckets.max_seqs, np.int32), WHOLE)

    def require_rank(self, rank: int) -> bool:
        """Makes the steps take adapters up to `rank`. True if that means they will be compiled anew."""
        if rank <= self.max_rank:
            return False
        self.max_rank = max(8, 1 << (rank - 1).bit_length())
        forward = make_forward(self.config, max_rank=self.max_rank, **self._options)
        self._forward = jax.jit(_with_last_tokens(forward), donate_argnums=1)
        return True

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.parallel.mesh, spec) if self.parallel else None)

    def _put_table(self, table: Table) -> Table:
        specs = ShardedTable.specs() if self.parallel else jax.tree.map(lambda _: WHOLE, table)
        return jax.tree.map(self._put, table, specs)

    def load_adapter(self, adapter: Adapter, page_ids: Sequence[int]) -> None:
        """Writes an adapter's weights to its pages, a few pages at a time, without waiting for the device."""
        images = adapter_images(adapter, self.config, self.dtype, self.parallel)
        for start in range(0, len(page_ids), self._load_pages):
            ids = np.full(self._load_pages, self.num_pages, np.int32)
            n = min(self._load_pages, len(page_ids) - start)
            ids[:n] = page_ids[start : start + n]
            parts = []
            for image in images:
                part = np.zeros((self._load_pages, *image.shape[1:]), image.dtype)
                part[:n] = image[start : start + n]
                parts.append(part)
            self.state = self._write(self.state, ids, join_images(parts, self.parallel))

    def forward(self, batch: Batch) -> jax.Array:
        """Dispatches a step and returns its logits, still on the device. Tokens of the batch that are negative, -1 -
        row, are those that `sample` chose last for that row.
        """
        self.state, logits = self._forward(self.params, self.state, self.last_tokens, batch)
        return logits

    def sample(self, logits: jax.Array, sampling: Sampling, rows: np.ndarray) -> Output:
        """Dispatches the choice of tokens, which the device keeps for `rows` (int32 [R]; max_seqs: for none). Its
        results are on their way to the host; `fetch` waits for them.
        """
        output, self.last_tokens = self._sample(logits, sampling, self.last_tokens, rows)
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return output

    def fetch(self, output: Output | None, logits: jax.Array) -> Output | None:
        """Waits for a step and returns its results in numpy. None for a step that samples nothing."""
        if output is None:
            jax.block_until_ready(logits)
            return None
        return jax.device_get(output)

    def warm_up(self, *, adapters: bool, progress: Progress | None = None) -> None:
        """Compiles the steps of every bucket by running them on padding."""
        buckets = self.builder.buckets
        shapes = [(n, n, True) for n in buckets.seqs] + [(buckets.max_seqs, n, False) for n in buckets.tokens]
        for i, (seqs, tokens, decode_only) in enumerate(shapes):
            what = f"{'decode' if decode_only else 'prompt'} step of {tokens} tokens"
            if progress:
                progress(i, len(shapes), what)
            batch = self.builder.padding(seqs, tokens, decode_only=decode_only, use_adapters=adapters)
            remedy = "set max_step_tokens, max_seqs or page_pool_bytes lower"
            with device_memory_errors(f"a {what}", remedy):
                logits = self.forward(batch)
                nobody = np.full(logits.shape[0], buckets.max_seqs, np.int32)
                self.fetch(self.sample(logits, build_sampling([], logits.shape[0]), nobody), logits)
        if progress:
            progress(len(shapes), len(shapes), "done")

    def temp_bytes(self, batch: Batch) -> int:
        """Temporary device memory of the compiled step of this batch's shape, in bytes."""
        compiled = self._forward.lower(self.params, self.state, self.last_tokens, batch).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None, "the backend does not tell how much memory a program needs"
        return analysis.temp_size_in_bytes
