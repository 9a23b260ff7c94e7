"""Kernels over one page pool that holds KV cache and LoRA adapters alike. Imports jax only."""

from pallas_kernels.add_rms_norm import add_rms_norm
from pallas_kernels.dispatch import Implementation, UnsupportedInput
from pallas_kernels.geometry import GROUPS, MODULES, PAGE_TOKENS, Geometry
from pallas_kernels.lora import (
    FEW_TILE_TOKENS,
    FEW_TOKENS,
    MOST_FEW,
    AdapterTable,
    empty_table,
    few_ranks,
    lora_add,
    lora_expand,
    lora_matmul,
    lora_matmul_silu_mul,
    lora_shrink,
    small_for_few,
)
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rope_write_kv import rope_write_kv
from pallas_kernels.silu_mul import silu_mul
from pallas_kernels.write_adapter import write_adapter
from pallas_kernels.write_kv import write_kv

__all__ = [
    "FEW_TILE_TOKENS",
    "FEW_TOKENS",
    "GROUPS",
    "MODULES",
    "MOST_FEW",
    "PAGE_TOKENS",
    "AdapterTable",
    "Geometry",
    "Implementation",
    "UnsupportedInput",
    "add_rms_norm",
    "empty_table",
    "few_ranks",
    "lora_add",
    "lora_expand",
    "lora_matmul",
    "lora_matmul_silu_mul",
    "lora_shrink",
    "paged_attention",
    "rope_write_kv",
    "silu_mul",
    "small_for_few",
    "write_adapter",
    "write_kv",
]
