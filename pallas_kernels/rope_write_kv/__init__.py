"""Rotary embedding of new queries and keys, and the write of keys and values into their pages."""

from typing import Any

from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.add_rms_norm import rms_norm
from pallas_kernels.dispatch import Implementation, use_mosaic
from pallas_kernels.geometry import Geometry
from pallas_kernels.rope_write_kv import kernel_sm90
from pallas_kernels.write_kv import write_kv

__all__ = ["rope_write_kv", "rotate"]


def rotate(x: Float[Array, "T n D"], cos: Float[Array, "T d"], sin: Float[Array, "T d"]) -> Float[Array, "T n D"]:
    """Rotary embedding (arXiv 2104.09864) in Hugging Face's order: element i of a head is paired with i + D/2. In
    float32, rounded once.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rope_write_kv(
    qkv: Float[Array, "T c"],
    cos: Float[Array, "T d"],
    sin: Float[Array, "T d"],
    pages: Float[Array, "L P E"],
    page_ids: Int[Array, "T"],
    slots: Int[Array, "T"],
    *,
    layer: int | Int[Array, ""],
    geometry: Geometry,
    norms: tuple[Float[Array, "L D"], Float[Array, "L D"]] | None = None,
    norm_eps: float = 0.0,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "T N D"], Float[Array, "L P E"]]:
    """Rotates the queries and keys of ``qkv = [q | k | v]``, writes keys and values as write_kv does, and returns the
    queries and the pool. The pool changes in place when `pages` is donated or already a temporary.

    cos, sin: float32, of each token's position times the D/2 frequencies.
    page_ids, slots: token ``t`` goes to slot ``slots[t]`` (0 to 15) of page ``page_ids[t]``; a page id of P or more
    marks a padding token, which is not written.
    norms: weights of an RMS norm, with norm_eps, over each head of the queries and of the keys before they are rotated
    (Qwen3).
    Raises UnsupportedInput if implementation is "mosaic" and there is no kernel for these heads and dtypes.
    """

    def unsupported() -> str | None:
        return kernel_sm90.unsupported(geometry, qkv.dtype, pages.dtype)

    options: dict[str, Any] = dict(layer=layer, geometry=geometry)
    if use_mosaic("rope_write_kv", implementation, unsupported):
        args = (qkv, cos, sin, pages, page_ids, slots)
        return kernel_sm90.rope_write_kv_sm90(*args, norms=norms, norm_eps=norm_eps, **options)
    g = geometry
    sizes = [g.num_heads * g.head_dim, (g.num_heads + g.num_kv_heads) * g.head_dim]
    q, k, v = (part.reshape(part.shape[0], -1, g.head_dim) for part in jnp.split(qkv, sizes, axis=-1))
    if norms is not None:
        q, k = (rms_norm(x, weight[layer], norm_eps) for x, weight in zip((q, k), norms, strict=True))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, write_kv(pages, k, v, page_ids, slots, implementation=implementation, **options)
