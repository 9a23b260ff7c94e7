"""Deltas out of an accumulator onto base outputs, row by row of a token block."""

from jax import numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_RANKS
from pallas_kernels.lora.lanes import Lane, i32, less, one_of, scalars

_utils = mgpu.utils
_PAD = 4
"""Floats between rows in shared memory, so that the lanes that hold different tokens store to different banks."""
_VECTOR = 8
"""Outputs that a lane adds at a time: 16 bytes."""
_BUFFERS = 2
_FEW = 2
"""Tokens up to which a row of each chunk fits in `moved` at once."""


def rows_type(columns: int) -> tuple[int, ...]:
    """Shape of what `add_rows` needs in shared memory, float32, for chunks of so many columns."""
    return _BUFFERS, TILE_RANKS, columns + _PAD


def add_rows(delta, base, out, moved, token, column, offset, num_tokens, chunks) -> None:
    """Adds a stage's deltas to base outputs: chunk i of outputs, of tokens [offset, offset + num_tokens).

    delta: float32 [columns, 8 n]; column 8 i + t is token t of chunk i. base: bfloat16 [8 n, columns] in shared memory,
    row 8 i + t. out: [T, c] in global memory, where token t is row `token` + t, and chunk i begins at `column` + i
    columns. moved: shared memory of `rows_type`. chunks: how many there are. Rounds once.
    """
    columns, limit = delta.shape[0], delta.shape[1] // TILE_RANKS

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 5)
    )
    def run(ctx, delta, base, out, moved, *where):
        del ctx
        i64 = ir.IntegerType.get_signless(64)
        token, column, offset, num_tokens, chunks = scalars(*where)
        end = arith.addi(offset, num_tokens)
        within = lambda t: arith.andi(arith.cmpi(arith.CmpIPredicate.sge, t, offset), less(t, end))  # noqa: E731
        here = Lane.here()
        warp, lane, held = here.warp, here.lane, here.column
        stride = columns + _PAD
        to_base, to_moved, to_out = (_utils.memref_ptr(ref) for ref in (base, moved, out))
        width = ir.MemRefType(out.type).shape[1]
        registers = delta.registers.reshape(columns // 64, limit, 2)
        eight = lambda element: ir.VectorType.get((_VECTOR,), element)  # noqa: E731
        bf16, f32 = ir.BF16Type.get(), ir.F32Type.get()
        four, wide = ir.VectorType.get((4,), f32), lambda v: arith.extsi(i64, v)
        start = arith.muli(lane, i32(_VECTOR))
        works = less(lane, i32(columns // _VECTOR))

        def move(i, t, j, row):
            """Chunk i of token t, which this lane holds as its j-th, to a row of `moved`."""
            place = arith.addi(arith.muli(row, i32(stride)), here.row)
            for a in range(columns // 64):
                for h in range(2):
                    there = arith.addi(place, i32(64 * a + 8 * h))
                    llvm.store(one_of(registers[a, i, h], j), _utils.getelementptr(to_moved, [there], f32))

        def add(i, t, row):
            """A warp's lanes add a row of `moved` to chunk i of token t."""
            place = arith.addi(arith.muli(row, i32(stride)), start)
            halves = [
                llvm.load(four, _utils.getelementptr(to_moved, [arith.addi(place, i32(4 * k))], f32)) for k in range(2)
            ]
            change = _utils.vector_concat(halves)
            row = arith.addi(arith.muli(i, i32(TILE_RANKS)), t)
            place = arith.addi(arith.muli(row, i32(columns)), start)
            before = llvm.load(eight(bf16), _utils.getelementptr(to_base, [place], bf16))
            total = arith.truncf(eight(bf16), arith.addf(arith.extf(eight(f32), before), change))
            place = arith.muli(wide(arith.addi(token, t)), _utils.c(width, i64))
            there = arith.addi(arith.addi(column, arith.muli(i, i32(columns))), start)
            llvm.store(total, _utils.getelementptr(to_out, [arith.addi(place, wide(there))], bf16))

        def few():
            # All chunks at once, one a warp.
            for j in range(2):
                t = arith.addi(held, i32(j))
                with _utils.when(within(t)):
                    for i in range(limit):
                        move(i, t, j, arith.addi(arith.subi(t, offset), i32(_FEW * i)))
            _utils.warpgroup_barrier()
            for n in range(_FEW):
                t = arith.addi(offset, i32(n))
                with _utils.when(arith.andi(arith.andi(less(t, end), less(warp, chunks)), works)):
                    add(warp, t, arith.addi(arith.muli(warp, i32(_FEW)), i32(n)))

        def many():
            for i in range(limit):
                base_row = i32(i % _BUFFERS * TILE_RANKS)
                with _utils.when(less(i32(i), chunks)):  # the same for all threads: they meet inside
                    for j in range(2):
                        t = arith.addi(held, i32(j))
                        with _utils.when(within(t)):
                            move(i, t, j, arith.addi(t, base_row))
                    _utils.warpgroup_barrier()
                    for n in range(2):
                        t = arith.addi(offset, arith.addi(warp, i32(4 * n)))
                        with _utils.when(arith.andi(less(t, end), works)):
                            add(i32(i), t, arith.addi(t, base_row))

        with _utils.when(less(num_tokens, i32(_FEW + 1))):
            few()
        with _utils.when(less(i32(_FEW), num_tokens)):
            many()
        # The next stage begins with rows that who is slow may still read.
        _utils.warpgroup_barrier()

    run(delta, base, out, moved, token, column, offset, num_tokens, chunks)


def add_rows_interpreted(delta, base, out, token, column, offset, num_tokens, chunks) -> None:
    """The same where there are no registers to speak of."""
    columns = delta.shape[0]
    index = plgpu.broadcasted_iota(jnp.int32, (columns, TILE_RANKS), 1, layout=plgpu.Layout.WGMMA)

    @pl.loop(0, num_tokens)
    def token_body(n):
        t = offset + n
        for i in range(delta.shape[1] // TILE_RANKS):

            @pl.when(i < chunks)
            def _(i=i):
                own = delta[:, TILE_RANKS * i : TILE_RANKS * (i + 1)]
                change = jnp.sum(jnp.where(index == t, own, 0.0), axis=1)
                total = base[TILE_RANKS * i + t].astype(jnp.float32) + change
                out[token + t, pl.ds(column + i * columns, columns)] = total.astype(out.dtype)
