"""A warpgroup of the kernel for few adapters that multiplies half of a tile of 128 tokens."""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS
from pallas_kernels.lora.few_stripes import PairStripes
from pallas_kernels.lora.few_tile_ring import FewTileSlots
from pallas_kernels.lora.windows import TILE, WINDOW


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewTileMultiply:
    """window: which half. slots: of the ring. results: shared memory for outputs on their way to `out`, in global
    memory. stripes: of the thread block. count, deltas: stages of base weights and of deltas in each pass. seen: stages
    before these.
    """

    window: Any
    tile: Any
    slots: FewTileSlots
    results: Any
    out: Any
    stripes: PairStripes
    count: Any
    deltas: Any
    seen: Any

    def run(self) -> None:
        seen, length = self.seen, self.count + self.deltas
        for begin, stripe_count in self.stripes.passes:

            @pl.when(stripe_count > 0)
            def _(seen=seen, begin=begin, stripe_count=stripe_count):
                found = self._products(seen, length)
                for i in range(self.slots.ring.width):

                    @pl.when(i < stripe_count)
                    def _(i=i, part=found[:, i * TILE_COLS : (i + 1) * TILE_COLS]):
                        self._write(part, begin + i)

            seen += jnp.where(stripe_count > 0, length, 0)
        plgpu.wait_smem_to_gmem(0)

    def _products(self, seen, length):
        """Sums over the next stages, float32 [64, outputs]."""
        slots, ring = self.slots, self.slots.ring

        def slot_of(stage):
            return lax.rem(stage, jnp.int32(ring.slots))

        def accumulate(total):
            @pl.loop(0, length)
            def _(k):
                slot = slot_of(seen + k)
                plgpu.barrier_wait(slots.full.at[slot])
                plgpu.wgmma(total, slots.window(slot, self.window), slots.weights(slot))
                plgpu.wgmma_wait(1)  # the one before
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(slots.empty.at[slot_of(seen + k - 1)]))

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(slots.empty.at[slot_of(seen + length - 1)])
            return total[...]

        return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, ring.width * TILE_COLS), jnp.float32))

    def _write(self, part, stripe) -> None:
        target = self.results.at[self.window]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        target[...] = part.astype(self.out.dtype)
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(self.tile * TILE + self.window * WINDOW, WINDOW), WINDOW)
        outputs = pl.ds(pl.multiple_of((self.stripes.first + stripe) * TILE_COLS, TILE_COLS), TILE_COLS)
        plgpu.copy_smem_to_gmem(target, self.out.at[rows, outputs])
