"""Tuning of the Hopper attention kernels: frozen configs, heuristic defaults, and a table per device and shape."""

import dataclasses

from pallas_kernels.geometry import Geometry, ceil_div
from pallas_kernels.tuning import measured

SMEM_BYTES = 227 * 1024
"""Shared memory that one block may use on Hopper."""


def query_rows(geometry: Geometry) -> int:
    """Query heads of one kv head, rounded up to what a wgmma takes as N."""
    return ceil_div(geometry.num_heads // geometry.num_kv_heads, 8) * 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the decode kernel cuts its work.

    block_kv: tokens of one step; a multiple of 64.
    stages: blocks of K and V in flight in each thread block.
    blocks_per_sm: thread blocks on each multiprocessor.
    unsplit: contexts up to this many tokens are not cut, and need no merging.
    min_split, max_splits: longer ones are cut in ``ceil(tokens / min_split)`` parts, at most ``max_splits``. The cut
        depends on the sequence alone, so that its result never depends on the rest of the batch.
    """

    block_kv: int = 64
    stages: int = 3
    blocks_per_sm: int = 2
    unsplit: int = 1024
    min_split: int = 512
    max_splits: int = 32

    def __post_init__(self):
        if self.block_kv % 64 or self.min_split % self.block_kv or self.unsplit % self.block_kv:
            raise ValueError(f"block_kv must be a multiple of 64 and divide min_split and unsplit, not as in {self}")
        if self.stages < 2 or self.blocks_per_sm < 1 or self.max_splits < 1:
            raise ValueError(f"needs stages >= 2, blocks_per_sm >= 1 and max_splits >= 1, not {self}")

    def fits(self, geometry: Geometry) -> bool:
        """Whether the thread blocks' shared memory fits."""
        rows, dim = query_rows(geometry), geometry.head_dim
        ring = self.stages * 2 * self.block_kv * dim * 2
        small = rows * dim * (2 * 2 + 4 + 2) + rows * self.block_kv * 2
        scratch = 2048 + 512  # Mosaic's own, for reductions across warps, and barriers
        return ring + small + scratch <= (SMEM_BYTES + 1024) // self.blocks_per_sm - 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """How the prefill kernel cuts its work.

    block_kv: tokens of one step; a multiple of 64.
    stages: blocks of K and V in flight.
    compute_wgs: computing warpgroups in a thread block, of 64 query rows each.
    """

    block_kv: int = 128
    stages: int = 2
    compute_wgs: int = 2

    def __post_init__(self):
        if self.block_kv % 64 or self.stages < 2 or self.compute_wgs not in (1, 2):
            raise ValueError(f"needs block_kv a multiple of 64, stages >= 2 and compute_wgs 1 or 2, not {self}")

    def smem_bytes(self, head_dim: int) -> int:
        """Shared memory of one thread block, in bytes."""
        return (self.compute_wgs * 64 + 2 * self.stages * self.block_kv) * head_dim * 2 + 2560


def shape_key(geometry: Geometry) -> str:
    """Name of a shape in the table: head_dim, query heads and kv heads of one device."""
    return f"d{geometry.head_dim}-n{geometry.num_heads}-k{geometry.num_kv_heads}"


def decode_config(geometry: Geometry) -> DecodeConfig:
    """The measured config of this device and shape, or a default that fits in shared memory."""
    if found := measured("attention_decode", shape_key(geometry)):
        return DecodeConfig(**found)
    rings = ((2, 6), (2, 4), (2, 3), (1, 6), (1, 4), (1, 3), (1, 2))
    candidates = [DecodeConfig(blocks_per_sm=n, stages=m) for n, m in rings]
    return next((c for c in candidates if c.fits(geometry)), candidates[-1])


def prefill_config(geometry: Geometry) -> PrefillConfig:
    """The measured config of this device and shape, or a default that fits in shared memory."""
    if found := measured("attention_prefill", shape_key(geometry)):
        return PrefillConfig(**found)
    return PrefillConfig(block_kv=64) if geometry.head_dim > 128 else PrefillConfig()
