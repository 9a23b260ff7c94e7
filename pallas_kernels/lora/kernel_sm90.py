"""LoRA shrink and expand on Hopper GPUs: what the dispatcher calls.

The two are a pair. Between them stands ``y``, float32 ``[token blocks, splits, rows, block_tokens]``: for every token
block of the plan and every split of the input width the partial sums of its stacked ranks. Only expand reads it. A
large step is served by two pairs of launches, one for short segments (decoding) and one for long ones (prompts).
"""

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import GROUPS, TILE_COLS, Geometry
from pallas_kernels.lora.config import SHORT_STEP, LoraConfig, chunk_tiles, default_config
from pallas_kernels.lora.kernel_expand_sm90 import expand
from pallas_kernels.lora.kernel_shrink_sm90 import shrink
from pallas_kernels.lora.plan import by_length, make_plan
from pallas_kernels.lora.table import AdapterTable

_WHOLE_ROWS = 8
"""XLA pads matrix products to multiples of so many rows and slices the result. A kernel that changes such a slice in
place is fused with the slicing, and what it wrote is lost (jax 0.11.2 on an H100: two to seven tokens came out wrong).
"""

# One trace and one lowering for all layers of a step.
_STATIC = ("group", "geometry", "config", "chunk", "max_rank", "interpret")
_shrink = jax.jit(shrink, static_argnames=_STATIC)
_expand = jax.jit(expand, static_argnames=_STATIC)
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


def _launches(tokens, table, seg_start, seg_adapter, *, layer, group, geometry, max_rank, config, interpret):
    """Arguments that both kernels of each pair of launches take, after their own and the pool: (positional, keywords).

    One pair takes all segments of a small step; a large one has a pair for short segments and one for long ones. A
    launch passes over segments without an adapter.
    """
    num_tokens = tokens.shape[0]
    if config is None:
        short, long = default_config(geometry, 1), default_config(geometry, num_tokens)
        config = short if num_tokens <= SHORT_STEP else (short, long)
    if isinstance(config, LoraConfig):
        pairs = [(config, seg_adapter)]
    else:
        pairs = list(zip(config, by_length(seg_start, seg_adapter), strict=True))
    for one, adapters in pairs:
        options = dict(num_tokens=num_tokens, geometry=geometry, block_tokens=one.block_tokens)
        plan = _make_plan(table, seg_start, adapters, **options)
        chunk = chunk_tiles(geometry, one.chunk_tiles)
        keywords = dict(group=group, geometry=geometry, config=one, chunk=chunk, max_rank=max_rank, interpret=interpret)
        yield (table.pages, plan, jnp.asarray(layer, jnp.int32).reshape(1)), keywords


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
) -> tuple[Float[Array, "_ _ _ _"], ...]:
    """Partial sums of ``x A^T`` for `expand_sm90`, which must be called with the same arguments: one array for each
    launch. config: for all segments, or for short and for long ones.
    """
    options = dict(layer=layer, group=group, geometry=geometry, max_rank=max_rank, config=config, interpret=interpret)
    launches = _launches(x, table, seg_start, seg_adapter, **options)
    return tuple(_shrink(x, pages, *where, **keywords) for where, keywords in launches)


def expand_sm90(
    out: Float[Array, "T c"],
    y: tuple[Float[Array, "_ _ _ _"], ...],
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
    options = dict(layer=layer, group=group, geometry=geometry, max_rank=max_rank, config=config, interpret=interpret)
    num_tokens = out.shape[0]
    launches = list(_launches(out, table, seg_start, seg_adapter, **options))
    if num_tokens > 1 and num_tokens % _WHOLE_ROWS:
        out = jnp.pad(out, ((0, -num_tokens % _WHOLE_ROWS), (0, 0)))
    for part, (where, keywords) in zip(y, launches, strict=True):
        out = _expand(out, part, pages, *where, **keywords)
    return out[:num_tokens]
