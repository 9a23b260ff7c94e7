"""Gathered LoRA matmuls over the page pool: ``out += scaling * (x A) B`` for a batch of tokens with many adapters.

Tokens are ordered in segments of one adapter. Weights are gathered from pages at their true rank (the MBGMV and MBGMM
kernels of S-LoRA, arXiv 2311.03285, section 5.3). ``lora_shrink`` and ``lora_expand`` are a pair: what one returns,
the other takes. ``lora_add`` does both, on GPUs in one launch where segments are short. ``lora_matmul`` does both and
the base projection; on GPUs, in large steps, in one kernel with it. ``lora_matmul_silu_mul`` goes on to SiLU·mul.
"""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, log_fallback, use_mosaic
from pallas_kernels.geometry import GROUPS, Geometry
from pallas_kernels.lora import (
    kernel_few_sm90,
    kernel_few_tiles_sm90,
    kernel_gated_sm90,
    kernel_matmul_sm90,
    kernel_sm90,
    reference,
)
from pallas_kernels.lora.config import FEW_TILE_TOKENS, FEW_TOKENS, MOST_FEW, PRODUCT_STEP, few_ranks
from pallas_kernels.lora.table import AdapterTable, empty_table
from pallas_kernels.lora.token_rows import Intermediate, from_token_rows, to_token_rows
from pallas_kernels.silu_mul import silu_mul

__all__ = [
    "FEW_TILE_TOKENS",
    "FEW_TOKENS",
    "MOST_FEW",
    "AdapterTable",
    "empty_table",
    "few_ranks",
    "from_token_rows",
    "lora_add",
    "lora_expand",
    "lora_matmul",
    "lora_matmul_silu_mul",
    "lora_shrink",
    "pair_implementation",
    "small_for_few",
    "to_token_rows",
]


def small_for_few(num_tokens: int, geometry: Geometry) -> bool:
    """Whether `lora_matmul` has a use for few_adapters in steps of so many tokens, with any group of projections."""
    if num_tokens == FEW_TILE_TOKENS:
        return any(kernel_few_tiles_sm90.is_wide(geometry, group) for group in GROUPS)
    return num_tokens <= FEW_TOKENS


def pair_implementation(
    x: Float[Array, "T c"],
    out: Float[Array, "T d"],
    pages: Float[Array, "L P E"],
    *,
    group: str,
    shrink: Geometry,
    expand: Geometry,
    max_rank: int,
    implementation: Implementation = "auto",
) -> Implementation:
    """Which implementation both lora_shrink of `x` and lora_expand into `out` can take, each with its geometry."""

    def unsupported() -> str | None:
        options: dict[str, Any] = dict(group=group, max_rank=max_rank)
        reason = kernel_sm90.unsupported(x, pages, geometry=shrink, **options)
        return reason or kernel_sm90.unsupported(out, pages, geometry=expand, **options)

    return "mosaic" if use_mosaic("LoRA", implementation, unsupported) else "xla"


def lora_shrink(
    x: Float[Array, "T c"],
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
    max_rank: int,
    implementation: Implementation = "auto",
) -> Intermediate:
    """``x A^T`` of every token with its own adapter, for all modules of a group that share the input ``x``.

    seg_start: token offsets of the segments, non-decreasing; tokens past the last one are padding.
    seg_adapter: row of `table` for each segment, -1 for base-model tokens.
    layer: index of the layer. group: "qkv", "o", "gu" or "down".
    max_rank: bound on the rank of one module; it only sizes the result.
    Returns float32 intermediates that `lora_expand` takes, called with the same arguments; their layout is the
    implementation's own.
    """
    args = (x, pages, table, seg_start, seg_adapter)
    options: dict[str, Any] = dict(layer=layer, group=group, geometry=geometry, max_rank=max_rank)
    if use_mosaic(
        "lora_shrink",
        implementation,
        lambda: kernel_sm90.unsupported(x, pages, group=group, geometry=geometry, max_rank=max_rank),
    ):
        return kernel_sm90.shrink_sm90(*args, **options)
    return reference.shrink(*args, **options)


