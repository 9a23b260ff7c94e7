"""One token's outputs out of an accumulator: from the registers that hold its column to rows in shared memory."""

from jax import numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def scatter_column(delta, t, rows, *, interpret: bool) -> None:
    """Copies column 8 i + t of delta [m, 8 n] to rows[i], for every i. rows: shared memory float32 [n, m], not yet
    committed.
    """
    if interpret:
        index = plgpu.broadcasted_iota(jnp.int32, (delta.shape[0], 8), 1, layout=plgpu.Layout.WGMMA)
        for i in range(rows.shape[0]):
            rows[i] = jnp.sum(jnp.where(index == t, delta[:, 8 * i : 8 * i + 8], 0.0), axis=1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def scatter(ctx, delta, t, rows):
        # Lane l of warp w holds rows 64 a + 16 w + 8 h + l // 4 and columns 8 i + 2 (l % 4) + {0, 1}.
        del ctx
        m, n = delta.shape
        i32 = ir.IntegerType.get_signless(32)
        constant = lambda v: arith.constant(i32, v)  # noqa: E731
        t = t.registers.item()
        thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
        lane = arith.remui(thread, constant(32))
        row = arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))
        odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(t, constant(1)), constant(0))
        mine = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, constant(4)), arith.shrui(t, constant(1)))
        base = mgpu.utils.memref_ptr(rows)
        registers = delta.registers.reshape(m // 64, n // 8, 2)
        pick = lambda pair, k: vector.extract(  # noqa: E731
            pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k])
        )
        with mgpu.when(mine):
            for a in range(m // 64):
                for i in range(n // 8):
                    for h in range(2):
                        pair = registers[a, i, h]
                        value = arith.select(odd, pick(pair, 1), pick(pair, 0))
                        place = arith.addi(row, constant(i * m + 64 * a + 8 * h))
                        llvm.store(value, mgpu.utils.getelementptr(base, [place], value.type))

    scatter(delta, t, rows)
