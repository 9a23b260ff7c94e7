"""Named shapes that tests, benchmarks and tuning of paged_attention share."""

import dataclasses

from pallas_kernels.geometry import Geometry

HEADS = {"mha": (32, 32, 128), "gqa": (32, 8, 128)}
"""Query heads, kv heads and head_dim of Llama-2-7B and Llama-3.1-8B."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """`seqs` sequences, each with `queries` new tokens at the end of `context` tokens in all. The first `shared` of
    these are in the same pages for all.
    """

    seqs: int
    queries: int
    context: int
    heads: int
    kv_heads: int
    dim: int
    shared: int = 0

    @property
    def geometry(self) -> Geometry:
        return geometry(self.heads, self.kv_heads, self.dim)

    @property
    def bytes(self) -> int:
        """Bytes that must move: keys and values once, queries in, results out (2-byte elements)."""
        per_token = 2 * self.kv_heads * self.dim * 2
        tokens = self.seqs * (self.context - self.shared) + self.shared
        return tokens * per_token + self.seqs * 2 * self.queries * self.heads * self.dim * 2

    @property
    def flops(self) -> int:
        """Multiply-adds of both products over the causal part, twice."""
        pairs = self.queries * self.context - self.queries * (self.queries - 1) // 2
        return self.seqs * 4 * pairs * self.heads * self.dim


def geometry(heads: int, kv_heads: int, dim: int, num_layers: int = 1) -> Geometry:
    """A model's sizes as far as attention looks at them; the other projections are made as wide as the queries."""
    width = heads * dim
    return Geometry(
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        in_sizes=(width,) * 7,
        out_sizes=(width, kv_heads * dim, kv_heads * dim, width, width, width, width),
    )


def _shapes(cases: dict[str, tuple[int, ...]]) -> dict[str, AttentionShape]:
    return {
        f"{name}-{kind}": AttentionShape(seqs=s, queries=q, context=c, heads=n, kv_heads=k, dim=d, shared=sum(shared))
        for name, (s, q, c, *shared) in cases.items()
        for kind, (n, k, d) in HEADS.items()
    }


DECODE = _shapes(
    {
        "64x1024": (64, 1, 1024),
        "256x512": (256, 1, 512),
        "8x32768": (8, 1, 32768),
        "1x512": (1, 1, 512),
        "1x8192": (1, 1, 8192),
        "64x2048shared1024": (64, 1, 2048, 1024),
    }
)
PREFILL = _shapes({"4x4096": (4, 4096, 4096), "2048on16k": (1, 2048, 16384 + 2048), "64x32on512": (64, 32, 544)})
