"""Choosing the next token on the device.

A draw depends on the request's seed and on how many tokens it has, never on the batch or the row.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from slora_jax.batch import Output, Sampling


def _ordered(x: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(holds, rows: int) -> UInt[Array, "R 1"]:
    """The largest uint32 t per row with ``holds(t)``, found bit by bit; `holds` is true up to some t."""

    def bit(i, t):
        trial = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(trial), trial, t)

    return lax.fori_loop(0, 32, bit, jnp.zeros((rows, 1), jnp.uint32))


def _filter(logits: Float[Array, "R V"], s: Sampling) -> Float[Array, "R V"]:
    """Puts -inf where top_k, top_p or min_p (applied in this order, each on what the one before left) rule a token out.

    Thresholds are found by bisection over the bits of the floats instead of a sort: exact, and ties stay in together.
    """
    rows, vocab = logits.shape
    order = _ordered(logits)
    k = jnp.where(s.top_k > 0, jnp.minimum(s.top_k, vocab), vocab)[:, None]
    kth = _largest_threshold(lambda t: jnp.sum(order >= t, axis=1, keepdims=True) >= k, rows)
    logits = jnp.where(order >= kth, logits, -jnp.inf)
    probs = jax.nn.softmax(logits, axis=-1)
    # rounding keeps the sum a little under 1: with top_p = 1 nothing may go
    mass = jnp.where(s.top_p < 1, s.top_p, 0.0)[:, None] * jnp.sum(probs, axis=1, keepdims=True)
    bits = lax.bitcast_convert_type(probs, jnp.uint32)  # probabilities are positive: their bits are in order
    least = _largest_threshold(lambda t: jnp.sum(jnp.where(bits >= t, probs, 0), axis=1, keepdims=True) >= mass, rows)
    logits = jnp.where((bits >= least) | (s.top_p >= 1)[:, None], logits, -jnp.inf)
    floor = s.min_p[:, None] * jnp.max(probs, axis=1, keepdims=True)
    return jnp.where(probs >= floor, logits, -jnp.inf)


def _penalise(logits: Float[Array, "R V"], s: Sampling) -> Float[Array, "R V"]:
    """Repetition penalty over prompt and output (as Hugging Face defines it), presence and frequency over the output
    (as OpenAI does).
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    ids = jnp.where(s.history >= 0, s.history, logits.shape[1])
    seen = jnp.zeros(logits.shape, bool).at[rows, ids].set(True, mode="drop")
    is_output = jnp.arange(s.history.shape[1]) >= s.output_start[:, None]
    counts = jnp.zeros(logits.shape, jnp.float32).at[rows, ids].add(is_output.astype(jnp.float32), mode="drop")
    factor = s.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    return logits - s.frequency[:, None] * counts - s.presence[:, None] * (counts > 0)


def _unpack(words: UInt[Array, "R W"], size: int) -> Bool[Array, "R V"]:
    """The first `size` bits of each row, the lowest bit of a word first."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :size].astype(bool)


def _noise(s: Sampling, vocab: int) -> Float[Array, "R V"]:
    def one(seed: UInt[Array, ""], draw: Int[Array, ""]):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), draw), (vocab,), jnp.float32)

    return jax.vmap(one)(s.seed, s.draw)


def sample(logits: Float[Array, "R V"], s: Sampling) -> Output:
    """Next token of each row from float32 logits. Log-probabilities are those of the logits before any penalty or
    temperature.
    """
    raw = logits
    if s.history.shape[1]:
        logits = _penalise(logits, s)
    if s.bias_ids.shape[1]:
        rows = jnp.arange(logits.shape[0])[:, None]
        ids = jnp.where(s.bias_ids >= 0, s.bias_ids, logits.shape[1])
        logits = logits.at[rows, ids].add(s.bias_values, mode="drop")
    if s.allowed.shape[1]:
        logits = jnp.where(_unpack(s.allowed, logits.shape[1]), logits, -jnp.inf)
    # what follows is compiled alike whatever came before: the same logits then give the same bits
    logits = lax.optimization_barrier(logits)
    tokens = jnp.argmax(logits, axis=-1)
    if s.mode != "greedy":
        scaled = logits / jnp.where(s.temperature > 0, s.temperature, 1.0)[:, None]
        if s.mode == "filtered":
            scaled = _filter(scaled, s)
        drawn = jnp.argmax(scaled + _noise(s, logits.shape[1]), axis=-1)
        tokens = jnp.where(s.temperature > 0, drawn, tokens)
    tokens = tokens.astype(jnp.int32)
    finite = jnp.isfinite(jnp.max(raw, axis=-1)) & ~jnp.any(jnp.isnan(raw), axis=-1)
    if not s.logprobs:
        return Output(tokens=tokens, finite=finite)
    logprobs = jax.nn.log_softmax(lax.optimization_barrier(raw), axis=-1)
    wanted = jnp.where(s.targets >= 0, s.targets, tokens)
    chosen = jnp.take_along_axis(logprobs, wanted[:, None], axis=1)[:, 0]
    if not s.top_logprobs:
        return Output(tokens=tokens, finite=finite, logprobs=chosen)
    values, ids = lax.top_k(logprobs, min(s.top_logprobs, logits.shape[1]))
    return Output(tokens=tokens, finite=finite, logprobs=chosen, top_ids=ids, top_logprobs=values)
