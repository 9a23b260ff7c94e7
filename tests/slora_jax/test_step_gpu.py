"""Whole steps on a GPU at Llama-2-7B's widths: the Hopper kernels beside XLA's, for few tokens of any number and for
prompts.
"""

import dataclasses

import jax
from jax import numpy as jnp
import numpy as np
from oracles import relative_error
import pytest

from benchmarks.decode_step import Case, has_few_adapters, make_batch, random_pages
from slora_jax.batch import State
from slora_jax.loading.random import random_params
from slora_jax.shapes import named_shape
from slora_jax.step import compiler_options, make_batch_step

GROUPS = {("q", "k", "v", "o"): ("qkv", "o"), ("gate", "up", "down"): ("gu", "down")}
ATTENTION, MLP = GROUPS
EVEN, ODD = (16, 64), (8, 24)
FEW = "1x175x1 2x175x2 2x175x1 3x175x3 4x175x0 5x175x5 7x175x4 8x175x8 12x175x12".split()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "text, targets, ranks, mlp_size",
    [
        *((text, ATTENTION, EVEN, 11008) for text in FEW),
        # the base projection in one kernel with the deltas
        ("8x144x8p", ATTENTION, EVEN, 11008),
        ("8x144x8p", MLP, ODD, 11008),
        ("8x144x8p", MLP, ODD, 5504),  # in which an adapter's sections begin within a chunk of four tiles
    ],
)
def test_hopper_kernels_agree_with_xla(text, targets, ranks, mlp_size):
    config = dataclasses.replace(named_shape("llama-2-7b"), num_layers=2, mlp_size=mlp_size)
    params = random_params(config, dtype="bfloat16")
    case = Case.parse(text, ranks, targets)
    batch, num_pages = make_batch(case, config)
    batch = jax.device_put(dataclasses.replace(batch, return_logits=True))
    logits = {}
    for implementation in ("xla", "mosaic"):
        options = dict(implementation=implementation, max_rank=64, lora_groups=GROUPS[targets] if case.adapters else ())
        step = make_batch_step(config, dtype=jnp.bfloat16, **options)
        program = jax.jit(step, donate_argnums=1, compiler_options=compiler_options())
        state, output = program(params, State(pages=random_pages(config, num_pages, jnp.bfloat16)), batch)
        logits[implementation] = np.asarray(output.logits)
    assert relative_error(logits["mosaic"], logits["xla"]) < 3e-2


@pytest.mark.gpu
@pytest.mark.parametrize("targets", GROUPS)
@pytest.mark.parametrize("text", ["2x175x2", "8x175x8", "40x175x1", "64x175x4", "256x175x8", "2x24x2p", "2x128x2p"])
def test_few_adapters_agree_with_xla(text, targets):
    """The base projections in one kernel with the deltas; a step of two tokens has eight rows."""
    config = dataclasses.replace(named_shape("llama-2-7b"), num_layers=2)
    params = random_params(config, dtype="bfloat16")
    case = Case.parse(text, (16,), targets)
    batch, num_pages = make_batch(case, config)
    assert has_few_adapters(batch, config)
    logits = {}
    for implementation in ("xla", "mosaic"):
        options = dict(implementation=implementation, max_rank=16, lora_groups=GROUPS[targets])
        promised = dataclasses.replace(batch, return_logits=True, few_adapters=implementation == "mosaic")
        step = make_batch_step(config, dtype=jnp.bfloat16, **options)
        program = jax.jit(step, donate_argnums=1, compiler_options=compiler_options())
        state = State(pages=random_pages(config, num_pages, jnp.bfloat16))
        logits[implementation] = np.asarray(program(params, state, jax.device_put(promised))[1].logits)
    assert relative_error(logits["mosaic"], logits["xla"]) < 3e-2
