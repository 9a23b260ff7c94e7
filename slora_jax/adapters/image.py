"""An adapter's image: its weights as one run of tiles, the form in which they lie in the page pool.

Order: layers; in a layer the groups qkv, o, gu, down; in a group the A tiles of each of its modules (rank granule,
then column of the input), then for each module its B tiles (rank granule, then column of the output). A tile is 8
ranks x 64 columns, row-major; B is transposed into it. Ranks and widths that are no multiple of 8 and 64 are filled up
with zeros.
"""

import numpy as np

from pallas_kernels.geometry import GROUPS, TILE_COLS, TILE_RANKS, Geometry, ceil_div
from slora_jax.adapters.host_memory import map_zeros
from slora_jax.adapters.weights import Weights


def layer_tiles(granules: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Tiles that each layer takes, int64 [L]. granules: int32 [L, 7]."""
    per_granule = [geometry.in_tiles(m) + geometry.out_tiles(m) for m in range(granules.shape[1])]
    return granules.astype(np.int64) @ np.array(per_granule, np.int64)


def build_image(weights: Weights, granules: np.ndarray, geometry: Geometry, dtype: np.dtype) -> np.ndarray:
    """All tiles of an adapter, padded with zeros to whole page ids: `dtype` [num_pages, L, E]."""
    num_pages = ceil_div(int(layer_tiles(granules, geometry).sum()), geometry.tiles_per_page_id)
    image = map_zeros((num_pages, geometry.num_layers, geometry.page_elements), dtype)
    run = image.reshape(-1, TILE_RANKS, TILE_COLS)
    at = 0
    for layer in range(geometry.num_layers):
        for modules in GROUPS.values():
            present = [m for m in modules if granules[layer, m]]
            for m in present:
                at = write_tiles(run, at, weights.factor(layer, m, 0))
            for m in present:
                at = write_tiles(run, at, weights.factor(layer, m, 1).T)
    return image


def write_tiles(run: np.ndarray, at: int, matrix: np.ndarray) -> int:
    """Cuts a [ranks, columns] matrix into tiles of `run` from tile `at` on; returns the tile after the last."""
    ranks, columns = ceil_div(matrix.shape[0], TILE_RANKS), ceil_div(matrix.shape[1], TILE_COLS)
    if matrix.shape != (ranks * TILE_RANKS, columns * TILE_COLS):
        padded = np.zeros((ranks * TILE_RANKS, columns * TILE_COLS), run.dtype)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        matrix = padded
    tiles = run[at : at + ranks * columns].reshape(ranks, columns, TILE_RANKS, TILE_COLS)
    tiles.transpose(0, 2, 1, 3)[...] = matrix.reshape(ranks, TILE_RANKS, columns, TILE_COLS)
    return at + ranks * columns
