"""The step: one pure, jittable function from parameters, state and batch to new state and output."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Literal

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import GROUPS, Implementation
from slora_jax.batch import Batch, Output, Sampling, State
from slora_jax.model import Llama
from slora_jax.model_config import ModelConfig
from slora_jax.parallel import Parallel, local_config, shard_forward, shard_sample
from slora_jax.sampling import sample

Params = dict[str, jax.Array]
BatchStep = Callable[[Params, State, Batch], tuple[State, Output]]
Forward = Callable[[Params, State, Batch], tuple[State, Any]]


def compiler_options() -> dict[str, bool | int]:
    """Options of XLA that steps should be compiled with: ``jax.jit(step, compiler_options=compiler_options())``.

    On GPUs matrix products go to cuBLAS. Triton's, which XLA would choose among, are tuned again for every layer of a
    stacked weight (a decode step of Llama-2-7B compiled in 42 s instead of 9) and were slower (3.8 ms instead of 3.5).
    The memory limit, a percentage of what the arguments leave, is lifted: XLA counts the pool, which every layer
    changes in place, once for each of its names, and would compute things again in every layer to save memory that
    nothing takes.
    """
    if jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_memory_limit_slop_factor": 100_000}


def make_forward(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    max_rank: int = 64,
    lora_groups: Sequence[str] = tuple(GROUPS),
    implementation: Implementation = "auto",
    loop: Literal["unroll", "scan"] = "unroll",
    parallel: Parallel | None = None,
) -> Forward:
    """Makes ``forward(params, state, batch) -> (state, logits)``: the step without sampling. Logits are float32 [R, V].
    With batch.return_hidden it returns ``(state, (logits, hidden))``, hidden being the rows' final hidden states,
    float32 [R, H].

    With `parallel` they are split over the vocabulary, and columns past V, where it does not divide, hold -inf.
    Arguments as in make_batch_step.
    """
    layout = parallel.layout if parallel else None
    model = Llama(
        local_config(config, layout) if layout else config,
        dtype=jnp.dtype(dtype),
        max_rank=max_rank,
        lora_groups=tuple(lora_groups),
        implementation=implementation,
        loop=loop,
        layout=layout,
    )
    apply: Callable[..., Any] = model.apply

    def forward(params: Params, state: State, batch: Batch) -> tuple[State, Any]:
        variables = {"params": params}
        pages, hidden = apply(variables, state.pages, batch)
        rows = hidden[batch.logit_rows]
        logits = apply(variables, rows, method="logits")
        return State(pages=pages), (logits, rows.astype(jnp.float32)) if batch.return_hidden else logits

    return shard_forward(forward, config, parallel) if parallel else forward


def make_sample(parallel: Parallel | None = None) -> Callable[[jax.Array, Sampling], Output]:
    """Makes ``sample(logits, sampling) -> output`` for the logits of make_forward."""
    return shard_sample(sample, parallel) if parallel else sample


def make_batch_step(config: ModelConfig, **options) -> BatchStep:
    """Makes ``batch_step(params, state, batch) -> (state, output)`` for one model.

    The function is pure: put it inside your own ``jax.jit``, ``lax.scan`` or ``shard_map``, or jit it as it is with
    ``donate_argnums=1`` so that the pool is updated in place, and on GPUs with ``compiler_options=compiler_options()``.

    dtype: of parameters and pool. max_rank: largest rank of one module that an adapter may have.
    lora_groups: groups of projections ("qkv", "o", "gu", "down") that adapters may target; fewer make a faster step.
    implementation: "auto", "mosaic" or "xla" kernels. loop: "unroll" or "scan", see Llama.
    parallel: devices to spread the step over, see make_parallel; None for one. Works inside a program of your own that
    uses the same mesh.
    """
    forward = make_forward(config, **options)
    choose = make_sample(options.get("parallel"))

    def batch_step(params: Params, state: State, batch: Batch) -> tuple[State, Output]:
        if batch.sampling is None:
            raise ValueError("batch.sampling is missing: batch_step needs it to choose tokens")
        state, found = forward(params, state, batch)
        logits, hidden = found if batch.return_hidden else (found, None)
        output = dataclasses.replace(choose(logits, batch.sampling), hidden=hidden)
        if batch.return_logits:
            output = dataclasses.replace(output, logits=logits[:, : config.vocab_size])
        return state, output

    return batch_step
