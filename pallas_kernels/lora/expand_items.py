"""Work items of the expand kernel: which weight chunks and outputs belong to one, as int32 scalars inside the
kernel.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from pallas_kernels.geometry import GROUPS, Geometry
from pallas_kernels.geometry import ceil_div as static_ceil_div
from pallas_kernels.lora.config import LoraConfig
from pallas_kernels.lora.mosaic_common import (
    STAGE_CHUNKS,
    ceil_div,
    dealt,
    dealt_item,
    over_chunks,
    stage_chunks,
    stage_height,
)
from pallas_kernels.lora.plan import (
    BLOCK_GRANULES,
    NUM_TOKENS,
    OFFSET,
    PAGE_START,
    TOKEN,
    module_field,
    module_pages,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpandItem:
    """block: token block. token: its first row, of which its own tokens are num_tokens from `offset` on. module: its
    number. length: chunks of outputs, 0 if the adapter does not target the module.

    section: first tile of the module's B; pages: ids of its page and the next. first_tile: of the item.
    height: granules that a chunk of outputs takes in a stage (2, 4 or 8). packed: chunks of outputs in a stage.
    groups: sets of chunks that share a stage. rank_tiles: stages that such a set needs, more than 1 only where packed
    is 1. width: output tiles of the module.
    """

    block: Any
    module: Any
    token: Any
    offset: Any
    num_tokens: Any
    page_start: Any
    section: Any
    pages: tuple
    first_tile: Any
    granules: Any
    y_row: Any
    width: Any
    length: Any
    height: Any
    packed: Any
    rank_tiles: Any
    groups: Any
    num_stages: Any
    out_tile: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpandItems:
    """The items of a launch, numbered token block by token block and dealt out to the programs.

    num_blocks: token blocks in use.
    """

    geometry: Geometry
    group: str
    config: LoraConfig
    chunk: int
    num_blocks: Any
    records: Any
    layer: Any

    def _ranges(self, range_tiles: int):
        """(module, first range, output tiles, first tile of `out`) of each module, and the number of
        ranges.
        """
        ranges, first, tile = [], 0, 0
        for m in GROUPS[self.group]:
            width = self.geometry.out_tiles(m)
            ranges.append((m, first, width, tile))
            first += static_ceil_div(width, range_tiles)
            tile += width
        return ranges, first

    def _cut(self):
        """Ranges of the modules, their number, and tiles of a range, as int32 scalars: the longest of three of which
        there are enough for all programs.
        """
        tiles, ctas = self.config.range_tiles, self.config.expand_ctas
        short = max(tiles // 2, self.chunk)
        chosen = (*self._ranges(short), short)
        for size, least in ((tiles, ctas), (2 * tiles, 4 * ctas)):
            ranges, count = self._ranges(size)
            enough = self.num_blocks * count >= least
            chosen = jax.tree.map(lambda a, b, enough=enough: jnp.where(enough, a, b), (ranges, count, size), chosen)
        return chosen

    def local(self, cta):
        """Items of program `cta`."""
        _, num_ranges, _ = self._cut()
        return dealt(self.num_blocks * num_ranges, cta, self.config.expand_ctas)

    def _place(self, cta, n):
        """Of item n of program `cta`: token block, (module, first range, output tiles, first tile of `out`), which
        range of all, and tiles of a range.
        """
        modules, num_ranges, range_tiles = self._cut()
        index = dealt_item(cta, n, self.config.expand_ctas)
        block, part = lax.div(index, num_ranges), lax.rem(index, num_ranges)
        # A program without items describes one all the same.
        block = jnp.maximum(jnp.minimum(block, self.num_blocks - 1), 0)
        chosen = [jnp.int32(v) for v in modules[0]]
        for values in modules[1:]:
            chosen = [jnp.where(part >= values[1], v, old) for v, old in zip(values, chosen, strict=True)]
        return block, chosen, part, range_tiles

    def fetch(self, cta, n) -> list:
        """What `describe` needs of item n's record."""
        block, (module, *_), _, _ = self._place(cta, n)
        return self.fetch_of(block, module)

    def fetch_of(self, block, module) -> list:
        field, page = module_field(module), module_pages(module)
        fields = (TOKEN, OFFSET, NUM_TOKENS, PAGE_START, field, field + 1, field + 2, page, page + 1)
        return [self.records[block, self.layer, i] for i in fields]

    def describe(self, cta, n, fetched) -> ExpandItem:
        """Item n of program `cta`."""
        block, (module, first_range, width, out_tile), part, range_tiles = self._place(cta, n)
        most = lax.div(range_tiles, jnp.int32(self.chunk))
        return self.item(block, module, width, out_tile, (part - first_range) * most, most, fetched)

    def item(self, block, module, width, out_tile, chunk0, most, fetched) -> ExpandItem:
        """Of a module with `width` output tiles, the first of them `out_tile` of `out`: up to `most` chunks of outputs
        from `chunk0` on.
        """
        token, offset, num_tokens, page_start, section, granules, y_row, *pages = fetched
        length = jnp.clip(lax.div(width, jnp.int32(self.chunk)) - chunk0, 0, most)
        length = jnp.where(granules > 0, length, 0)
        height = stage_height(granules, self.config.expand_packed)
        packed = stage_chunks(height)
        groups = over_chunks(length, packed)
        rank_tiles = jnp.maximum(ceil_div(granules, STAGE_CHUNKS), 1)
        return ExpandItem(
            block=block,
            module=module,
            token=token,
            offset=offset,
            num_tokens=num_tokens,
            page_start=page_start,
            section=section,
            pages=tuple(pages),
            first_tile=section + chunk0 * self.chunk,
            granules=granules,
            y_row=y_row,
            width=width,
            length=length,
            height=height,
            packed=packed,
            rank_tiles=rank_tiles,
            groups=groups,
            num_stages=groups * rank_tiles,
            out_tile=out_tile + chunk0 * self.chunk,
        )

    def max_span(self, rank_blocks: int) -> int:
        """Most tiles that an item's may lie apart."""
        return rank_blocks * BLOCK_GRANULES * max(self.geometry.out_tiles(m) for m in GROUPS[self.group])

    def chunk_tile(self, item: ExpandItem, s, rank_tile, first):
        """Tile of the image where the chunk in place s of a stage begins. first: the stage's first chunk of outputs.

        Places without a chunk of their own repeat the last granule or the last outputs.
        """
        sub = sum(jnp.where(s >= n * item.height, 1, 0) for n in range(1, self.config.expand_packed))
        granule = jnp.minimum(rank_tile * STAGE_CHUNKS + s - sub * item.height, item.granules - 1)
        out_chunk = jnp.minimum(first + sub, item.length - 1)
        return item.first_tile + granule * item.width + out_chunk * self.chunk
