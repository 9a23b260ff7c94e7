"""Choosing the next token on the device.

A draw depends on the request's seed and on how many tokens it has, never on the batch or the row.
"""

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt
import numpy as np

from sharding import Vocabulary
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


def _penalise(logits: Float[Array, "R v"], s: Sampling, vocabulary: Vocabulary) -> Float[Array, "R v"]:
    """Repetition penalty over prompt and output (as Hugging Face defines it), presence and frequency over the output
    (as OpenAI does).
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    ids = vocabulary.columns(s.history)
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


def _draw(scaled: Float[Array, "R V"], s: Sampling) -> Int[Array, "R"]:
    """A token of each row by its filtered distribution."""
    filters = (s.top_k > 0) | (s.top_p < 1) | (s.min_p > 0)
    scaled = lax.cond(jnp.any(filters), lambda x: _filter(x, s), lambda x: x, scaled)
    return jnp.argmax(scaled + _noise(s, scaled.shape[1]), axis=-1).astype(jnp.int32)


def _bits(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: Int[Array, "*n"]) -> Float[Array, "*n"]:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _best(part: Float[Array, "R v"], count: int, vocabulary: Vocabulary) -> Int[Array, "R k"]:
    """The `count` largest of a device's part of each row: bits of the values, then tokens. Of equals the first."""
    if count == 1:
        columns = jnp.argmax(part, axis=1, keepdims=True)
        values = jnp.take_along_axis(part, columns, axis=1)
    else:
        values, columns = lax.top_k(part, min(count, part.shape[1]))
    return jnp.concatenate([_bits(values), vocabulary.ids(columns.astype(jnp.int32))], axis=1)


def _best_of_all(found: Int[Array, "N R k"], count: int) -> tuple[Float[Array, "R n"], Int[Array, "R n"]]:
    """Values and tokens of the `count` largest, from what `_best` found on every device in the order of the devices."""
    bits, ids = (half.swapaxes(0, 1).reshape(found.shape[1], -1) for half in jnp.split(found, 2, axis=2))
    values = _floats(bits)
    if count == 1:
        at = jnp.argmax(values, axis=1, keepdims=True)  # as in one row: NaN is the largest, of equals the first
    else:
        _, at = lax.top_k(values, count)
    return jnp.take_along_axis(values, at, axis=1), jnp.take_along_axis(ids, at, axis=1)


def sample(logits: Float[Array, "R v"], s: Sampling, vocabulary: Vocabulary | None = None) -> Output:
    """Next token of each row from float32 logits. Log-probabilities are those of the logits before any penalty or
    temperature.

    vocabulary: which columns of the rows these are, inside shard_map; None: all. Then every device looks through its
    own columns, and one small collective (two with log-probabilities) brings together what they found. Only top_k,
    top_p and min_p, whose thresholds depend on a whole row, join the rows first. The tokens are those of whole rows.
    """
    vocabulary = vocabulary or Vocabulary(logits.shape[1])
    raw = logits
    if s.history.shape[1]:
        logits = _penalise(logits, s, vocabulary)
    if s.bias_ids.shape[1]:
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, vocabulary.columns(s.bias_ids)].add(s.bias_values, mode="drop")
    if s.allowed.shape[1]:
        allowed = vocabulary.part(_unpack(s.allowed, vocabulary.size), logits.shape[1])
        logits = jnp.where(allowed, logits, -jnp.inf)
    # what follows is compiled alike whatever came before: the same logits then give the same bits
    logits, raw = lax.optimization_barrier((logits, raw))
    largest = jnp.max(raw, axis=1, keepdims=True)
    found = dict(
        greedy=_best(logits, 1, vocabulary),
        largest=_bits(largest),
        nan=jnp.any(jnp.isnan(raw), axis=1, keepdims=True).astype(jnp.int32),
    )
    if s.mode != "greedy":
        scaled = logits / jnp.where(s.temperature > 0, s.temperature, 1.0)[:, None]
        if s.mode == "random":
            noise = vocabulary.part(_noise(s, vocabulary.size), logits.shape[1])
            found["drawn"] = _best(scaled + noise, 1, vocabulary)
    if s.logprobs:
        # a device may have no column but -inf
        shifted = raw - jnp.where(jnp.isneginf(largest), 0, largest)
        found["total"] = _bits(jnp.sum(jnp.exp(shifted), axis=1, keepdims=True))
    count = min(s.top_logprobs, vocabulary.size) if s.logprobs else 0
    if count:
        found["top"] = _best(raw, count, vocabulary)
    ends = np.cumsum([part.shape[1] for part in found.values()])[:-1].tolist()
    merged = jnp.split(vocabulary.merge(jnp.concatenate(list(found.values()), axis=1)), ends, axis=2)
    everywhere = dict(zip(found, merged, strict=True))
    tokens = _best_of_all(everywhere["greedy"], 1)[1][:, 0]
    if s.mode == "filtered":
        # samplers for everything serve batches that want little of it, which then pay for no more
        drawn = lax.cond(jnp.any(s.temperature > 0), lambda x: _draw(x, s), lambda _: tokens, vocabulary.join(scaled))
        tokens = jnp.where(s.temperature > 0, drawn, tokens)
    elif s.mode == "random":
        tokens = jnp.where(s.temperature > 0, _best_of_all(everywhere["drawn"], 1)[1][:, 0], tokens)
    tops = _floats(everywhere["largest"])[:, :, 0]
    top = jnp.max(tops, axis=0)
    finite = jnp.isfinite(top) & ~jnp.any(everywhere["nan"], axis=(0, 2))
    if not s.logprobs:
        return Output(tokens=tokens, finite=finite)
    total = jnp.log(jnp.sum(_floats(everywhere["total"])[:, :, 0] * jnp.exp(tops - top), axis=0))
    chosen = vocabulary.pick(raw, jnp.where(s.targets >= 0, s.targets, tokens)) - top - total
    if not count:
        return Output(tokens=tokens, finite=finite, logprobs=chosen)
    values, ids = _best_of_all(everywhere["top"], count)
    values = values - top[:, None] - total[:, None]
    return Output(tokens=tokens, finite=finite, logprobs=chosen, top_ids=ids, top_logprobs=values)
