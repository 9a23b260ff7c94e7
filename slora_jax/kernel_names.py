"""Equal kernels get equal names, so that each is compiled once.

Mosaic numbers the modules that a process lowers, and the number is part of what its cache of compiled kernels and
JAX's compile cache compare (``mosaic_gpu.dump_basename``, jax 0.11). Steps of different kinds have most kernels in
common, and Mosaic compiles them one after another, so the number is taken out before a step is compiled.
"""

import hashlib
import io

import jax
from jax._src.lib.mlir import ir
from jax.experimental.mosaic import gpu as mosaic

from pallas_kernels.mosaic_calls import CONFIG, attributes, mosaic_calls

_NUMBERED = "mosaic_gpu.dump_basename"


def unify_kernel_names(lowered: jax.stages.Lowered) -> None:
    """Renames the Mosaic kernels of a program that is not compiled yet."""
    calls = mosaic_calls(lowered)
    if not calls:
        return
    renamed: dict[bytes, ir.Attribute] = {}
    context = calls[0].context
    unregistered = context.allow_unregistered_dialects
    with context, ir.Location.unknown():
        mosaic.dialect.register_dialect(context)
        context.allow_unregistered_dialects = True  # the kernels' modules are in a stable form of their own
        try:
            for call in calls:
                config = attributes(call)
                before = ir.StringAttr(config["kernel_hash"]).value_bytes
                if before not in renamed:
                    renamed[before] = _renamed(config)
                call.attributes[CONFIG] = renamed[before]
        finally:
            context.allow_unregistered_dialects = unregistered


def _renamed(config: dict[str, ir.Attribute]) -> ir.Attribute:
    kernel = ir.Module.parse(ir.StringAttr(config["module"]).value_bytes)
    name = ir.StringAttr(kernel.operation.attributes["sym_name"]).value
    kernel.operation.attributes[_NUMBERED] = ir.StringAttr.get(name)
    buffer = io.BytesIO()
    kernel.operation.write_bytecode(buffer, desired_version=0)
    code = buffer.getvalue()
    digest = ir.StringAttr.get(hashlib.sha256(code).digest())
    return ir.DictAttr.get(config | dict(module=ir.StringAttr.get(code), kernel_hash=digest))
