"""How the unified page pool is cut: pages of KV tokens, and tiles of adapter weights laid over them.

Shape letters used in this package: B sequences, T tokens in a step, L layers, H hidden, N heads, K kv heads,
D head dim, P page ids, S page size, E elements of a page, R rank, A adapters, V vocabulary, F MLP width.

The pool is one array ``pages[L, P, E]``. Element order inside a page is ``[K|V][kv head][token][dim]``; the same bytes
are read as ``E // TILE`` tiles of ``[TILE_RANKS, TILE_COLS]`` where a page holds adapter weights.
"""

import dataclasses

PAGE_TOKENS = 16
TILE_RANKS = 8
TILE_COLS = 64
TILE = TILE_RANKS * TILE_COLS

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
"""Order of the target modules wherever an axis of length 7 stands for them."""

GROUPS = {"qkv": (0, 1, 2), "o": (3,), "gu": (4, 5), "down": (6,)}
"""Modules that share their input and so one shrink and one expand launch: group name -> indices into MODULES."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes that fix the layout of the pool for one model (on one device, when the model is sharded).

    in_sizes / out_sizes: width of each of MODULES' input and output on this device, in elements.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]

    def __post_init__(self):
        if (self.num_kv_heads * self.head_dim) % 16:
            raise ValueError(
                f"kv heads x head dim = {self.num_kv_heads} x {self.head_dim} must be a multiple of 16, "
                "so that a page holds a whole number of adapter tiles"
            )

    @property
    def page_elements(self) -> int:
        """E: elements of one page of one layer."""
        return 2 * self.num_kv_heads * PAGE_TOKENS * self.head_dim

    @property
    def page_tiles(self) -> int:
        """Adapter tiles that one page of one layer holds."""
        return self.page_elements // TILE

    @property
    def tiles_per_page_id(self) -> int:
        """Adapter tiles that one page id holds over all layers."""
        return self.num_layers * self.page_tiles

    def in_tiles(self, module: int) -> int:
        return ceil_div(self.in_sizes[module], TILE_COLS)

    def out_tiles(self, module: int) -> int:
        return ceil_div(self.out_sizes[module], TILE_COLS)
