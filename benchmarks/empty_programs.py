"""A step's programs, empty: they take all arguments, as the host hands them over, and compute nothing."""

import jax
from jax import numpy as jnp
import numpy as np

from slora_jax.batch import Batch, Output, Sampling


class EmptyPrograms:
    """Called as a Runner calls its programs. max_seqs: sequences whose last tokens the device keeps."""

    def __init__(self, max_seqs: int):
        self._last = jnp.zeros(max_seqs, jnp.int32)
        self._forward = jax.jit(lambda last, batch: jnp.zeros(batch.logit_rows.shape, jnp.float32), keep_unused=True)

        def choose(logits, sampling: Sampling, last, rows):
            tokens = jnp.zeros(logits.shape, jnp.int32)
            return Output(tokens=tokens, finite=jnp.ones(logits.shape, bool)), last.at[rows].set(tokens, mode="drop")

        self._sample = jax.jit(choose, keep_unused=True)

    def forward(self, batch: Batch) -> tuple[jax.Array, None]:
        return self._forward(self._last, batch), None

    def sample(self, logits: jax.Array, sampling: Sampling, rows: np.ndarray) -> Output:
        output, self._last = self._sample(logits, sampling, self._last, rows)
        for array in jax.tree.leaves(output):
            array.copy_to_host_async()
        return output
