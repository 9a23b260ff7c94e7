"""Copies an adapter's image into its pages."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation, use_mosaic
from pallas_kernels.write_adapter import kernel_sm90

__all__ = ["write_adapter"]


def write_adapter(
    pages: Float[Array, "L P E"],
    page_ids: Int[Array, "n"],
    image: Float[Array, "n L E"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "L P E"]:
    """Writes row ``i`` of `image` to page id ``page_ids[i]`` in every layer. Ids of P or more are dropped (padding).

    In place when `pages` is donated or already a temporary.
    """
    if use_mosaic("write_adapter", implementation, lambda: kernel_sm90.unsupported(pages.shape[2])):
        return kernel_sm90.write_adapter_sm90(pages, page_ids, image)
    return pages.at[:, page_ids].set(image.swapaxes(0, 1).astype(pages.dtype), mode="drop")