def lora_expand(
    out: Float[Array, "T c"],
    y: Intermediate,
    pages: Float[Array, "L P E"],
    table: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    geometry: Geometry,
    max_rank: int,
    implementation: Implementation = "auto",
) -> Float[Array, "T c"]:
    """Adds every token's delta ``y B^T`` to the base projections `out`, side by side as q|k|v or gate|up.

    Accumulates in float32 and rounds once to `out`'s dtype. Tokens without an adapter come back bit for bit.
    """
    where = (pages, table, seg_start, seg_adapter)
    options: dict[str, Any] = dict(layer=layer, group=group, geometry=geometry)
    if use_mosaic(
        "lora_expand",
        implementation,
        lambda: kernel_sm90.unsupported(out, pages, group=group, geometry=geometry, max_rank=max_rank),
    ):
        assert isinstance(y, tuple), "lora_shrink was called with another implementation"
        return kernel_sm90.expand_sm90(out, y, *where, **options, max_rank=max_rank)
    assert not isinstance(y, tuple), "lora_shrink was called with another implementation"
    return reference.expand(out, y, *where, **options)


def lora_add(
    out: Float[Array, "T c"],
    x: Float[Array, "T d"],
    pages: Float[Array, "L P E"],
    shrink: AdapterTable,
    expand: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    shrink_geometry: Geometry,
    expand_geometry: Geometry,
    max_rank: int,
    implementation: Implementation = "auto",
) -> Float[Array, "T c"]:
    """`lora_expand` into `out` of `lora_shrink` of `x`: with one geometry the same result bit for bit.

    shrink, expand: where the adapters' A and B are, with the geometry of each; on one device both are the same.
    """
    options: dict[str, Any] = dict(layer=layer, group=group, max_rank=max_rank)
    implementation = pair_implementation(
        x,
        out,
        pages,
        group=group,
        shrink=shrink_geometry,
        expand=expand_geometry,
        max_rank=max_rank,
        implementation=implementation,
    )
    if implementation == "mosaic":
        a = kernel_sm90.Matrices(table=shrink, geometry=shrink_geometry)
        b = kernel_sm90.Matrices(table=expand, geometry=expand_geometry)
        return kernel_sm90.add_sm90(out, x, pages, a, b, seg_start, seg_adapter, **options)
    options["implementation"] = implementation
    y = lora_shrink(x, pages, shrink, seg_start, seg_adapter, geometry=shrink_geometry, **options)
    return lora_expand(out, y, pages, expand, seg_start, seg_adapter, geometry=expand_geometry, **options)


def lora_matmul(
    x: Float[Array, "T d"],
    weights: Float[Array, "L d c"] | None,
    base: Callable[[], Float[Array, "T c"]],
    pages: Float[Array, "L P E"],
    shrink: AdapterTable,
    expand: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    group: str,
    shrink_geometry: Geometry,
    expand_geometry: Geometry,
    max_rank: int,
    few_adapters: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "T c"]:
    """`lora_add` to the base projection ``x @ weights[layer]``, which `base` computes unless one kernel does both.

    weights: of all layers, in x's dtype; None if the base projection is not such a product. The bits are those of
    `lora_add` to the same base outputs, rounded to x's dtype. Otherwise as lora_shrink. Raises UnsupportedInput if
    implementation is "mosaic" and the kernels of lora_add cannot take the input.

    few_adapters: promises that the segments' adapters take MOST_FEW ranks or less in all (few_ranks), in each module of
    each layer and counted in every segment that names them. On GPUs a step of up to FEW_TOKENS tokens is then one
    kernel with the base projection, and so is one of FEW_TILE_TOKENS in groups of many outputs (q, k and v; gate and
    up). Its sums have another order; where the promise does not hold its results are NaN.
    """
    geometries: dict[str, Any] = dict(shrink_geometry=shrink_geometry, expand_geometry=expand_geometry)
    options: dict[str, Any] = dict(group=group, max_rank=max_rank)
    kind: dict[str, Any] = dict(few_adapters=few_adapters, implementation=implementation)
    chosen = _product_implementation(x, weights, pages, **geometries, **options, **kind)
    if chosen == "few":
        assert weights is not None
        adapters, _ = _matrices(shrink, expand, **geometries)
        return kernel_sm90.few_sm90(x, weights, pages, adapters, seg_start, seg_adapter, layer=layer, group=group)
    if chosen == "product":
        assert weights is not None
        a, b = _matrices(shrink, expand, **geometries)
        return kernel_sm90.matmul_sm90(x, weights, pages, a, b, seg_start, seg_adapter, layer=layer, **options)
    segments = pages, shrink, expand, seg_start, seg_adapter
    options |= geometries
    return lora_add(base(), x, *segments, layer=layer, **options, implementation=chosen)


