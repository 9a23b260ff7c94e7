"""Named LoRA shapes that tests, benchmarks and tuning share."""

import dataclasses

import numpy as np

from pallas_kernels.geometry import GROUPS, MODULES, Geometry

LLAMA2_7B = Geometry(
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    in_sizes=(4096,) * 6 + (11008,),
    out_sizes=(4096,) * 4 + (11008, 11008, 4096),
)
LLAMA31_8B = Geometry(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    in_sizes=(4096,) * 6 + (14336,),
    out_sizes=(4096, 1024, 1024, 4096, 14336, 14336, 4096),
)
GEOMETRIES = {"7b": LLAMA2_7B, "8b": LLAMA31_8B}

ATTENTION_MODULES = ("q", "k", "v", "o")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """A batch: segment i has ``segments[i]`` tokens and uses adapter ``i % len(ranks)``, whose modules all have rank
    ``ranks[...]``.
    """

    geometry: Geometry
    segments: tuple[int, ...]
    ranks: tuple[int, ...]
    modules: tuple[str, ...] = MODULES

    @property
    def num_tokens(self) -> int:
        return sum(self.segments)

    @property
    def max_rank(self) -> int:
        return max(self.ranks)

    @property
    def groups(self) -> list[str]:
        return [g for g, members in GROUPS.items() if any(MODULES[m] in self.modules for m in members)]

    def granules(self) -> np.ndarray:
        """int32[A, L, 7]"""
        targeted = np.array([m in self.modules for m in MODULES])
        granules = -(-np.array(self.ranks)[:, None] // 8) * targeted
        return np.repeat(granules[:, None].astype(np.int32), self.geometry.num_layers, axis=1)

    def layout(self) -> dict[str, np.ndarray]:
        """Arrays of an AdapterTable (but for `pages`, which the caller numbers) and the page ids each adapter needs."""
        granules = self.granules()
        geometry = self.geometry
        widths = np.array([geometry.in_tiles(m) + geometry.out_tiles(m) for m in range(len(MODULES))])
        tiles = (granules * widths).sum(axis=2)
        pages = -(-tiles.sum(axis=1) // geometry.tiles_per_page_id)
        return dict(
            page_start=np.cumsum(pages) - pages,
            tile_start=(np.cumsum(tiles, axis=1) - tiles).astype(np.int32),
            granules=granules,
            num_pages=pages,
        )

    def weight_bytes(self, group: str) -> tuple[int, int]:
        """Bytes of distinct weights that shrink and expand of one layer must read."""
        granules = self.granules()[: len(self.segments), 0]
        shrink = sum(granules[:, m].sum() * self.geometry.in_tiles(m) for m in GROUPS[group])
        expand = sum(granules[:, m].sum() * self.geometry.out_tiles(m) for m in GROUPS[group])
        return int(shrink) * 1024, int(expand) * 1024


def _specs(name: str, geometry: Geometry) -> dict[str, LoraSpec]:
    mixed = (8, 16, 32, 64, 128, 16, 8, 32)

    def spec(segments, ranks, modules=MODULES):
        return LoraSpec(geometry=geometry, segments=tuple(segments), ranks=tuple(ranks), modules=modules)

    specs = {
        "decode_64_distinct_r16_qkvo": spec([1] * 64, [16] * 64, ATTENTION_MODULES),
        "decode_256_distinct_r16_qkvo": spec([1] * 256, [16] * 256, ATTENTION_MODULES),
        "decode_64_distinct_r16_all": spec([1] * 64, [16] * 64),
        "decode_256_distinct_r16_all": spec([1] * 256, [16] * 256),
        "decode_64_mixed_qkvo": spec([1] * 64, mixed * 8, ATTENTION_MODULES),
        "decode_1_r16_all": spec([1], [16]),
        "decode_64_one_adapter": spec([64], [16]),
        "decode_256_one_adapter": spec([256], [16]),
        "decode_64_8_adapters": spec([8] * 8, [16] * 8),
        "decode_256_8_adapters": spec([32] * 8, [16] * 8),
    }
    for rank in (16, 64):
        for segments in (1, 8, 64):
            specs[f"prefill_2048_{segments}_segments_r{rank}"] = spec([2048 // segments] * segments, [rank] * segments)
    return {f"{name}_{key}": value for key, value in specs.items()}


SPECS: dict[str, LoraSpec] = {k: v for name, g in GEOMETRIES.items() for k, v in _specs(name, g).items()}

__all__ = ["GEOMETRIES", "LLAMA2_7B", "LLAMA31_8B", "SPECS", "LoraSpec"]
