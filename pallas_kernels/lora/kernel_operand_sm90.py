"""Hopper kernel between lora_shrink and a product with the base weights: y of every token block as wgmma takes it.

Adds the splits of shrink's sums in order, scales them, and writes them tokens first, zero for tokens of other segments
and past a module's own ranks. After the blocks in use stands one more, of zeros.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import GROUPS, TILE_RANKS, ceil_div
from pallas_kernels.lora.any_rows import any_rows
from pallas_kernels.lora.expand_y import total_of
from pallas_kernels.lora.mosaic_common import OPERAND, PLAN_ROWS, STAGE_ROWS, capacity, dealt, dealt_item
from pallas_kernels.lora.plan import NUM_TOKENS, OFFSET, Plan, module_field
from pallas_kernels.lora.windows import WINDOW

_CTAS = 3 * 132
_PARTS = 2
"""Items that the tokens of a block are cut into: a program's registers hold all splits of one, and more run at once."""
_TOKENS = WINDOW // _PARTS


def operand(y, plan: Plan, layer, *, group: str, max_rank: int, interpret=None):
    """bfloat16 ``[token blocks, 64 tokens, modules x 64 ranks]``, each module's ranks padded to a multiple of 64.

    y: what the shrink kernel returned for the plan. layer: int32[1].
    """
    columns = len(GROUPS[group]) * ceil_div(max_rank, STAGE_ROWS) * STAGE_ROWS
    out = jax.ShapeDtypeStruct((y.shape[0], WINDOW, columns), jnp.bfloat16)
    args = (y, plan.counts, plan.records, plan.scaling, layer)
    with jax.named_scope("lora_operand"):
        if interpret:
            return _launch(*args, out=out, group=group, interpret=interpret)
        rows = dict.fromkeys((0, 2, 3), capacity(PLAN_ROWS, y.shape[0]))
        largest = jax.ShapeDtypeStruct((rows[0], *out.shape[1:]), out.dtype)
        options = dict(out=largest, group=group)
        return any_rows(_launch, args, rows=rows, out=(out,), in_place=False, options=options)[0]


def _launch(y, counts, records, scaling, layer, *, out, group: str, interpret=None):
    modules = GROUPS[group]
    rank_tiles = out.shape[2] // (len(modules) * STAGE_ROWS)
    ctas = 2 if interpret else _CTAS

    def lora_operand(y_ref, counts, records, scaling, layer_ref, out_ref, tile):
        cta, layer, used = lax.axis_index("cta"), layer_ref[0], counts[0]

        per_block = len(modules) * rank_tiles * _PARTS

        @pl.loop(0, dealt((used + 1) * per_block, cta, ctas))
        def item_body(n):
            index = dealt_item(cta, n, ctas)
            block, rest = lax.div(index, per_block), lax.rem(index, per_block)
            first_token, part = lax.rem(rest, _PARTS) * _TOKENS, lax.div(rest, _PARTS)
            number, rank_tile = lax.div(part, rank_tiles), lax.rem(part, rank_tiles)
            module = jnp.int32(modules[0])
            for i, m in enumerate(modules):
                module = jnp.where(number == i, m, module)
            field = module_field(module)
            granules = jnp.where(block < used, records[block, layer, field + 1], 0)
            row = jnp.where(block < used, records[block, layer, field + 2], 0)
            offset, num_tokens = (records[block, layer, i] for i in (OFFSET, NUM_TOKENS))

            @pl.when((granules * TILE_RANKS > rank_tile * STAGE_ROWS) | (block == used))
            def _():
                window = pl.ds(row + rank_tile * STAGE_ROWS, STAGE_ROWS)
                tokens = pl.ds(pl.multiple_of(first_token, _TOKENS), _TOKENS)
                parts = [
                    plgpu.load(y_ref.at[block, s, window, tokens], layout=plgpu.Layout.WGMMA, optimized=False)
                    for s in range(y.shape[1])
                ]
                total = total_of(granules, rank_tile, scaling[block, layer, module], parts, out.dtype)
                token = plgpu.broadcasted_iota(jnp.int32, total.shape, 1, layout=plgpu.Layout.WGMMA) + first_token
                own = (token >= offset) & (token < offset + num_tokens)
                total = jnp.where(own, total, jnp.zeros_like(total))
                tile.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                columns = pl.ds(pl.multiple_of(part * STAGE_ROWS, STAGE_ROWS), STAGE_ROWS)
                plgpu.copy_smem_to_gmem(tile, out_ref.at[block, tokens, columns])
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        lora_operand,
        out_type=out,
        grid=(ctas,),
        grid_names=("cta",),
        scratch_types=dict(tile=plgpu.SMEM((_TOKENS, STAGE_ROWS), out.dtype, transforms=OPERAND)),
        interpret=interpret,
    )(y, counts, records, scaling, layer)
