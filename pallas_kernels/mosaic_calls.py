"""The launches of Mosaic kernels in a lowered program: custom calls whose attributes hold a kernel's module.

Target and attributes are JAX's internals (0.11 and 0.12), so what knows them stands here.
"""

import jax
from jax._src.lib.mlir import ir

TARGET = "mosaic_gpu_v2"
CONFIG = "mhlo.backend_config"


def mosaic_calls(lowered: jax.stages.Lowered) -> list[ir.Operation]:
    """Every launch, in the program's own module: what is changed in them is compiled."""
    module = lowered.compiler_ir()
    assert module is not None
    calls: list[ir.Operation] = []

    def note(op):
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == TARGET:
            calls.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(note)
    return calls


def attributes(call: ir.Operation) -> dict[str, ir.Attribute]:
    """Of a launch: ``kernel_hash``, ``module`` and switches."""
    config = ir.DictAttr(call.attributes[CONFIG])
    return {config[i].name: config[i].attr for i in range(len(config))}
