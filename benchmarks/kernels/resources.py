"""Registers and spills of the Mosaic kernels of a step, on a machine without a GPU.

    pip install --no-deps --target PLUGIN jax-cuda13-pjrt==VERSION  # jax's
    JAX_PLATFORMS=cpu PYTHONPATH=PLUGIN python -m benchmarks.kernels.resources --case 8x256x8p

Lowers the step and compiles each kernel as JAX would before its first launch, with the compiler in JAX's CUDA plugin
and CUDA's ptxas, which must be in PATH; cc makes a stand-in for the driver where there is none. A product that ptxas
serializes waits for each of its instructions.
"""

import argparse
import dataclasses
import importlib.util
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile

import jax
from jax import numpy as jnp
from jax._src.lib.mlir import ir
import numpy as np

from benchmarks.decode_step import Case, has_few_adapters, make_batch
from pallas_kernels.mosaic_calls import attributes, mosaic_calls
from slora_jax.batch import State
from slora_jax.loading.random import random_params
from slora_jax.shapes import named_shape
from slora_jax.step import make_batch_step

_DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1; /* compute capability 9.0 */
  return 0;
}
"""

_COMPILE = """
import ctypes, pathlib, sys
compiler = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compiler.restype, compiler.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
module = pathlib.Path(sys.argv[2]).read_bytes()
compiler(module, len(module))
"""
"""In a process of its own, for what it prints: without a GPU the kernel cannot be loaded then."""


def kernels(shape: str, case: Case, few_adapters: bool) -> list[bytes]:
    """Modules of the different kernels that a step launches, in their order."""
    config = named_shape(shape)
    batch, num_pages = make_batch(case, config)
    batch = dataclasses.replace(batch, few_adapters=few_adapters and has_few_adapters(batch, config))
    options = dict(max_rank=max(case.ranks), lora_groups=case.lora_spec(config).groups) if case.adapters else {}
    step = make_batch_step(config, dtype=jnp.bfloat16, implementation="mosaic", **options)
    params = jax.eval_shape(lambda: random_params(config, dtype="bfloat16"))
    pages = jax.ShapeDtypeStruct((config.num_layers, num_pages, config.geometry.page_elements), jnp.bfloat16)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype), batch)
    traced = jax.jit(step).trace(params, State(pages=pages), abstract)
    found = {}
    for call in mosaic_calls(traced.lower(lowering_platforms=("cuda",))):
        values = attributes(call)
        found[ir.StringAttr(values["kernel_hash"]).value_bytes] = ir.StringAttr(values["module"]).value_bytes
    return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """Of a kernel, by ptxas. registers: of a thread, at its launch. spilled: bytes of a thread. serialized: whether its
    products wait for each of their instructions.
    """

    kernel: str
    registers: int
    spilled: int
    serialized: bool


def parse(log: str) -> Resources:
    """From what ptxas says of one kernel. Raises ValueError if it says nothing of one."""
    patterns = (
        r"entry function '(\w+)_mosaic_gpu_kernel'",
        r"Used (\d+) registers",
        r"(\d+) bytes spill stores, \d+ bytes spill",
    )
    found = [re.search(pattern, log) for pattern in patterns]
    if not all(found):
        raise ValueError(f"the kernel was not compiled; the compiler says:\n{log}")
    kernel, registers, spilled = (match[1] for match in found if match)
    return Resources(
        kernel=kernel, registers=int(registers), spilled=int(spilled), serialized="instructions are serialized" in log
    )


def _required(command: str, package: str) -> str:
    if not shutil.which(command):
        raise SystemExit(f"{command} is not in PATH: install {package}")
    return command


def _plugin() -> Path:
    package = importlib.util.find_spec("jax_plugins")  # a namespace
    folders = package.submodule_search_locations if package else None
    found = [path for folder in folders or [] for path in Path(folder).glob("xla_cuda*/xla_cuda_plugin.so")]
    if not found:
        raise SystemExit(
            "the compiler is in JAX's CUDA plugin: pip install --no-deps --target PLUGIN "
            f"jax-cuda13-pjrt=={jax.__version__}, and name PLUGIN in PYTHONPATH"
        )
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-2-7b", help="named shape of the base model")
    parser.add_argument("--case", default="64x512x64", help="as of benchmarks.decode_step")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--targets", default="q,k,v,o,gate,up,down")
    parser.add_argument("--few-adapters", action="store_true")
    args = parser.parse_args()
    plugin = _plugin()
    _required("ptxas", "CUDA's compiler")
    case = Case.parse(args.case, tuple(int(r) for r in args.ranks.split(",")), tuple(args.targets.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | dict(MOSAIC_GPU_DUMP_PTXAS="1")
        if not Path("/dev/nvidiactl").exists():
            command = [_required("cc", "a C compiler"), "-shared", "-fPIC", "-x", "c", "-", "-o", "libcuda.so.1"]
            subprocess.run(command, input=_DRIVER, text=True, check=True, cwd=folder)
            environment["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        for module in kernels(args.shape, case, args.few_adapters):
            path = Path(folder, "module")
            path.write_bytes(module)
            command = [sys.executable, "-c", _COMPILE, str(plugin), str(path)]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            of = parse(ran.stdout + ran.stderr)
            serialized = ", products serialized" if of.serialized else ""
            print(f"{of.kernel:28s} {of.registers:4d} registers {of.spilled:5d} bytes spilled{serialized}", flush=True)


if __name__ == "__main__":
    main()
