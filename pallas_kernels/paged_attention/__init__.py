"""Attention of a ragged batch of queries over keys and values that lie in pages."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, use_mosaic
from pallas_kernels.geometry import Geometry
from pallas_kernels.paged_attention import decode_sm90, mixed_sm90, prefill_sm90, reference

__all__ = ["paged_attention"]


def paged_attention(
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    max_query: int,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "T N D"]:
    """Causal attention. Sequence ``b`` owns query rows ``q_start[b]:q_start[b + 1]``, the last of them at position
    ``kv_lens[b] - 1``.

    page_tables: page ids of each sequence in order; keys and values of all ``kv_lens[b]`` tokens are already in the
    pages.
    max_query: 1 if every sequence has at most one query (pure decode), else any bound on their number; decides the
    launch, not the result.
    Rows that belong to no sequence come back finite and otherwise unspecified. Softmax and sums are in float32.
    """
    args = (q, pages, page_tables, q_start, kv_lens)
    options: dict[str, Any] = dict(
        layer=layer, geometry=geometry, sm_scale=sm_scale, sliding_window=sliding_window, soft_cap=soft_cap
    )

    def unsupported() -> str | None:
        reason = decode_sm90.unsupported(geometry, pages.dtype)
        return reason or (prefill_sm90.unsupported(geometry, pages.dtype) if max_query > 1 else None)

    if use_mosaic("paged_attention", implementation, unsupported):
        if max_query == 1:
            return decode_sm90.decode_sm90(*args, **options)
        return mixed_sm90.mixed_sm90(*args, **options)
    return reference.paged_attention(*args, **options, max_query=max_query)
