"""Signals between thread blocks of a kernel through global memory: counters that are zero before and after it.

A kernel that waits for another thread block's signal must have all its thread blocks running at once. Whoever waits
spins: a signal that never comes hangs the GPU.
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
_wait_p = jax_core.Primitive("lora_wait_signals")
_leave_p = jax_core.Primitive("lora_leave_signals")
# PTX as a whole, because Mosaic takes no loop of a warp that ends on a condition.
_WAIT = """{
.reg .pred there;
.reg .b32 seen;
again:
ld.acquire.gpu.global.b32 seen, [$0];
setp.ge.s32 there, seen, $1;
@!there bra again;
fence.proxy.async.global;
}"""
_LEAVE = "red.relaxed.gpu.global.inc.u32 [$0], $1;"
_WARP_LEAVE = """{
.reg .pred mine;
.reg .b32 lane;
bar.warp.sync 0xffffffff;
mov.u32 lane, %laneid;
setp.eq.u32 mine, lane, 0;
@mine red.relaxed.gpu.global.inc.u32 [$0], $1;
}"""


def signal(signals, index) -> None:
    """Of a warpgroup whose copies to global memory are complete, or which has stored there: adds one to
    ``signals[index]``, int32 [n].
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def run(ctx, index, signals):
        del ctx
        _utils.SemaphoreRef(_place(signals, *scalars(index))).signal(1, memory_scope="gpu")

    @plgpu.inline_mgpu()
    def fence(ctx):
        del ctx
        _utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    fence()  # stores, before others' bulk copies read them
    sync_warpgroup()  # any thread's copies and stores
    run(index, signals)


def await_signals(signals, index, count: int) -> None:
    """Of a warpgroup: until ``signals[index]`` is `count` or more. Its loads then read what came before that."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def run(ctx, index, signals):
        del ctx
        _utils.inline_ptx(_WAIT, _place(signals, *scalars(index)), i32(count), has_side_effects=True)

    run(index, signals)


def wait_signals(signals, index, count: int) -> None:
    """Of a warp in warp_map: until ``signals[index]`` is `count` or more. Its bulk copies then read what came before
    that.
    """
    _bind(_wait_p, signals, index, jnp.int32(count))


def leave(signals, index, total: int) -> None:
    """Of a warpgroup that waits for ``signals[index]`` no more: adds one to it, or makes it zero if it is the last of
    `total`, all who signal and all who wait. Nobody waits for the answer.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def run(ctx, index, signals):
        del ctx
        thread = _utils.single_thread_predicate(_utils.ThreadSubset.WARPGROUP)
        place = _place(signals, *scalars(index))
        _utils.inline_ptx(_LEAVE, place, i32(total - 1), predicate=thread, has_side_effects=True)

    sync_warpgroup()  # until all its threads have seen them
    run(index, signals)


def leave_signals(signals, index, total) -> None:
    """The same for a warp in warp_map."""
    _bind(_leave_p, signals, index, total - 1)


def _bind(primitive, signals, index, number) -> None:
    ref, transforms = state_primitives.get_ref_and_transforms(signals, None, primitive.name)
    assert not transforms
    primitive.bind(ref, jnp.asarray(index, jnp.int32), jnp.asarray(number, jnp.int32))


def _place(signals, index):
    return _utils.getelementptr(_utils.memref_ptr(signals), [index], i32(0).type)


def _abstract_eval(signals, index, number):
    return (), {state.ReadEffect(0), state.WriteEffect(0)}


def _lowering(ptx: str):
    def rule(ctx, signals, index, number):
        index, number = (lowering._ensure_ir_value(value, jnp.int32) for value in (index, number))
        _utils.inline_ptx(ptx, _place(signals, index), number, has_side_effects=True)
        return ()

    return rule


for _primitive, _ptx in ((_wait_p, _WAIT), (_leave_p, _WARP_LEAVE)):
    _primitive.multiple_results = True
    _primitive.def_effectful_abstract_eval(_abstract_eval)
    lowering.register_lowering_rule(_primitive, mgpu.LoweringSemantics.Warpgroup, gpu_core.PrimitiveSemantics.Warp)(
        _lowering(_ptx)
    )
