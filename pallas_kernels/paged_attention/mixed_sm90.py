"""A step of decode tokens and prompt chunks on Hopper: two launches that write one result."""

import functools

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import Geometry
from pallas_kernels.paged_attention.config import DecodeConfig, PrefillConfig
from pallas_kernels.paged_attention.decode_sm90 import decode_into
from pallas_kernels.paged_attention.prefill_sm90 import pad_tokens, prefill_into

_STATIC = ("geometry", "sm_scale", "sliding_window", "soft_cap", "decode_config", "prefill_config", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)  # so that a model's unrolled layers share one lowering
def mixed_sm90(
    q: Float[Array, "T N D"],
    pages: Float[Array, "L P E"],
    page_tables: Int[Array, "B Pmax"],
    q_start: Int[Array, "B1"],
    kv_lens: Int[Array, "B"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    decode_config: DecodeConfig | None = None,
    prefill_config: PrefillConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T N D"]:
    """Attention of sequences with one token (decode kernel) and with several (prefill kernel). Padding rows: zero."""
    tokens = q.shape[0]
    q = pad_tokens(q)
    out_ref = jax.new_ref(jnp.empty(q.shape, q.dtype))
    args = (out_ref, q, pages, page_tables, q_start, kv_lens)
    kwargs = dict(layer=layer, geometry=geometry, sm_scale=sm_scale, sliding_window=sliding_window, soft_cap=soft_cap)
    decode_into(*args, **kwargs, config=decode_config, interpret=interpret)
    prefill_into(*args, **kwargs, config=prefill_config, skip_decode=True, interpret=interpret)
    return jax.freeze(out_ref)[:tokens]
