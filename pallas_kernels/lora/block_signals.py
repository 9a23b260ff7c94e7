"""Signals between the programs of one launch: who has shrunk a token block tells those that expand it.

The counters lie in global memory and are never reset. Every launch adds the same numbers to them, and takes a ticket
in each program, from which it knows how many launches with these counters there were before. It works only where all
programs of the grid run at the same time: one a multiprocessor, no more than there are.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, scf
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

_utils = mgpu.utils


def _i32(value: int):
    return _utils.c(value, ir.IntegerType.get_signless(32))


def take_ticket(counter, place, programs: int) -> jax.Array:
    """How many launches took tickets of this counter before. To be called by one warpgroup of each program.

    counter: int32[1] in global memory. place: int32[1] in shared memory.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def run(ctx, counter, place):
        del ctx
        with _utils.single_thread(_utils.ThreadSubset.WARPGROUP):
            ticket = _utils.inline_ptx(
                "atom.relaxed.gpu.global.add.u32 $0, [$1], $2;",
                _utils.memref_ptr(counter),
                _i32(1),
                result_types=ir.IntegerType.get_signless(32),
                has_side_effects=True,
            )
            llvm.store(ticket, _utils.memref_ptr(place))
        _utils.warpgroup_barrier()

    run(counter, place)
    return lax.div(place[0], programs)


def signal(counter, count: int) -> None:
    """Adds `count`, after everything that the warpgroup's threads have written or waited for. counter: int32[1] in
    global memory.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(ctx, counter):
        del ctx
        _utils.warpgroup_barrier()
        with _utils.single_thread(_utils.ThreadSubset.WARPGROUP):
            pointer = _utils.memref_ptr(counter)
            _utils.inline_ptx("red.release.gpu.global.add.u32 [$0], $1;", pointer, _i32(count), has_side_effects=True)

    run(counter)


def wait_for(counter, count) -> None:
    """A warpgroup waits until the counter has reached `count` (int32 scalar)."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(ctx, counter, count):
        del ctx
        count = count.registers.item()
        with _utils.single_thread(_utils.ThreadSubset.WARPGROUP):
            pointer = _utils.memref_ptr(counter)
            loop = scf.WhileOp([], [])
            with ir.InsertionPoint(loop.before.blocks.append()):
                now = _utils.inline_ptx(
                    "ld.acquire.gpu.global.u32 $0, [$1];",
                    pointer,
                    result_types=ir.IntegerType.get_signless(32),
                    has_side_effects=True,
                )
                scf.condition(arith.cmpi(arith.CmpIPredicate.slt, arith.subi(now, count), _i32(0)), [])
            with ir.InsertionPoint(loop.after.blocks.append()):
                scf.yield_([])
        _utils.warpgroup_barrier()

    run(counter, count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortSignals:
    """That an item is shrunk. To make it known takes microseconds, as the stores must have arrived, so the multiplying
    warpgroups leave it to another one that has nothing else to do; only their last item they signal themselves.

    finished, told: barriers in shared memory, `depth` of each. done: block -> its counter. sides: multiplying
    warpgroups.
    """

    finished: Any
    told: Any
    done: Callable[[Any], Any]
    sides: int
    depth: int = 4

    def finish(self, n, num_items, block):
        """A multiplying warpgroup has stored its part of item n."""
        place = lax.rem(n, jnp.int32(self.depth))

        @pl.when(n < num_items - 1)
        def _():
            pl.when(n >= self.depth)(lambda: plgpu.barrier_wait(self.told.at[place]))
            plgpu.barrier_arrive(self.finished.at[place])

        pl.when(n == num_items - 1)(lambda: signal(self.done(block), 1))

    def tell(self, num_items, block_of):
        """The role of the warpgroup that has nothing else to do."""

        @pl.loop(0, num_items - 1)
        def _(n):
            place = lax.rem(n, jnp.int32(self.depth))
            plgpu.barrier_wait(self.finished.at[place])
            signal(self.done(block_of(n)), self.sides)
            plgpu.barrier_arrive(self.told.at[place])


def sync_warpgroup() -> None:
    """Threads of a warpgroup see what each of them wrote to shared memory; bulk copies and wgmma need commit_smem."""

    @plgpu.inline_mgpu()
    def run(ctx):
        del ctx
        _utils.warpgroup_barrier()

    run()
