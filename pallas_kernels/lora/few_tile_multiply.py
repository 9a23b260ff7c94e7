"""A warpgroup of the kernel for few adapters that multiplies half of a tile of 128 tokens."""

from collections.abc import Callable
import dataclasses
import functools
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
    memory. stripes: of the thread block. count, deltas: stages of base weights and of deltas in each pass.
    shrink: takes its own stages, called with how many were before; they come after some of the first pass, see
    FewTileLoad. shrink_stages: how many these are.
    """

    window: Any
    tile: Any
    slots: FewTileSlots
    results: Any
    out: Any
    stripes: PairStripes
    count: Any
    deltas: Any
    shrink: Callable
    shrink_stages: Any

    def run(self) -> None:
        seen = jnp.int32(0)
        for number, (begin, stripe_count) in enumerate(self.stripes.passes):
            length = jnp.where(stripe_count > 0, self.count + self.deltas, 0)
            for width in self.slots.ring.widths(number):
                one_pass = functools.partial(self._pass, number, seen, length, begin, stripe_count, width)
                if number:
                    pl.when(self.slots.ring.takes(number, stripe_count, width))(one_pass)
                else:
                    one_pass()
            seen += length + (0 if number else self.shrink_stages)
        plgpu.wait_smem_to_gmem(0)

    def _pass(self, number: int, seen, length, begin, stripe_count, width: int) -> None:
        found = self._products(number, seen, length, width)
        for i in range(width):

            @pl.when(i < stripe_count)
            def _(i=i, part=found[:, i * TILE_COLS : (i + 1) * TILE_COLS]):
                self._write(part, begin + i)

    def _products(self, number: int, seen, length, width: int):
        """Sums over the next stages, float32 [64, outputs] of so many stripes."""
        slots, ring = self.slots, self.slots.ring

        def slot_of(stage):
            return lax.rem(stage, jnp.int32(ring.slots))

        def accumulate(total):
            def multiply(seen, length):
                @pl.loop(0, length)
                def _(k):
                    slot = slot_of(seen + k)
                    plgpu.barrier_wait(slots.full.at[slot])
                    plgpu.wgmma(total, slots.window(slot, self.window), slots.weights(slot, width))
                    plgpu.wgmma_wait(1)  # the one before
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(slots.empty.at[slot_of(seen + k - 1)]))

                plgpu.wgmma_wait(0)
                pl.when(length > 0)(lambda: plgpu.barrier_arrive(slots.empty.at[slot_of(seen + length - 1)]))

            if number:
                multiply(seen, length)
            else:
                ahead = jnp.where(length > 0, ring.ahead(self.count), 0)
                multiply(seen, ahead)
                self.shrink(seen + ahead)
                multiply(seen + ahead + self.shrink_stages, length - ahead)
            return total[...]

        return pl.run_scoped(accumulate, plgpu.ACC((WINDOW, width * TILE_COLS), jnp.float32))

    def _write(self, part, stripe) -> None:
        target = self.results.at[self.window]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        target[...] = part.astype(self.out.dtype)
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(self.tile * TILE + self.window * WINDOW, WINDOW), WINDOW)
        outputs = pl.ds(pl.multiple_of((self.stripes.first + stripe) * TILE_COLS, TILE_COLS), TILE_COLS)
        plgpu.copy_smem_to_gmem(target, self.out.at[rows, outputs])
