"""A warpgroup of the kernel for few adapters that multiplies: base weights and B alike, pass by pass."""

import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.config import FEW_TOKENS
from pallas_kernels.lora.few_ring import TOKEN_PARTS, FewRing
from pallas_kernels.lora.few_stripes import PairStripes
from pallas_kernels.lora.pair_sum import PairSum

WARPGROUPS = 2
"""That multiply: they take passes by turns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewMultiply:
    """user: which of the warpgroups. slots, full, empty: the large ring's operands, this warpgroup's barriers of its
    stages, and barriers of all. results: shared memory of what comes from the pair's other thread block, if the two
    halve the input, and of outputs, maybe in the same place. sent: barrier of the former. taken: by warpgroup, barriers
    of `results`, which passes share. out: in global memory.

    stripes: of the thread block. part: which of the pair's it is. halves: of the input. count, deltas: stages of base
    weights and of deltas in each pass. tokens: of the step.
    """

    user: int
    ring: FewRing
    slots: Any
    full: Any
    empty: Any
    results: tuple
    sent: Any
    taken: Any
    out: Any
    stripes: PairStripes
    part: Any
    halves: int
    count: Any
    deltas: Any
    tokens: Any

    def run(self) -> None:
        for number in range(self.user, len(self.stripes.passes), WARPGROUPS):
            stripe, stripe_count = self.stripes.passes[number]

            @pl.when(stripe_count > 0)
            def _(number=number, stripe=stripe, stripe_count=stripe_count):
                self._pass(number, stripe, stripe_count)

    def _pass(self, number: int, stripe, stripe_count) -> None:
        found = self._products(number)
        if number:  # until what lies in `results` since the pass before has been taken
            plgpu.barrier_wait(self.taken.at[(number - 1) % WARPGROUPS])
        if self.halves > 1:
            found = PairSum(parts=self.results[0], sent=self.sent, part=self.part).exchange(found, stripe_count)
        for i, value in enumerate(found):

            @pl.when(i < stripe_count)
            def _(i=i, value=value):
                self._write(i, value, self.stripes.first + stripe + i)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if number + 1 < len(self.stripes.passes):
            following = self.stripes.passes[number + 1][1]
            pl.when(following > 0)(lambda: plgpu.barrier_arrive(self.taken.at[self.user]))

    def _products(self, number: int) -> list:
        """Of a pass: sums of the stripes, float32 [64, 64] each."""
        ring = self.ring
        first_base, first_delta = self.stripes.first_stages(number, self.count, self.deltas)

        def slot_of(stage):
            return lax.rem(stage, jnp.int32(ring.slots))

        def free(stage):
            plgpu.barrier_arrive(self.empty.at[slot_of(stage)])

        def accumulate(*sums):
            def multiply(stage):
                slot = slot_of(stage)
                plgpu.barrier_wait(self.full.at[slot])
                for i, total in enumerate(sums):
                    plgpu.wgmma(total, self.slots.at[ring.tokens(slot)], self.slots.at[ring.weights(slot, i)])

            def multiply_all(begin, length):
                @pl.loop(0, length)
                def _(k):
                    multiply(begin + k)
                    plgpu.wgmma_wait(ring.held * ring.width)
                    pl.when(k >= ring.held)(lambda: free(begin + k - ring.held))

                plgpu.wgmma_wait(0)
                if ring.held:
                    pl.when(length > 0)(lambda: free(begin + length - 1))

            multiply_all(first_base, self.count)
            multiply_all(first_delta, self.deltas)
            return [total[...] for total in sums]

        return pl.run_scoped(accumulate, *[plgpu.ACC((FEW_TOKENS, TILE_COLS), jnp.float32)] * ring.width)

    def _write(self, i: int, value, stripe) -> None:
        """A stripe's outputs, or this thread block's half of them."""
        target = self.results[-1].at[i]
        columns = target.shape[1]
        target[...] = value.astype(self.out.dtype)
        plgpu.commit_smem()
        outputs = pl.ds(stripe * TILE_COLS + (self.part * columns if self.halves > 1 else 0), columns)

        def copy(row, size):
            rows = pl.ds(row if isinstance(row, int) else pl.multiple_of(row, TILE_RANKS), size)
            plgpu.copy_smem_to_gmem(target.at[rows], self.out.at[rows, outputs])

        @pl.when(self.tokens == FEW_TOKENS)
        def _():
            copy(0, FEW_TOKENS)

        for size in TOKEN_PARTS:

            @pl.when((self.tokens < FEW_TOKENS) & (self.tokens & size != 0))
            def _(size=size):
                copy(self.tokens & (FEW_TOKENS - 2 * size), size)
