"""Shrink in the kernel for few adapters, by a warpgroup that has time for it."""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora.config import FEW_TOKENS
from pallas_kernels.lora.few_items import FewItems
from pallas_kernels.lora.few_plan import FIRST, LAST, SCALE
from pallas_kernels.lora.mosaic_common import STAGE_ROWS
from pallas_kernels.lora.signals import await_signals, leave, signal

_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShrink:
    """Of one warpgroup. ranks, ys, signals: in global memory, see FewPlan and FewItems. operands: activations and A of
    a slot of the ring, which has so many. full, empty: barriers of these. has_y: of the blocks, in interpret mode.

    layer, of so many. count: stages of the input that this thread block takes. first_token: of the step's, the first
    that the activations are of.
    """

    items: FewItems
    ranks: Any
    ys: Any
    signals: Any
    operands: Callable
    slots: int
    full: Any
    empty: Any
    has_y: Any
    layer: Any
    layers: int
    count: Any
    first_token: Any = None

    def run(self) -> None:
        """All the pair's items, and then its parts of their sums: others wait for what it shrinks."""
        self.shrink(jnp.int32(0))
        self.add_up()

    def shrink(self, before) -> None:
        """All items, from the ring's stage `before` on."""
        lax.fori_loop(0, self.items.count, self._shrink, before)

    def add_up(self, *others: "FewShrink") -> None:
        """The pair's parts of sums, and others' of the same items for other tokens."""

        @pl.loop(0, self.items.count)
        def _(j):
            pl.when(self.items.is_own(self.items.item(j).block))(lambda: self._add_up(j, others))

    def _signal(self, item):
        return self.items.signal(self.layer, self.layers, item.module, item.block)

    def _shrink(self, j, before):
        """The pair's j-th item, before which the ring had so many stages. Returns how many there then were. Sums
        are zero for tokens that are not their adapter's.
        """
        item = self.items.item(j)
        _, stages = self.items.stages(item.share, self.count)
        its_ranks, shape = self.ranks.at[self.layer, item.module, item.block], (FEW_TOKENS, STAGE_ROWS)
        load = lambda row: plgpu.load(its_ranks.at[row], layout=_WGMMA.reduce(0), optimized=False)  # noqa: E731
        vectors = [lax.broadcast_in_dim(load(row), shape, (1,)) for row in (FIRST, LAST, SCALE)]
        slot_of = lambda k: lax.rem(before + k, jnp.int32(self.slots))  # noqa: E731

        def accumulate(total):
            @pl.loop(0, stages)
            def _(k):
                slot = slot_of(k)
                plgpu.barrier_wait(self.full.at[slot])
                x, a = self.operands(slot)
                plgpu.wgmma(total, x, a.T)
                plgpu.wgmma_wait(0)
                pl.when(k + 1 < stages)(lambda: plgpu.barrier_arrive(self.empty.at[slot]))

            return total[...]

        found = pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))
        first, last, scale = vectors
        token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA)
        token = (token if self.first_token is None else token + self.first_token).astype(jnp.float32)
        y, _ = self.operands(slot_of(stages - 1))
        y[...] = jnp.where((token >= first) & (token < last), found * scale, 0.0).astype(self.ys.dtype)
        plgpu.commit_smem()
        summand = item.share * self.items.parts + self.items.part
        plgpu.copy_smem_to_gmem(y, self.ys.at[self.items.y_rows(item.place, item.block, summand)])
        plgpu.wait_smem_to_gmem(0)
        if self.has_y is None:
            signal(self.signals, self._signal(item))
        plgpu.barrier_arrive(self.empty.at[slot_of(stages - 1)])
        return before + stages

    def _add_up(self, j, others) -> None:
        """Some tokens' y of the block of the pair's j-th item."""
        item = self.items.item(j)
        if self.has_y is None:
            signalled = self.items.summands * (1 + len(others))
            await_signals(self.signals, self._signal(item), signalled)
            leave(self.signals, self._signal(item), signalled + self.items.shares)
        for part, total in [(part, part._total(item)) for part in (self, *others)]:
            part.ys[part._rows(item, part.items.summands), :] = total
        if self.has_y is None:
            signal(self.signals, self._signal(item) + 1)
        else:
            plgpu.barrier_arrive(self.has_y.at[item.block])

    def _rows(self, item, summand):
        """Of a summand, for the tokens of the item's share."""
        size = FEW_TOKENS // self.items.shares
        return pl.ds(self.items.y_row(item.place, item.block, summand) + item.share * size, size)

    def _total(self, item):
        summands = range(self.items.summands)
        return sum(self.ys[self._rows(item, i), :].astype(jnp.float32) for i in summands).astype(self.ys.dtype)
