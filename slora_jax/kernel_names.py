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

_TARGET = "mosaic_gpu_v2"
_NUMBERED = "mosaic_gpu.dump_basename"


def unify_kernel_names(lowered: jax.stages.Lowered) -> None:
    """Renames the Mosaic kernels of a program that is not compiled yet."""
    module = lowered.compiler_ir()
    assert module is not None
    calls: list[ir.Operation] = []

    def note(op):
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == _TARGET:
            calls.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(note)
    if not calls:
        return
    renamed: dict[bytes, ir.Attribute] = {}
    context = module.context
    unregistered = context.allow_unregistered_dialects
    with context, ir.Location.unknown():
        mosaic.dialect.register_dialect(context)
        context.allow_unregistered_dialects = True  # the kernels' modules are in a stable form of their own
        try:
            for call in calls:
                config = ir.DictAttr(call.attributes["mhlo.backend_config"])
                before = ir.StringAttr(config["kernel_hash"]).value_bytes
                if before not in renamed:
                    renamed[before] = _renamed(config)
                call.attributes["mhlo.backend_config"] = renamed[before]
        finally:
            context.allow_unregistered_dialects = unregistered


def _renamed(config: ir.DictAttr) -> ir.Attribute:
    kernel = ir.Module.parse(ir.StringAttr(config["module"]).value_bytes)
    name = ir.StringAttr(kernel.operation.attributes["sym_name"]).value
    kernel.operation.attributes[_NUMBERED] = ir.StringAttr.get(name)
    buffer = io.BytesIO()
    kernel.operation.write_bytecode(buffer, desired_version=0)
    code = buffer.getvalue()
    values = {config[i].name: config[i].attr for i in range(len(config))}
    values["module"] = ir.StringAttr.get(code)
    values["kernel_hash"] = ir.StringAttr.get(hashlib.sha256(code).digest())
    return ir.DictAttr.get(values)
