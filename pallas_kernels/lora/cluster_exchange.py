"""Partial sums from one thread block of a cluster to all of it, through distributed shared memory.

A signal through global memory must wait until the stores before it have arrived, microseconds under load. These stores
count themselves on the receiver's barrier.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax._src import core as jax_core
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import lowering, primitives
from jax._src.state import primitives as state_primitives
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect
from pallas_kernels.geometry import TILE_RANKS
from pallas_kernels.lora.config import CLUSTER
from pallas_kernels.lora.diagonal import ROW_BYTES, each_pair
from pallas_kernels.lora.lanes import WARP_ROWS, i32, scalars
from pallas_kernels.lora.mosaic_common import STAGE_ROWS, drain
from pallas_kernels.lora.short_items import ShrinkItem

SLOTS = 2
"""Rounds of partial sums that a thread block has room for."""
_utils = mgpu.utils

_address_p = jax_core.Primitive("lora_barrier_address")
_address_p.def_effectful_abstract_eval(
    lambda barrier, *_, tree: (jax_core.ShapedArray((), jnp.int32), {gpu_core._memory_effect})
)


@lowering.register_lowering_rule(_address_p, mgpu.LoweringSemantics.Warpgroup)
def _address_lowering(ctx, barrier, *leaves, tree):
    index = primitives._get_barrier_base_index(ctx.avals_in[0], tree.unflatten(leaves))
    ref = (barrier if index is None else barrier[index]).barrier_ref
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), ref.get_ptr())


def barrier_address(barrier) -> jax.Array:
    """Shared-memory address of a barrier, int32."""
    ref, transforms = state_primitives.get_ref_and_transforms(barrier, None, "address")
    leaves, tree = jax.tree.flatten(transforms)
    return _address_p.bind(ref, *leaves, tree=tree)


def _send(total, item: ShrinkItem, number, target, barrier) -> None:
    """Stores a set's partial sums in `target` of every thread block of the cluster, to be counted by its `barrier`.

    total: float32 [64, 8 n]. target: float32 [splits, 64, 8].
    """
    offset = number * item.packed
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, *[splat] * 5, plgpu.RefType()))
    def run(ctx, total, height, granules, places, first, barrier, target):
        del ctx
        base = llvm.ptrtoint(ir.IntegerType.get_signless(32), _utils.memref_ptr(target))
        height, granules, places, first, barrier = scalars(height, granules, places, first, barrier)

        def store(offset, pair):
            value = _utils.bitcast(pair, ir.IntegerType.get_signless(64))
            for peer in range(CLUSTER):
                _utils.inline_ptx(
                    """{
                    .reg .b32 there, done;
                    mapa.shared::cluster.u32 there, $0, $3;
                    mapa.shared::cluster.u32 done, $1, $3;
                    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], $2, [done];
                    }""",
                    arith.addi(base, offset),
                    barrier,
                    value,
                    i32(peer),
                    has_side_effects=True,
                )

        each_pair(total, height, granules, places, first, STAGE_ROWS * ROW_BYTES, store)

    places, first = item.num_splits - offset, item.first_split + offset
    run(total, item.height, item.granules, places, first, barrier, target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Rounds of partial sums, 64 ranks of an item each, numbered alike in all thread blocks of a cluster.

    parts: shared memory float32 [SLOTS, splits, 64, 8]. sent, free: barriers, SLOTS of each; `free` is a cluster's, to
    which every thread block of it arrives.
    """

    parts: Any
    sent: Any
    free: Any

    def send(self, number, item: ShrinkItem, which, total) -> None:
        """The partial sums of a set of a round for which there is room."""
        slot = lax.rem(number, jnp.int32(SLOTS))
        _send(total, item, which, self.parts.at[slot], barrier_address(self.sent.at[slot]))

    def wait_free(self, number) -> None:
        """Of the sending warpgroup, once a round: until all have read what the round's slot held."""
        slot = lax.rem(number, jnp.int32(SLOTS))
        pl.when(number >= SLOTS)(lambda: plgpu.barrier_wait(self.free.at[slot]))

    def receive(self, number, granules) -> list:
        """Of the preparing warpgroup: a round's partial sums of all splits."""
        slot, splits = lax.rem(number, jnp.int32(SLOTS)), self.parts.shape[1]
        warps = lax.div(granules + 1, jnp.int32(WARP_ROWS // TILE_RANKS))
        expect(self.sent.at[slot], warps * (splits * WARP_ROWS * ROW_BYTES))
        plgpu.barrier_wait(self.sent.at[slot])
        return [plgpu.load(self.parts.at[slot, s], layout=plgpu.Layout.WGMMA, optimized=False) for s in range(splits)]

    def release(self, number) -> None:
        """After `receive`, when all threads of the warpgroup have what they read."""
        plgpu.barrier_arrive(self.free.at[lax.rem(number, jnp.int32(SLOTS))])

    def finish(self, rounds) -> None:
        """Of the sending warpgroup: no thread block may end while another one arrives at its barriers."""
        drain(self.free, rounds, SLOTS)
