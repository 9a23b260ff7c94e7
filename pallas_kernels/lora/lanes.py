"""Which values of an accumulator a thread holds, for code inside inline_mgpu.

In the WGMMA layout of a [64 m, 8 n] array, lane l of warp w has rows 64 a + 16 w + 8 h + l // 4 and columns 8 i +
2 (l % 4) + {0, 1}: pair ``registers.reshape(m, n, 2)[a, i, h]``.
"""

import dataclasses
from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental.mosaic import gpu as mgpu

WARP_ROWS = 16


def i32(value: int) -> Any:
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def less(a, b):
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def one_of(pair, k: int):
    return vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([k]))


def scalars(*arrays) -> list:
    """Values of arrays that came as WG_SPLAT."""
    return [a.registers.item() for a in arrays]


@dataclasses.dataclass(frozen=True)
class Lane:
    """thread: in its warpgroup. row, column: of its first value."""

    thread: Any
    warp: Any
    lane: Any
    row: Any
    column: Any

    @classmethod
    def here(cls) -> "Lane":
        thread = arith.remui(mgpu.utils.thread_idx(), i32(mgpu.utils.WARPGROUP_SIZE))
        warp, lane = arith.divui(thread, i32(32)), arith.remui(thread, i32(32))
        row = arith.addi(arith.muli(warp, i32(WARP_ROWS)), arith.divui(lane, i32(4)))
        return cls(thread, warp, lane, row, arith.muli(arith.remui(lane, i32(4)), i32(2)))
