"""Attention over the page pool in plain XLA: online softmax over blocks of pages, gathered by page id."""

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import PAGE_TOKENS, Geometry, ceil_div

_PAGES_PER_BLOCK = 4
_QUERY_BLOCK = 16


def _query_blocks(q_start: Int[Array, "B1"], num_tokens: int, max_query: int):
    """Cuts each sequence's queries into blocks. Returns (sequence [n], token rows [n, block])."""
    num_seqs = q_start.shape[0] - 1
    if max_query == 1:
        block, num_blocks = 1, num_seqs
    else:
        block, num_blocks = _QUERY_BLOCK, ceil_div(num_tokens, _QUERY_BLOCK) + num_seqs
    counts = -(-(q_start[1:] - q_start[:-1]) // block)
    ends = jnp.cumsum(counts)
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_seqs - 1).astype(jnp.int32)
    first = q_start[seq] + (index - (ends[seq] - counts[seq])) * block
    rows = first[:, None] + jnp.arange(block, dtype=jnp.int32)
    valid = (index < ends[-1])[:, None] & (rows < q_start[seq + 1][:, None])
    return seq, jnp.where(valid, rows, num_tokens)


def paged_attention(
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    max_query: int,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Float[Array, "T N D"]:
    """See pallas_kernels.paged_attention.paged_attention."""
    num_tokens, num_heads, dim = q.shape
    kv_heads = geometry.num_kv_heads
    heads = (kv_heads, num_heads // kv_heads)
    seq, rows = _query_blocks(q_start, num_tokens, max_query)
    position = kv_lens[seq][:, None] - q_start[seq + 1][:, None] + rows
    queries = q.at[rows].get(mode="fill", fill_value=0).reshape(*rows.shape, *heads, dim)
    view = pages.reshape(*pages.shape[:2], 2, kv_heads, PAGE_TOKENS, dim)
    block_tokens = _PAGES_PER_BLOCK * PAGE_TOKENS
    tables = jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % _PAGES_PER_BLOCK)))

    def block(i, carry):
        top, total, acc = carry
        ids = lax.dynamic_slice_in_dim(tables, i * _PAGES_PER_BLOCK, _PAGES_PER_BLOCK, axis=1)[seq]
        kv = view[layer, ids]  # [n, pages, 2, K, 16, D]
        scores = jnp.einsum(
            "nqkgd,npksd->nkgqps",
            queries,
            kv[:, :, 0],
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )
        scores = scores.reshape(*scores.shape[:4], block_tokens) * sm_scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        key = i * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        seen = (key <= position[..., None]) & (rows < num_tokens)[..., None]
        if sliding_window is not None:
            seen &= key > position[..., None] - sliding_window
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        written = (key < kv_lens[seq][:, None]).reshape(-1, _PAGES_PER_BLOCK, PAGE_TOKENS)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights = jnp.exp(scores - base[..., None])
        decay = jnp.exp(top - base)
        part = jnp.einsum(
            "nkgqps,npksd->nkgqd",
            weights.reshape(*weights.shape[:4], _PAGES_PER_BLOCK, PAGE_TOKENS).astype(q.dtype),
            # slots past a sequence's end may hold anything, and 0 * NaN is NaN
            jnp.where(written[:, :, None, :, None], kv[:, :, 1], 0),
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )
        return new_top, total * decay + weights.sum(axis=-1), acc * decay[..., None] + part

    shape = (rows.shape[0], *heads, rows.shape[1])
    init = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    _, total, acc = lax.fori_loop(0, -(-jnp.max(kv_lens) // block_tokens), block, init)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(*rows.shape, num_heads, dim).astype(q.dtype)
    return jnp.zeros_like(q).at[rows].set(out, mode="drop")
