"""How the warps that fill the rings of the kernels for few adapters claim stages and start copies."""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bulk_copy import expect, start_copy
from pallas_kernels.geometry import TILE_COLS, TILE_RANKS
from pallas_kernels.lora.few_plan import IS_USED, PAGE_START, PAGES
from pallas_kernels.lora.few_ring import Kind

TILE_BYTES = 2 * TILE_RANKS * TILE_COLS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewCopies:
    """Of one warp. ring: the sizes. empty: barriers of its slots. pool, records, page_ids: in global memory, see
    FewPlan.
    """

    ring: Any
    warp: Any
    pool: Any
    records: Any
    page_ids: Any
    empty: Any
    layer: Any

    def _claim(self, issued, full, num_bytes):
        """The slot of the `issued`-th stage, as soon as it is empty, and its barrier. num_bytes: that this warp will
        copy to it.
        """
        slot = lax.rem(issued, jnp.int32(self.ring.slots))

        @pl.when(issued >= self.ring.slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        barrier = full.at[slot]
        if self.ring.tiles.whole:  # in interpret mode copies announce themselves
            expect(barrier, num_bytes)
        return slot, barrier

    def _if(self, wanted, copy: Callable) -> None:
        """``copy(predicate)``, which in interpret mode is called in any case: its copies arrive one by one."""
        if self.ring.tiles.whole:
            pl.when(wanted)(lambda: copy(jnp.bool_(True)))
        else:
            copy(wanted)

    def _copy(self, source, target, barrier, wanted, *, read_once: bool = False) -> None:
        if self.ring.tiles.whole:
            start_copy(source, target, barrier, wanted, read_once=read_once)
        else:
            self.ring.tiles.copy_if(wanted, source, target, barrier)

    def _fill(self, barrier, kind: Kind) -> None:
        for _ in range(self.ring.missing(kind)):
            plgpu.barrier_arrive(barrier)

    def _granules(self, module, block, kind: int, mine: list) -> list:
        """Of granules of a block: where they lie, in the form that a loop carries."""
        records = [self.records.at[self.layer, module, block, g] for g in mine]
        fields = (kind, PAGE_START, IS_USED, PAGES[kind], PAGES[kind] + 1)
        return [[record[field] for field in fields] for record in records]

    def _copy_tile(self, granule, tile, span: int, tiles_of_ring, row, barrier, wanted) -> None:
        """A granule's tile, of `span`."""
        first, page_start, _, *known = granule
        tiles = self.ring.tiles
        pages = tiles.pages(first, span, known, page_start, self.page_ids)
        index = tiles.locate(first + jnp.where(wanted, tile, 0), pages)
        tiles.copy(self.pool, index, tiles_of_ring, row, barrier, wanted)
