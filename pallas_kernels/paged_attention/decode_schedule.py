"""Which worker of the decode kernel computes what: a balanced, contiguous share of (sequence, split, kv head) items.

A context is cut in blocks, a run of blocks is a split, and an item is one kv head of one split. The cut depends on the
sequence alone; only the choice of the worker depends on the batch, so results are independent of it bit for bit.
Everything here is a few small XLA ops on [B] and [workers, B] arrays. They don't depend on the layer: in an unrolled
model XLA computes them once a step.
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Int

ITEM_COST = 1
"""Cost of starting and finishing an item, in blocks."""

# columns of the table of sequences
TOKEN, LENGTH, FIRST, BLOCKS, PER_SPLIT, SPLITS, NEXT, SHARED = range(8)
# columns of the table of workers
SEQ, ITEM, COUNT, ROWS_END = range(4)


def decode_schedule(
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    page_tables: Int[Array, "B Pmax"],
    *,
    num_workers: int,
    kv_heads: int,
    block: int,
    min_split: int,
    unsplit: int,
    max_splits: int,
    sliding_window: int | None,
) -> tuple[Int[Array, "B 8"], Int[Array, "W 4"]]:
    """Tables of sequences and workers.

    sequences: row of the query, length, first token to read, blocks, blocks in a split, splits, next one with work,
    pages that begin it and begin a neighbour in the batch, too.
    workers: first sequence, first item in it (split-major, kv head minor), number of items, rows in use.
    """
    num_seqs = kv_lens.shape[0]
    index = jnp.arange(num_seqs, dtype=jnp.int32)
    length = jnp.where(q_start[1:] - q_start[:-1] == 1, kv_lens, 0)
    first = jnp.zeros_like(length)
    if sliding_window is not None:
        first = jnp.maximum(length - sliding_window, 0) // block * block
    blocks = -(-(length - first) // block)
    per = jnp.maximum(-(-blocks // max_splits), jnp.where(blocks * block <= unsplit, unsplit, min_split) // block)
    splits = -(-blocks // per)
    items = splits * kv_heads
    after = index[None, :] > index[:, None]
    following = jnp.min(jnp.where(after & (items > 0)[None, :], index[None, :], num_seqs), axis=1)
    shared = _shared_pages(page_tables)
    sequences = jnp.stack([q_start[:-1], length, first, blocks, per, splits, following, shared], axis=1)

    cost = kv_heads * (blocks + ITEM_COST * splits)
    cost_before = jnp.sum(jnp.where(after.T, cost[None, :], 0), axis=1)
    items_before = jnp.sum(jnp.where(after.T, items[None, :], 0), axis=1)
    total = jnp.sum(cost)
    worker = jnp.arange(num_workers + 1, dtype=jnp.int32)[:, None]
    share = total // num_workers * worker + total % num_workers * worker // num_workers
    # the first item that starts at or after the worker's share of the cost, within the sequence the share falls in
    rest = share - cost_before
    inside = (rest >= 0) & (rest < cost)
    full = per + ITEM_COST
    last = jnp.maximum(blocks - (splits - 1) * per, 0) + ITEM_COST
    before_last = (splits - 1) * kv_heads
    item = jnp.where(rest <= before_last * full, -(-rest // full), before_last - (before_last * full - rest) // last)
    seq = jnp.sum(jnp.where(inside, jnp.where(item == items, following, index), 0), axis=1)
    start = jnp.sum(jnp.where(inside, item + items_before, 0), axis=1)
    item = jnp.sum(jnp.where(inside & (item < items), item, 0), axis=1)
    count_all = jnp.sum(items)
    start = jnp.where(share[:, 0] >= total, count_all, start)
    count = start[1:] - start[:-1]
    workers = jnp.stack([seq[:-1], item[:-1], count, jnp.broadcast_to(q_start[-1], count.shape)], axis=1)
    return sequences.astype(jnp.int32), workers.astype(jnp.int32)


def _shared_pages(page_tables: Int[Array, "B Pmax"]) -> Int[Array, "B"]:
    """Leading pages that a sequence has in common with the one before or after it; in an engine's batches those of one
    adapter that begin alike stand together.
    """
    width = page_tables.shape[1]
    alike = page_tables[1:] == page_tables[:-1]
    with_next = jnp.min(jnp.where(alike, width, jnp.arange(width)), axis=1, initial=width)
    return jnp.maximum(jnp.pad(with_next, (0, 1)), jnp.pad(with_next, (1, 0)))


def sm_count() -> int:
    """Multiprocessors of the default device; 132 (H100, H200) where there is no GPU to ask."""
    return getattr(jax.devices()[0], "core_count", None) or 132
