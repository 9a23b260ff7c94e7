"""Copies an adapter's image into its pages on Hopper, in place: every byte is read once and written once."""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.geometry import TILE_COLS, ceil_div

_SMEM_BYTES = 128 * 1024
_BOX_ROWS = 256  # of one copy by TMA


def unsupported(page_elements: int) -> str | None:
    """Why the kernel cannot take pages of so many elements, or None if it can."""
    if page_elements % TILE_COLS:
        return f"a page of {page_elements} elements does not divide into rows of {TILE_COLS}"
    return None


def _kernel(ids_ref, image_ref, pages_ref, smem, bar, *, num_pages: int, per_block: int):
    """A block copies `per_block` parts of one page of one layer."""
    rows = smem.shape[1]
    page, layer = lax.axis_index("page"), lax.axis_index("layer")
    first, num_parts = lax.axis_index("block") * per_block, image_ref.shape[2] // rows
    target = ids_ref[page]

    def of_parts(step):
        for i in range(per_block):
            inside = (first + i < num_parts) & (target >= 0) & (target < num_pages)
            pl.when(inside)(functools.partial(step, i, pl.ds((first + i) * rows, rows)))

    def load(i, part):
        plgpu.copy_gmem_to_smem(image_ref.at[page, layer, part], smem.at[i], bar.at[i])

    def store(i, part):
        plgpu.barrier_wait(bar.at[i])
        plgpu.copy_smem_to_gmem(smem.at[i], pages_ref.at[layer * num_pages + target, part])

    of_parts(load)
    of_parts(store)
    plgpu.wait_smem_to_gmem(0)


def write_adapter_sm90(
    pages: Float[Array, "L P E"],
    page_ids: Int[Array, "n"],
    image: Float[Array, "n L E"],
    *,
    interpret: bool = False,
) -> Float[Array, "L P E"]:
    """As pallas_kernels.write_adapter.write_adapter; in place where `pages` is donated or already a temporary."""
    num_layers, num_pages, elements = pages.shape
    all_rows = elements // TILE_COLS
    rows = max(n for n in range(1, _BOX_ROWS + 1) if all_rows % n == 0)
    part_bytes = rows * TILE_COLS * pages.dtype.itemsize
    num_parts = all_rows // rows
    per_block = max(1, min(num_parts, _SMEM_BYTES // part_bytes))
    ref = jax.new_ref(pages.reshape(num_layers * num_pages, all_rows, TILE_COLS))
    plgpu.kernel(
        functools.partial(_kernel, num_pages=num_pages, per_block=per_block),
        out_type=(),
        grid=(image.shape[0], num_layers, ceil_div(num_parts, per_block)),
        grid_names=("page", "layer", "block"),
        scratch_types=dict(
            smem=plgpu.SMEM((per_block, rows, TILE_COLS), pages.dtype),
            bar=plgpu.Barrier(num_arrivals=1, num_barriers=per_block),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(page_ids, image.astype(pages.dtype).reshape(*image.shape[:2], all_rows, TILE_COLS), ref)
    return jax.freeze(ref).reshape(pages.shape)
