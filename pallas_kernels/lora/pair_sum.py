"""Sums of two thread blocks of a cluster: each gets what the other has of its half of the outputs, through distributed
shared memory. The values lie there as the threads hold them, so nobody waits for a bank.
"""

import dataclasses
from typing import Any

from jax import numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect
from pallas_kernels.lora.cluster_exchange import barrier_address
from pallas_kernels.lora.lanes import Lane, i32, scalars
from pallas_kernels.lora.short_ring import sync_warpgroup
from pallas_kernels.vectors_sm90 import WARPGROUP

_utils = mgpu.utils
_WGMMA, _SPLAT = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSum:
    """Of one warpgroup of each thread block.

    parts: shared memory float32 [stripes, 64, columns], written by the other one. sent: barrier that counts its bytes.
    part: which of the two this is.
    """

    parts: Any
    sent: Any
    part: Any

    def exchange(self, values: list, count) -> list:
        """Sums of both thread blocks' `values`, float32 [64, 2 columns] each: of the first or the second columns,
        float32 [64, columns]. count: how many of the values matter. Both have read what they got before; afterwards
        all threads of the warpgroup have what came now.
        """
        columns = self.parts.shape[-1]
        halves = [(value[:, :columns], value[:, columns:]) for value in values]
        expect(self.sent, count * (halves[0][0].size * 4))
        address = barrier_address(self.sent)
        for i, (low, high) in enumerate(halves):

            @pl.when(i < count)
            def _(i=i, low=low, high=high):
                _send(low, high, self.parts.at[i], address, self.part)

        plgpu.barrier_wait(self.sent)
        sums = [_add_received(low, high, self.parts.at[i], self.part) for i, (low, high) in enumerate(halves)]
        sync_warpgroup()
        return sums


def _chosen(condition, low, high) -> list:
    """A thread's pairs of values, of `low` where the condition holds."""
    pairs = zip(low.registers.reshape(-1), high.registers.reshape(-1), strict=True)
    return [arith.select(condition, a, b) for a, b in pairs]


def _places(pairs: list) -> list:
    """Of each two pairs of a thread: their place, in 16 bytes of the whole warpgroup."""
    thread = Lane.here().thread
    return [arith.addi(thread, i32(i * WARPGROUP)) for i in range(len(pairs) // 2)]


def _send(low, high, target, barrier, part) -> None:
    """Stores the half that the other thread block sums up in its `target`, to be counted by its `barrier`."""

    @plgpu.inline_mgpu(arg_types=(_WGMMA, _WGMMA, _SPLAT, _SPLAT, plgpu.RefType()))
    def run(ctx, low, high, barrier, part, target):
        del ctx
        base = llvm.ptrtoint(ir.IntegerType.get_signless(32), _utils.memref_ptr(target))
        barrier, part = scalars(barrier, part)
        peer = arith.subi(i32(1), part)
        pairs = _chosen(_is_zero(peer), low, high)
        for i, place in enumerate(_places(pairs)):
            _utils.inline_ptx(
                """{
                .reg .b32 there, done;
                mapa.shared::cluster.u32 there, $0, $4;
                mapa.shared::cluster.u32 done, $1, $4;
                st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [there], {$2, $3}, [done];
                }""",
                arith.addi(base, arith.muli(place, i32(16))),
                barrier,
                *(_utils.bitcast(pair, ir.IntegerType.get_signless(64)) for pair in pairs[2 * i : 2 * i + 2]),
                peer,
                has_side_effects=True,
            )

    run(low, high, barrier, part, target)


def _add_received(low, high, source, part):
    """The sum of this thread block's half and of what came."""

    @plgpu.inline_mgpu(
        arg_types=(_WGMMA, _WGMMA, _SPLAT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct(low.shape, jnp.float32, layout=_WGMMA),
    )
    def run(ctx, low, high, part, source):
        del ctx
        base, pairs = _utils.memref_ptr(source), _chosen(_is_zero(*scalars(part)), low, high)
        sums = low.registers.copy().reshape(-1)
        for i, place in enumerate(_places(pairs)):
            for j, pair in enumerate(pairs[2 * i : 2 * i + 2]):
                number = arith.addi(arith.muli(place, i32(2)), i32(j))
                received = llvm.load(pair.type, _utils.getelementptr(base, [number], pair.type))
                sums[2 * i + j] = arith.addf(pair, received)
        registers = sums.reshape(low.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=low.layout, _is_signed=low.is_signed)

    return run(low, high, part, source)


def _is_zero(value):
    return arith.cmpi(arith.CmpIPredicate.eq, value, i32(0))
