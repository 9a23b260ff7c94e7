"""Whole steps on a GPU at Llama-2-7B's widths: the Hopper kernels beside XLA's, for few tokens of any number and for
prompts.
"""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
from oracles import relative_error
import pytest

from benchmarks.decode_step import Case, make_batch, random_pages
from slora_jax.batch import State
from slora_jax.loading.random import random_params
from slora_jax.shapes import named_shape
from slora_jax.step import compiler_options, make_batch_step


@pytest.mark.gpu
@pytest.mark.parametrize(
    "text",
    [
        *("1x175x1", "2x175x2", "2x175x1", "3x175x3", "4x175x0", "5x175x5", "7x175x4", "8x175x8", "12x175x12"),
        "8x144x8p",  # the base projection in one kernel with the deltas
    ],
)
def test_hopper_kernels_agree_with_xla(text):
    config = dataclasses.replace(named_shape("llama-2-7b"), num_layers=2)
    params = random_params(config, dtype="bfloat16")
    case = Case.parse(text, (16, 64), ("q", "k", "v", "o"))
    batch, num_pages = make_batch(case, config)
    batch = jax.device_put(dataclasses.replace(batch, return_logits=True))
    logits = {}
    for implementation in ("xla", "mosaic"):
        options = dict(implementation=implementation, max_rank=64, lora_groups=("qkv", "o") if case.adapters else ())
        step = make_batch_step(config, dtype=jnp.bfloat16, **options)
        program = jax.jit(step, donate_argnums=1, compiler_options=compiler_options())
        state, output = program(params, State(pages=random_pages(config, num_pages, jnp.bfloat16)), batch)
        logits[implementation] = np.asarray(output.logits)
    assert relative_error(logits["mosaic"], logits["xla"]) < 3e-2
