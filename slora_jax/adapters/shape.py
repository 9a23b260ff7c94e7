"""`AdapterShape`: what is known of an adapter without its weights. Adapters of one training recipe have the same."""

import dataclasses
import functools

from jaxtyping import Float32, Int32
import numpy as np

from pallas_kernels.geometry import GROUPS, MODULES, TILE_RANKS, Geometry, ceil_div
from slora_jax.adapters.image import layer_tiles
from slora_jax.errors import AdapterError
from slora_jax.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AdapterShape:
    """Ranks, scaling and the widths of the base model.

    ranks: int32 [L, 7], true rank of each layer and module of MODULES, 0 where a module is not targeted.
    scaling: float32 [L, 7], factor of ``B A``, 0 where a module is not targeted.
    in_sizes, out_sizes: widths of the 7 modules.
    """

    ranks: Int32[np.ndarray, "L 7"]
    scaling: Float32[np.ndarray, "L 7"]
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]

    @functools.cached_property
    def granules(self) -> Int32[np.ndarray, "L 7"]:
        """Ranks in granules of 8, rounded up."""
        granules = -(-self.ranks // TILE_RANKS)
        granules.setflags(write=False)
        return granules

    @functools.cached_property
    def module_granules(self) -> Int32[np.ndarray, "7"]:
        """Granules of each module in the layer where it has most."""
        granules = self.granules.max(axis=0)
        granules.setflags(write=False)
        return granules

    @functools.cached_property
    def max_rank(self) -> int:
        return int(self.ranks.max())

    @functools.cached_property
    def targets(self) -> tuple[str, ...]:
        """Modules that are targeted in at least one layer, in the order of MODULES."""
        return tuple(module for module, used in zip(MODULES, self.ranks.any(axis=0), strict=True) if used)

    @functools.cached_property
    def groups(self) -> frozenset[str]:
        """Groups of projections of which at least one is targeted."""
        return frozenset(g for g, members in GROUPS.items() if self.ranks[:, list(members)].any())

    @property
    def rank_summary(self) -> str:
        """The rank, or "lowest-highest" where layers or modules differ."""
        ranks = self.ranks[self.ranks > 0]
        return str(ranks.max()) if ranks.min() == ranks.max() else f"{ranks.min()}-{ranks.max()}"

    def num_tiles(self, geometry: Geometry) -> int:
        """Adapter tiles of the whole image."""
        self._check_geometry(geometry)
        return int(layer_tiles(self.granules, geometry).sum())

    def num_pages(self, geometry: Geometry) -> int:
        """Page ids that the adapter takes in the pool."""
        return ceil_div(self.num_tiles(geometry), geometry.tiles_per_page_id)

    def tile_start(self, geometry: Geometry) -> Int32[np.ndarray, "L"]:
        """Tile of the image at which each layer begins."""
        self._check_geometry(geometry)
        tiles = layer_tiles(self.granules, geometry)
        return (np.cumsum(tiles) - tiles).astype(np.int32)

    def check_fits(self, config: ModelConfig) -> None:
        """Raises AdapterError where the adapter was made for a model of other sizes."""
        ours = (self.ranks.shape[0], self.in_sizes, self.out_sizes)
        if ours != (config.num_layers, config.in_sizes, config.out_sizes):
            raise AdapterError(
                f"{self.label} is for a model of {ours[0]} layers, input widths {ours[1]} and output "
                f"widths {ours[2]}; this base model has {config.num_layers} layers, {config.in_sizes} and "
                f"{config.out_sizes}; give an adapter of this base model"
            )

    @property
    def label(self) -> str:
        """How messages call the adapter."""
        return "the adapter"

    def _check_geometry(self, geometry: Geometry) -> None:
        ours = (self.ranks.shape[0], self.in_sizes, self.out_sizes)
        theirs = (geometry.num_layers, geometry.in_sizes, geometry.out_sizes)
        if ours != theirs:
            raise ValueError(f"adapter of (layers, input widths, output widths) {ours} cannot be laid out for {theirs}")
