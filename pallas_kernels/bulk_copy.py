"""Many copies into shared memory that count as one barrier arrival.

``plgpu.copy_gmem_to_smem`` arrives on its barrier with every thread of the warpgroup for every copy. With copies as
small as a weight chunk those arrivals, not the memory, set the pace. Here one `expect` announces the bytes of all
copies, and `start_copy` starts a copy without arriving. Built on JAX's internals (0.11 and 0.12), and kept apart for
that reason.
"""

import itertools

import jax
from jax import numpy as jnp
from jax._src import core as jax_core
from jax._src import state
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, nvvm
from jax._src.pallas import core as pallas_core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import lowering, primitives
from jax._src.state import primitives as state_primitives
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import dialect_lowering
from jax.experimental.mosaic.gpu.launch_context import OOBFillMode

_WARPGROUP = mgpu.LoweringSemantics.Warpgroup
_WARP = gpu_core.PrimitiveSemantics.Warp

_expect_p = jax_core.Primitive("bulk_copy_expect")
_expect_p.multiple_results = True
_start_copy_p = jax_core.Primitive("bulk_copy_start")
_start_copy_p.multiple_results = True
_READ_ONCE = "read_once"
_EVICT_FIRST = 0x12F0000000000000
"""A cache policy in the form of createpolicy, see CUTLASS's TMA::CacheHintSm90."""


def _split(ref, name):
    ref, transforms = state_primitives.get_ref_and_transforms(ref, None, name)
    leaves, tree = jax.tree.flatten(transforms)
    return ref, leaves, tree


def expect(barrier, num_bytes) -> None:
    """Arrives once on `barrier` (all threads of the warpgroup, or in warp_map a warp alone) and makes its phase wait
    for `num_bytes` (int32 scalar) more.
    """
    barrier, leaves, tree = _split(barrier, "expect")
    _expect_p.bind(barrier, jnp.asarray(num_bytes, jnp.int32), *leaves, tree=tree)


def start_copy(source, target, barrier, predicate, *, read_once: bool = False) -> None:
    """Starts copying a global-memory ref to a shared-memory ref of the same shape where `predicate` holds; `barrier`
    counts its bytes.

    read_once: the L2 cache may drop the source before all else, so that a step's weights and pages do not displace what
    its other kernels need: their instructions, activations and plans.
    """
    source, source_leaves, source_tree = _split(source, "start_copy")
    target, target_leaves, target_tree = _split(target, "start_copy")
    barrier, barrier_leaves, barrier_tree = _split(barrier, "start_copy")
    _start_copy_p.bind(
        source,
        target,
        barrier,
        predicate,
        *source_leaves,
        *target_leaves,
        *barrier_leaves,
        trees=(source_tree, target_tree, barrier_tree),
        read_once=read_once,
    )


@_expect_p.def_effectful_abstract_eval
def _expect_abstract_eval(barrier, num_bytes, *leaves, tree):
    return (), {gpu_core._memory_effect}


@_start_copy_p.def_effectful_abstract_eval
def _start_copy_abstract_eval(source, target, barrier, predicate, *leaves, trees, read_once):
    del read_once
    source_tree, target_tree, _ = trees
    n, m = source_tree.num_leaves, target_tree.num_leaves
    source_shape = pallas_core.TransformedRef(source, source_tree.unflatten(leaves[:n])).shape
    target_shape = pallas_core.TransformedRef(target, target_tree.unflatten(leaves[n : n + m])).shape
    if source_shape != target_shape:
        raise ValueError(f"cannot copy {source_shape} to {target_shape}")
    return (), {state.ReadEffect(0), state.WriteEffect(1)}


def _barrier_memref(ctx, barrier, aval, leaves, tree):
    index = primitives._get_barrier_base_index(aval, tree.unflatten(leaves))
    return (barrier if index is None else barrier[index]).as_barrier_memref()


@lowering.register_lowering_rule(_expect_p, _WARPGROUP)
def _expect_lowering(ctx, barrier, num_bytes, *leaves, tree):
    num_bytes = lowering._ensure_ir_value(num_bytes, jnp.int32)
    mgpu.dialect.arrive_expect_tx(_barrier_memref(ctx, barrier, ctx.avals_in[0], leaves, tree), num_bytes)
    return ()


@lowering.register_lowering_rule(_expect_p, _WARPGROUP, _WARP)
def _expect_of_warp_lowering(ctx, barrier, num_bytes, *leaves, tree):
    # a barrier counts a warpgroup's threads: one lane arrives for as many
    index = primitives._get_barrier_base_index(ctx.avals_in[0], tree.unflatten(leaves))
    ref = (barrier if index is None else barrier[index]).barrier_ref
    lane = mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARP)
    ref.arrive_expect_tx(lowering._ensure_ir_value(num_bytes, jnp.int32), predicate=lane)
    ref.arrive(arrival_count=mgpu.utils.WARPGROUP_SIZE - 1, predicate=lane)
    return ()


@lowering.register_lowering_rule(_start_copy_p, _WARPGROUP)
@lowering.register_lowering_rule(_start_copy_p, _WARPGROUP, _WARP)
def _start_copy_lowering(ctx, source, target, barrier, predicate, *leaves, trees, read_once):
    source_tree, target_tree, barrier_tree = trees
    n, m = source_tree.num_leaves, target_tree.num_leaves
    avals = ctx.avals_in[4:]
    target, _, remaining = lowering._handle_transforms(
        ctx,
        ctx.avals_in[1],
        target,
        target_tree.unflatten(avals[n : n + m]),
        target_tree.unflatten(leaves[n : n + m]),
    )
    if remaining:
        raise NotImplementedError(f"transforms {remaining} of a copy's target")
    params = primitives._extract_gmem_copy_params(
        ctx, source_tree.unflatten(leaves[:n]), source_tree.unflatten(avals[:n])
    )
    indices, lengths = primitives._split_gmem_slice(params["gmem_slice"])
    load = mgpu.dialect.async_load(
        source,
        target,
        indices,
        lengths,
        barrier=_barrier_memref(ctx, barrier, ctx.avals_in[2], leaves[n + m :], barrier_tree),
        predicate=lowering._ensure_ir_value(predicate, jnp.bool),
        collective=ir.ArrayAttr.get([]),
        oob_fill_mode=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), OOBFillMode.ZEROS.value),
    )
    if read_once:
        load.attributes[_READ_ONCE] = ir.UnitAttr.get()
    return ()


_lower_async_load = dialect_lowering._lowerings[mgpu.dialect.AsyncLoadOp.OPERATION_NAME]


@dialect_lowering._register_lowering(mgpu.dialect.AsyncLoadOp, support_warp_semantics=True)
def _lower_async_load_with_hint(ctx, load):
    """JAX's rule, which has no way to give a hint: the copy that it makes is made again with one."""
    found = _lower_async_load(ctx, load)
    if _READ_ONCE in load.attributes:
        *_, copy = itertools.takewhile(lambda op: op != load, load.operation.block.operations)
        assert isinstance(copy, nvvm.CpAsyncBulkTensorGlobalToSharedClusterOp), copy
        i64 = ir.IntegerType.get_signless(64)
        with ir.InsertionPoint(copy):
            nvvm.cp_async_bulk_tensor_shared_cluster_global(
                copy.dstMem,
                copy.tmaDescriptor,
                list(copy.coordinates),
                copy.mbar,
                list(copy.im2colOffsets),
                multicast_mask=copy.multicastMask,
                l2_cache_hint=arith.constant(i64, ir.IntegerAttr.get(i64, _EVICT_FIRST)),
                predicate=copy.predicate,
            )
        copy.erase()
    return found
