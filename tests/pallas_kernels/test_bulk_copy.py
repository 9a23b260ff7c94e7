"""Which copies let the L2 cache drop what they have read."""

from few_batches import lower
import jax
from jax import numpy as jnp
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax._src.lib.mlir import ir
from lora_batches import abstract, abstract_table, geometry
import pytest

from pallas_kernels import lora_add
from pallas_kernels.lora.arg_specs import SPECS
from pallas_kernels.mosaic_calls import attributes, mosaic_calls
from pallas_kernels.paged_attention.decode_sm90 import decode_sm90
from pallas_kernels.paged_attention.prefill_sm90 import prefill_sm90

_COPY = "stable_mosaic_gpu.nvvm.cp.async.bulk.tensor.shared.cluster.global"
_COORDINATES, _HINT = 2, 6
"""Of its groups of operands."""
_7B = next(spec for name, spec in SPECS.items() if name.startswith("7b"))


def _copies(lowered: jax.stages.Lowered) -> set[tuple[int, bool]]:
    """Of all kernels' copies to shared memory: coordinates, and whether they have a hint."""
    found = set()

    def note(op):
        if op.name == _COPY:
            groups = list(ir.DenseI32ArrayAttr(op.attributes["operandSegmentSizes"]))
            found.add((groups[_COORDINATES], groups[_HINT] == 1))
        return ir.WalkResult.ADVANCE

    for call in mosaic_calls(lowered):
        context = mlir.make_ir_context()
        mosaic_gpu_dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        with context:
            ir.Module.parse(attributes(call)["module"].value_bytes).operation.walk(note)
    return found


def _attention(kernel, tokens):
    g, s = geometry(32 * 128, 32 * 128, 1024, heads=32, kv_heads=32, dim=128), jax.ShapeDtypeStruct
    shapes = s((tokens, 32, 128), jnp.bfloat16), s((2, 512, g.page_elements), jnp.bfloat16)
    ints = s((64, 64), jnp.int32), s((65,), jnp.int32), s((64,), jnp.int32)
    run = jax.jit(lambda *a: kernel(*a, layer=1, geometry=g, sm_scale=0.1))
    return run.trace(*shapes, *ints).lower(lowering_platforms=("cuda",))


def _lora_add():
    g = _7B.geometry

    def run(x, out, pages, table, *segments):
        options = dict(layer=3, group="o", max_rank=64, shrink_geometry=g, expand_geometry=g)
        return lora_add(out, x, pages, table, table, *segments, implementation="mosaic", **options)

    x, pages = abstract((64, 4096), jnp.bfloat16), abstract((g.num_layers, 1000, g.page_elements), jnp.bfloat16)
    traced = jax.jit(run).trace(x, x, pages, abstract_table(_7B), abstract((65,)), abstract((64,)))
    return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "lowered, hinted, others",
    [
        (lambda: lower(_7B.geometry, "qkv", 64), {5, 3}, {4, 3}),  # weights and adapters; activations and y
        (lambda: lower(_7B.geometry, "qkv", 256), set(), {5, 4, 3}),  # weights are read by two thread blocks
        (_lora_add, {4}, {3, 2}),  # adapters; activations and base outputs
        (lambda: _attention(decode_sm90, 64), {5}, {5, 4}),  # pages; those that two sequences share, and queries
        (lambda: _attention(prefill_sm90, 512), set(), {5}),
    ],
    ids=["few", "few tiles", "lora_add", "decode", "prefill"],
)
def test_what_is_read_once_may_be_dropped(lowered, hinted, others):
    assert _copies(lowered()) == {(n, True) for n in hinted} | {(n, False) for n in others}
