"""Tuning of the Hopper LoRA kernels: a frozen config, heuristic defaults, and a table per device and shape.

Fields marked *fixed* decide the order of float32 additions. They may depend on the geometry, never on the batch: a
token's result must not change with its neighbours. All others only move work around.
"""

import dataclasses

from pallas_kernels.geometry import TILE_COLS, Geometry
from pallas_kernels.tuning import measured

NUM_SMS = 132
CLUSTER = 2
"""Thread blocks that share an item where one launch shrinks and expands. Two are neighbours on any GPU; of clusters of
four, an H200 runs no more than thirty at a time.
"""
CLUSTERS = NUM_SMS // CLUSTER
SHORT_STEP = 1024
"""Steps up to this many tokens use blocks of eight for all segments: a second pair of launches costs more."""
PRODUCT_STEP = 1024
"""Steps from this many tokens on compute the base projection in one kernel with what long segments add: its tiles of
128 tokens and 256 outputs have to be enough for all multiprocessors.
"""
FEW_TOKENS = 64
"""Steps up to this many tokens can do so as well if their adapters are few: have MOST_FEW ranks or less in all."""
FEW_TILE_TOKENS = 256
"""Steps of just so many can as well, in groups of projections that are wide enough."""
MOST_FEW = 128
"""Of which an adapter takes `few_ranks`."""
SHORT_SEGMENT = 16
"""In larger steps, segments up to this many tokens do. A block of 64 with one token would read 64 rows of output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Sizes of the kernels: of the one for short segments (blocks of eight tokens) and of the two for long ones.

    block_tokens: tokens of one segment that share a tensor-core instruction (its N).
    num_splits: *fixed*. Parts that the input width is cut into; each is summed on its own and the parts are added in
    order.
    chunk_tiles: most tiles (1 KB each) that one bulk copy moves.
    range_tiles: output tiles (64 columns each) that one work item of expand covers; twice as many where there are
    enough items all the same, half as many where there are not enough for all multiprocessors.
    shrink_stages, expand_stages: depth of the shared-memory ring, in stages of eight granule chunks; the kernel for
    short segments has one ring, of expand_stages.
    shrink_packed: most chunks of columns that share a stage of shrink, where a rank block has few granules.
    expand_packed: most chunks of outputs that share a stage of expand, where a module has few granules.
    out_slots: blocks of base output in flight in expand of long segments.
    shrink_ctas, expand_ctas: size of the persistent grids: multiples of the multiprocessors.
    """

    block_tokens: int = 8
    num_splits: int = 8
    chunk_tiles: int = 4
    range_tiles: int = 32
    shrink_stages: int = 3
    expand_stages: int = 4
    shrink_packed: int = 4
    expand_packed: int = 4
    out_slots: int = 2
    shrink_ctas: int = NUM_SMS
    expand_ctas: int = NUM_SMS

    def __post_init__(self):
        if self.block_tokens not in (8, 16, 32, 64):
            raise ValueError(f"block_tokens must be 8, 16, 32 or 64, not {self.block_tokens}")
        if self.shrink_packed not in (1, 2, 4):
            raise ValueError(f"shrink_packed must be 1, 2 or 4, not {self.shrink_packed}")
        if self.expand_packed not in (2, 4):
            raise ValueError(f"expand_packed must be 2 or 4, not {self.expand_packed}")


def few_ranks(ranks):
    """Ranks of MOST_FEW that adapters of so many ranks take, arrays of any kind: 16, 32 or a multiple of 64.

    Sixteen are summed by one instruction, and 64 go through the kernel together. Whose ranks lie in two such blocks
    begins one, so that what is summed with what does not depend on other adapters.
    """
    return (ranks > 0) * ((ranks <= 32) * (16 + 16 * (ranks > 16)) + (ranks > 32) * (-(-ranks // 64) * 64))


def chunk_tiles(geometry: Geometry, limit: int) -> int:
    """Tiles moved by one copy: the largest power of two up to `limit` that divides every width in tiles and a page.

    Sections then start at multiples of it, so that a chunk never straddles two pages.
    """
    chunk = limit
    widths = [w // TILE_COLS for w in (*geometry.in_sizes, *geometry.out_sizes)]
    while any(w % chunk for w in (*widths, geometry.page_tiles)):
        chunk //= 2
    return chunk


def shape_key(geometry: Geometry) -> str:
    """Name of a shape in the table of measured configs: widths of the hidden state, of keys and of the MLP."""
    return f"h{geometry.in_sizes[0]}-k{geometry.out_sizes[1]}-f{geometry.in_sizes[6]}"


def default_config(geometry: Geometry, segment_tokens: int) -> LoraConfig:
    """The measured config of this device for segments of up to `segment_tokens` tokens, or a heuristic default."""
    short = segment_tokens <= SHORT_SEGMENT
    if found := measured("lora_short" if short else "lora_long", shape_key(geometry)):
        return LoraConfig(**found)
    if short:
        return LoraConfig()
    return LoraConfig(block_tokens=64, shrink_packed=1, expand_stages=2)
