"""Copies an adapter's image into its pages."""

from jaxtyping import Array, Float, Int

__all__ = ["write_adapter"]


def write_adapter(
    pages: Float[Array, "L P E"], page_ids: Int[Array, "n"], image: Float[Array, "n L E"]
) -> Float[Array, "L P E"]:
    """Writes row ``i`` of `image` to page id ``page_ids[i]`` in every layer. Ids of P or more are dropped (padding)."""
    return pages.at[:, page_ids].set(image.swapaxes(0, 1).astype(pages.dtype), mode="drop")
