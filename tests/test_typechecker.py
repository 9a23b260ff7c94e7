"""Shapes of arrays are checked in every call of a test run, and nothing else costs a call anything."""

from jax import numpy as jnp
from jaxtyping import TypeCheckError
import pytest

from pallas_kernels.add_rms_norm import rms_norm
from pallas_kernels.geometry import ceil_div
from pallas_kernels.lora.few_plan import FewPlan


def test_a_function_refuses_a_wrong_shape():
    x = jnp.ones((2, 8))
    assert rms_norm(x, jnp.ones(8), 1e-5).shape == (2, 8)
    with pytest.raises(TypeCheckError, match="weight"):
        rms_norm(x, jnp.ones(4), 1e-5)


def test_a_dataclass_refuses_a_wrong_dtype():
    fields = dict(
        records=jnp.zeros((2, 7, 1, 8, 8), jnp.int32),
        count=jnp.zeros((2, 7), jnp.int32),
        ranks=jnp.zeros((2, 7, 1, 3, 64)),
        page_ids=jnp.zeros(3, jnp.int32),
        signals=jnp.zeros(28, jnp.int32),
    )
    FewPlan(**fields)
    with pytest.raises(TypeCheckError, match="count"):
        FewPlan(**fields | dict(count=jnp.zeros((2, 7))))


def test_a_function_without_arrays_is_called_as_it_is():
    assert not hasattr(ceil_div, "__wrapped__") and hasattr(rms_norm, "__wrapped__")
