"""Writes new keys and values into their pages."""

from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, use_mosaic
from pallas_kernels.geometry import PAGE_TOKENS, Geometry
from pallas_kernels.write_kv import kernel_sm90

__all__ = ["write_kv"]


def write_kv(
    pages: Float[Array, "L P E"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    page_ids: Int[Array, "T"],
    slots: Int[Array, "T"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    implementation: Implementation = "auto",
) -> Float[Array, "L P E"]:
    """Puts token ``t``'s key and value into slot ``slots[t]`` (0 to 15) of page ``page_ids[t]``.

    A page id of P or more marks a padding token, which is dropped. In place when `pages` is donated or already a
    temporary.
    """

    def unsupported() -> str | None:
        return kernel_sm90.unsupported(geometry, pages.dtype)

    # XLA's scatter of a single token is the faster one (2 against 3 µs on an H200)
    single = implementation == "auto" and k.shape[0] == 1
    if not single and use_mosaic("write_kv", implementation, unsupported):
        return kernel_sm90.write_kv_sm90(pages, k, v, page_ids, slots, layer=layer, geometry=geometry)
    view = pages.reshape(*pages.shape[:2], 2, geometry.num_kv_heads, PAGE_TOKENS, geometry.head_dim)
    kv = jnp.stack([k, v], axis=1).astype(pages.dtype)
    which = jnp.arange(2, dtype=jnp.int32)
    view = view.at[layer, page_ids[:, None], which, :, slots[:, None]].set(kv, mode="drop")
    return view.reshape(pages.shape)