def lora_matmul_silu_mul(
    x: Float[Array, "T d"],
    weights: Float[Array, "L d F2"],
    base: Callable[[], Float[Array, "T F2"]],
    pages: Float[Array, "L P E"],
    shrink: AdapterTable,
    expand: AdapterTable,
    seg_start: Int[Array, "S1"],
    seg_adapter: Int[Array, "S"],
    *,
    layer: int | Int[Array, ""],
    shrink_geometry: Geometry,
    expand_geometry: Geometry,
    max_rank: int,
    few_adapters: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "T F"]:
    """`silu_mul` of `lora_matmul` for the group "gu", with the same bits; on GPUs, in large steps, in one kernel."""
    geometries: dict[str, Any] = dict(shrink_geometry=shrink_geometry, expand_geometry=expand_geometry)
    options: dict[str, Any] = dict(group=kernel_gated_sm90.GROUP, max_rank=max_rank)
    kind: dict[str, Any] = dict(few_adapters=few_adapters, implementation=implementation)
    chosen = _product_implementation(x, weights, pages, **geometries, **options, **kind)
    if chosen == "product":
        reason = kernel_gated_sm90.unsupported(expand_geometry)
        if reason is None:
            where = pages, *_matrices(shrink, expand, **geometries), seg_start, seg_adapter
            return kernel_sm90.gated_sm90(x, weights, *where, layer=layer, max_rank=max_rank)
        log_fallback("lora_matmul_silu_mul", "SiLU·mul is a kernel of its own", reason)
    segments = pages, shrink, expand, seg_start, seg_adapter
    options |= geometries | kind
    out = lora_matmul(x, weights, base, *segments, layer=layer, **options)
    return silu_mul(out, implementation=implementation)


def _product_implementation(
    x, weights, pages, *, group, shrink_geometry, expand_geometry, max_rank, few_adapters, implementation
) -> Implementation | Literal["product", "few"]:
    """Which implementation lora_add can take, or which one kernel does the base projection as well."""
    geometries: dict[str, Any] = dict(shrink=shrink_geometry, expand=expand_geometry)
    options: dict[str, Any] = dict(group=group, max_rank=max_rank, implementation=implementation)
    chosen = pair_implementation(x, x, pages, **geometries, **options)
    if chosen != "mosaic" or weights is None:
        return chosen
    if x.shape[0] >= PRODUCT_STEP:
        reason = kernel_matmul_sm90.unsupported(x, weights, expand_geometry)
        if reason is None:
            return "product"
    elif few_adapters and x.shape[0] <= FEW_TOKENS:
        reason = kernel_few_sm90.unsupported(x, weights, shrink_geometry, expand_geometry)
        if reason is None:
            return "few"
    elif few_adapters and x.shape[0] == FEW_TILE_TOKENS and kernel_few_tiles_sm90.is_wide(expand_geometry, group):
        reason = kernel_few_tiles_sm90.unsupported(x, weights, shrink_geometry, expand_geometry)
        if reason is None:
            return "few"
    else:
        return chosen
    log_fallback("lora_matmul", "base projection and deltas are two kernels", reason)
    return chosen


def _matrices(shrink, expand, *, shrink_geometry, expand_geometry) -> tuple[kernel_sm90.Matrices, kernel_sm90.Matrices]:
    a = kernel_sm90.Matrices(table=shrink, geometry=shrink_geometry)
    return a, kernel_sm90.Matrices(table=expand, geometry=expand_geometry)
