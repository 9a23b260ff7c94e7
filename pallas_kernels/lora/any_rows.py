"""One compiled kernel for arrays of any number of rows.

Shapes are part of a Mosaic kernel, and Mosaic compiles one kernel at a time in a process, again in every process: an
engine with twenty sizes of steps would wait for minutes. The LoRA kernels never depend on how many rows there are.
They are lowered for more rows than any step has, once, and called with the arrays at hand. A kernel so called must
itself keep to the rows that exist: nothing else does.

The custom call that Pallas makes is emitted again with other operands.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax._src import core as jax_core
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir

from pallas_kernels.mosaic_calls import TARGET, attributes, mosaic_calls

_any_rows_p = jax_core.Primitive("any_rows")
_any_rows_p.multiple_results = True
_any_rows_p.def_abstract_eval(lambda *args, out, **_: [jax_core.ShapedArray(o.shape, o.dtype) for o in out])


def any_rows(
    kernel: Callable[..., jax.Array],
    args: Sequence[jax.Array],
    *,
    rows: dict[int, int],
    out: tuple[jax.ShapeDtypeStruct, ...],
    in_place: bool,
    options: dict[str, Any],
) -> list[jax.Array]:
    """``kernel(*args, **options)``, where `kernel` does nothing but launch one Mosaic kernel.

    rows: argument -> the rows that the kernel is lowered for, instead of those the argument has. out: shapes and dtypes
    of the results. in_place: the last one is the first argument, changed. options: hashable.
    """
    static = tuple(sorted(options.items()))
    return _any_rows_p.bind(
        *args, kernel=kernel, rows=tuple(sorted(rows.items())), out=out, in_place=in_place, options=static
    )


@functools.cache
def _attributes(kernel, options, specs) -> dict[str, bytes | bool]:
    """The custom call's attributes: the kernel's module, its hash, and switches."""
    lowered = jax.jit(functools.partial(kernel, **dict(options))).trace(*specs).lower(lowering_platforms=("cuda",))
    (call,) = mosaic_calls(lowered)
    found = attributes(call).items()
    return {n: v.value_bytes if isinstance(v, ir.StringAttr) else ir.BoolAttr(v).value for n, v in found}


def _lower(ctx, *args, kernel, rows, out, in_place, options):
    shapes = [aval.shape for aval in ctx.avals_in]
    for index, capacity in rows:
        shapes[index] = (capacity, *shapes[index][1:])
    specs = tuple(jax.ShapeDtypeStruct(s, a.dtype) for s, a in zip(shapes, ctx.avals_in, strict=True))
    config = {
        name: ir.StringAttr.get(value) if isinstance(value, bytes) else ir.BoolAttr.get(value)
        for name, value in _attributes(kernel, options, specs).items()
    }
    aliases = {0: len(out) - 1} if in_place else {}
    call = jax.ffi.ffi_lowering(TARGET, backend_config=config, operand_output_aliases=aliases)
    return call(ctx, *args)


mlir.register_lowering(_any_rows_p, _lower, platform="cuda")
