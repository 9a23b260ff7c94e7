"""LoRA shrink and expand on Hopper GPUs: what the dispatcher calls.

The two are a pair. Between them stands ``y``, float32 ``[splits, rows, block_tokens]``: for every rank block of the
plan 64 rows of stacked ranks, for every split of the input width its partial sum. Only expand reads it. A large step
is served by two pairs of launches, one for short segments (decoding) and one for long ones (prompts).
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry
from pallas_kernels.lora.config import SHORT_STEP, LoraConfig, chunk_tiles, default_config
from pallas_kernels.lora.kernel_expand_sm90 import expand
from pallas_kernels.lora.kernel_shrink_sm90 import shrink
from pallas_kernels.lora.plan import BLOCK_GRANULES, by_length, make_plan, max_rank_blocks
from pallas_kernels.lora.table import AdapterTable

_ROWS = BLOCK_GRANULES * 8

# One trace and one lowering for all layers of a step.
_STATIC = ("group", "geometry", "config", "chunk", "interpret")
_shrink = jax.jit(shrink, static_argnames=(*_STATIC, "y_rows"))
_expand = jax.jit(expand, static_argnames=(*_STATIC, "max_rank"))
_make_plan = jax.jit(make_plan, static_argnames=("num_tokens", "geometry", "block_tokens"))


def unsupported(tokens: jax.Array, pages: jax.Array, *, group: str, geometry: Geometry, max_rank: int) -> str | None:
    """Why the kernels cannot take this input, or None if they can. tokens: `x` of shrink or `out` of expand."""
    if pages.dtype != jnp.bfloat16:
        return f"pages are {pages.dtype}, not bfloat16"
    if tokens.dtype != jnp.bfloat16:
        return f"activations are {tokens.dtype}, not bfloat16"
    for size in (*geometry.in_sizes, *geometry.out_sizes):
        if size % TILE_COLS:
            return f"a width of {size} is not a multiple of {TILE_COLS}"
    if max_rank > 512:
        return f"max_rank is {max_rank}, more than 512"
    if pages.size // (TILE_COLS * 8) >= 2**31:
        return f"the pool holds {pages.size // (TILE_COLS * 8)} tiles, more than an int32 counts"
    if group not in GROUPS:
        return f"there is no group {group!r}"
    return None


def launches(
    num_tokens: int,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    geometry: Geometry,
    config: LoraConfig | tuple[LoraConfig, LoraConfig] | None,
) -> list[tuple[LoraConfig, Int[Array, "S"]]]:
    """Config and segments' adapters of each pair of launches: one pair takes all segments of a small step; a large one
    has a pair for short segments and one for long ones. A launch passes over segments without an adapter.
    """
    if config is None:
        short, long = default_config(geometry, 1), default_config(geometry, num_tokens)
        config = short if num_tokens <= SHORT_STEP else (short, long)
    if isinstance(config, LoraConfig):
        return [(config, seg_adapter)]
    return list(zip(config, by_length(seg_start, seg_adapter), strict=True))


def shrink_sm90(
    x: Float[Array, "T c"],
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
    max_rank: int,
    config: LoraConfig | tuple[LoraConfig, LoraConfig] | None = None,
    interpret=None,
) -> tuple[Float[Array, "_ _ _"], ...]:
    """Partial sums of ``x A^T`` for `expand_sm90`, which must be called with the same arguments: one array for each
    launch. config: for all segments, or for short and for long ones.
    """
    parts = []
    for one, adapters in launches(x.shape[0], seg_start, seg_adapter, geometry, config):
        plan = _make_plan(
            table, seg_start, adapters, num_tokens=x.shape[0], geometry=geometry, block_tokens=one.block_tokens
        )
        parts.append(
            _shrink(
                x,
                pages,
                table.pages,
                plan,
                jnp.asarray(layer, jnp.int32).reshape(1),
                group=group,
                geometry=geometry,
                config=one,
                chunk=chunk_tiles(geometry, one.chunk_tiles),
                y_rows=plan.records.shape[1] * max_rank_blocks(group, max_rank) * _ROWS,
                interpret=interpret,
            )
        )
    return tuple(parts)


def expand_sm90(
    out: Float[Array, "T c"],
    y: tuple[Float[Array, "_ _ _"], ...],
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
    max_rank: int,
    config: LoraConfig | tuple[LoraConfig, LoraConfig] | None = None,
    interpret=None,
) -> Float[Array, "T c"]:
    """`out` with every token's ``scaling * y B^T`` added: float32 sums, one rounding. Tokens without an adapter are
    not touched.
    """
    for (one, adapters), part in zip(launches(out.shape[0], seg_start, seg_adapter, geometry, config), y, strict=True):
        plan = _make_plan(
            table, seg_start, adapters, num_tokens=out.shape[0], geometry=geometry, block_tokens=one.block_tokens
        )
        out = _expand(
            out,
            part,
            pages,
            table.pages,
            plan,
            jnp.asarray(layer, jnp.int32).reshape(1),
            group=group,
            geometry=geometry,
            config=one,
            chunk=chunk_tiles(geometry, one.chunk_tiles),
            max_rank=max_rank,
            interpret=interpret,
        )
    return out
