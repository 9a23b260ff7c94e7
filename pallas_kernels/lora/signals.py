"""Signals between thread blocks of a kernel through global memory, for what bulk copies wrote and will read.

A kernel that waits for another thread block's signal must have all its thread blocks running at once.
"""

from jax import numpy as jnp
from jax._src import core as jax_core
from jax._src import state
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import lowering
from jax._src.state import primitives as state_primitives
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lora.lanes import i32, scalars
from pallas_kernels.lora.short_ring import sync_warpgroup

_utils = mgpu.utils
_wait_p = jax_core.Primitive("lora_wait_signal")
_wait_p.multiple_results = True


def signal(signals, index) -> None:
    """Of a warpgroup whose copies to global memory are complete: adds one to ``signals[index]``, int32 [n]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def run(ctx, index, signals):
        del ctx
        _utils.SemaphoreRef(_place(signals, *scalars(index))).signal(1, memory_scope="gpu")

    sync_warpgroup()  # any thread's copies
    run(index, signals)


def wait_signals(signals, index, count: int) -> None:
    """Of a warp in warp_map: until ``signals[index]`` is `count`. Its bulk copies then read what came before that.

    A spinning load: a signal that never comes hangs the GPU.
    """
    ref, transforms = state_primitives.get_ref_and_transforms(signals, None, "wait_signals")
    assert not transforms
    _wait_p.bind(ref, jnp.asarray(index, jnp.int32), count=count)


def _place(signals, index):
    return _utils.getelementptr(_utils.memref_ptr(signals), [index], i32(0).type)


@_wait_p.def_effectful_abstract_eval
def _wait_abstract_eval(signals, index, *, count):
    return (), {state.ReadEffect(0), state.WriteEffect(0)}


@lowering.register_lowering_rule(_wait_p, mgpu.LoweringSemantics.Warpgroup, gpu_core.PrimitiveSemantics.Warp)
def _wait_lowering(ctx, signals, index, *, count):
    # PTX as a whole, because Mosaic takes no loop of a warp that ends on a condition.
    _utils.inline_ptx(
        """{
        .reg .pred there;
        .reg .b32 seen;
        again:
        ld.acquire.gpu.global.b32 seen, [$0];
        setp.ge.s32 there, seen, $1;
        @!there bra again;
        fence.proxy.async;
        }""",
        _place(signals, lowering._ensure_ir_value(index, jnp.int32)),
        i32(count),
        has_side_effects=True,
    )
    return ()
