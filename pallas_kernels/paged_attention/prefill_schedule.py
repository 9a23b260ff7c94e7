"""Blocks of query tokens for the prefill kernel: a chunk is cut from its first token; the longest blocks run first."""

from jax import numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.geometry import ceil_div

# columns of the table of blocks
SEQ, TOKEN, COUNT, POSITION, FIRST_STEP, STEPS, LENGTH = range(7)


def prefill_schedule(
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    num_tokens: int,
    block_q: int,
    block_kv: int,
    sliding_window: int | None,
    skip_decode: bool,
) -> Int[Array, "blocks 7"]:
    """Table of blocks: sequence, first token, tokens, position of the first token, first block of keys, blocks of keys,
    length.

    Padding tokens form a last sequence that sees no key. Unused rows of the table have no tokens. A block of keys
    starts at a multiple of block_kv whatever the chunk, so that a result does not depend on how the prompt was cut.
    """
    num_seqs = kv_lens.shape[0]
    start = q_start
    counts = jnp.concatenate([q_start[1:] - q_start[:-1], num_tokens - q_start[-1:]])
    lens = jnp.concatenate([kv_lens, jnp.zeros(1, kv_lens.dtype)])
    if skip_decode:
        counts = jnp.where((counts == 1) & (jnp.arange(num_seqs + 1) < num_seqs), 0, counts)
    per_seq = -(-counts // block_q)
    ends = jnp.cumsum(per_seq)
    index = jnp.arange(ceil_div(num_tokens, block_q) + num_seqs + 1, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(index[:, None] >= ends[None, :], axis=1), num_seqs)
    used = index < ends[-1]
    offset = (index - (ends[seq] - per_seq[seq])) * block_q
    count = jnp.where(used, jnp.minimum(counts[seq] - offset, block_q), 0)
    length = lens[seq]
    position = length - counts[seq] + offset
    last = jnp.where(length > 0, position + count, 0)
    first_step = jnp.zeros_like(seq)
    if sliding_window is not None:
        first_step = jnp.maximum(position - (sliding_window - 1), 0) // block_kv
    steps = jnp.maximum(-(-last // block_kv) - first_step, 0)
    steps = jnp.where(count > 0, steps, 0)
    columns = [jnp.minimum(seq, num_seqs - 1), start[seq] + offset, count, position, first_step, steps, length]
    table = jnp.stack(columns, axis=1).astype(jnp.int32)
    return table[jnp.argsort(-jnp.where(count > 0, steps, -1), stable=True)]
