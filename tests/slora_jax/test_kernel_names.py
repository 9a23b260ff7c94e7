"""Equal Mosaic kernels of different programs are told apart by nothing, so that they are compiled once."""

import re

import jax
from jax import numpy as jnp
import numpy as np

from pallas_kernels.silu_mul.kernel_sm90 import silu_mul_sm90
from slora_jax.kernel_names import unify_kernel_names


def _lower(scale):
    x = jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16)
    return jax.jit(lambda x: silu_mul_sm90(x) * scale).trace(x).lower(lowering_platforms=("cuda",))


def _hashes(lowered):
    return re.findall(r'kernel_hash = "([^"]*)"', lowered.as_text())


def test_two_programs_with_the_same_kernel():
    first, second = _lower(2.0), _lower(3.0)
    assert _hashes(first) != _hashes(second)  # if they are equal, JAX has mended it, and the module can go
    unify_kernel_names(first)
    unify_kernel_names(second)
    assert _hashes(first) == _hashes(second)
    assert len(_hashes(first)) == 1


def test_other_attributes_stay():
    lowered = _lower(2.0)
    before = lowered.as_text()
    unify_kernel_names(lowered)
    cut = lambda text: re.sub(r'(kernel_hash|module) = "(?:[^"\\]|\\.)*"', "", text)  # noqa: E731
    assert cut(before) == cut(lowered.as_text())


def test_a_program_without_kernels_is_left_alone():
    lowered = jax.jit(jnp.sin).lower(np.float32(0))
    unify_kernel_names(lowered)
    assert lowered.compile()(np.float32(0)) == 0
