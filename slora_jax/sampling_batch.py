"""Gathers the sampling parameters of a step's rows into arrays: any rows with build_sampling, those of running
sequences with a SamplingTable, which keeps them from step to step.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

from jaxtyping import Int
import numpy as np

from slora_jax.batch import Sampling
from slora_jax.grammar import Constraint, token_masks
from slora_jax.sampling_params import SamplingParams
from slora_jax.sequence import Chunk

TOP_LOGPROBS = 20  # as many as a request may ask for
MAX_BIASES = 1024
_HISTORY = 64  # the smallest width
_MODES = ("greedy", "random", "filtered")  # each does what those before it do


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """Sampling of one row of logits. `params` is None for a row that only reports the log-probability of `target`.

    tokens: prompt and output so far. length: their number, if not all of them are known; penalties need all.
    """

    params: SamplingParams | None
    seed: int = 0
    tokens: Sequence[int] = ()
    length: int | None = None
    prompt_len: int = 0
    target: int = -1
    top_logprobs: int | None = None
    constraint: Constraint | None = None


def _bucket(n: int) -> int:
    """0, or the next power of two from 16 on, so that few widths are compiled."""
    return 0 if n == 0 else max(16, 1 << (n - 1).bit_length())


def penalised(p: SamplingParams) -> bool:
    """Whether the next token depends on which tokens there are, beyond what the model sees."""
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)


def _mode(p: SamplingParams) -> str:
    if p.temperature <= 0:
        return "greedy"
    return "filtered" if p.top_k or p.top_p < 1 or p.min_p else "random"


def _fold(seed: int) -> int:
    return (seed ^ (seed >> 32)) & 0xFFFFFFFF


def history_widths(max_len: int) -> list[int]:
    """Widths of Sampling.history that an engine's programs have, for sequences of up to `max_len` tokens."""
    widths = [_HISTORY]
    while widths[-1] < max_len:
        widths.append(4 * widths[-1])
    return widths


def with_all_features(sampling: Sampling, max_len: int, vocab_size: int) -> Sampling:
    """The same, in one of few forms, for which programs are compiled ahead. Biases and forms go together."""
    history, ids, values, allowed = sampling.history, sampling.bias_ids, sampling.bias_values, sampling.allowed
    if width := history.shape[1]:
        more = next(w for w in history_widths(max_len) if w >= width) - width
        history = np.pad(history, ((0, 0), (0, more)), constant_values=-1)
    if ids.shape[1] or allowed.shape[1]:
        more = MAX_BIASES - ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, more)), constant_values=-1)
        values = np.pad(values, ((0, 0), (0, more)))
        if not allowed.shape[1]:
            allowed = np.full((len(ids), _mask_words(vocab_size)), 0xFFFFFFFF, np.uint32)
    wide = dict(history=history, bias_ids=ids, bias_values=values, allowed=allowed)
    return dataclasses.replace(sampling, **wide, mode=_MODES[-1], logprobs=True, top_logprobs=TOP_LOGPROBS)


def _mask_words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32


def sampling_shapes(
    seqs: Sequence[int],
    wide_rows: int,
    max_len: int,
    vocab_size: int,
    *,
    greedy_only: bool = False,
    deterministic: bool = False,
) -> list[Sampling]:
    """One of every shape that a SamplingTable, or with_all_features for the largest of `seqs` and for `wide_rows`,
    makes.

    greedy_only: those of steps in which nothing but the likeliest token is wanted. deterministic: all sequences' tokens
    are then chosen with all features.
    """
    plain = [build_sampling([], n) for n in seqs]
    if greedy_only:
        wide = [build_sampling([], rows) for rows in (seqs[-1], wide_rows)] if deterministic else []
        return plain + [with_all_features(s, max_len, vocab_size) for s in wide]
    found = [
        dataclasses.replace(s, mode=mode, logprobs=logprobs, top_logprobs=TOP_LOGPROBS if logprobs else 0)
        for s in plain
        for mode in _MODES
        for logprobs in (False, True)
    ]
    for rows in (seqs[-1], wide_rows):
        for width in (0, *history_widths(max_len)):
            for words in (0, _mask_words(vocab_size)):
                sampling = dataclasses.replace(
                    build_sampling([], rows),
                    history=np.full((rows, width), -1, np.int32),
                    allowed=np.full((rows, words), 0xFFFFFFFF, np.uint32),
                )
                found.append(with_all_features(sampling, max_len, vocab_size))
    return found


def build_sampling(rows: Sequence[RowSampling], size: int) -> Sampling:
    """Arrays of `size` rows; rows past ``len(rows)`` are greedy padding."""
    with_history = [bool(r.params and penalised(r.params)) for r in rows]
    history = np.full(
        (size, _bucket(max((len(r.tokens) for r, w in zip(rows, with_history, strict=True) if w), default=0))),
        -1,
        np.int32,
    )
    bias_width = _bucket(max((len(r.params.logit_bias) for r in rows if r.params), default=0))
    bias_ids = np.full((size, bias_width), -1, np.int32)
    bias_values = np.zeros((size, bias_width), np.float32)
    columns = dict(
        temperature=np.zeros(size, np.float32),
        top_k=np.zeros(size, np.int32),
        top_p=np.ones(size, np.float32),
        min_p=np.zeros(size, np.float32),
        presence=np.zeros(size, np.float32),
        frequency=np.zeros(size, np.float32),
        repetition=np.ones(size, np.float32),
    )
    seed = np.zeros(size, np.uint32)
    draw = np.zeros(size, np.int32)
    output_start = np.zeros(size, np.int32)
    targets = np.full(size, -1, np.int32)
    mode = "greedy"
    for i, row in enumerate(rows):
        targets[i] = row.target
        p = row.params
        if p is None:
            continue
        columns["temperature"][i] = p.temperature
        columns["top_k"][i] = p.top_k
        columns["top_p"][i] = p.top_p
        columns["min_p"][i] = p.min_p
        columns["presence"][i] = p.presence_penalty
        columns["frequency"][i] = p.frequency_penalty
        columns["repetition"][i] = p.repetition_penalty
        seed[i] = _fold(row.seed)
        draw[i] = (len(row.tokens) if row.length is None else row.length) - row.prompt_len
        if with_history[i]:
            history[i, : len(row.tokens)] = row.tokens
            output_start[i] = row.prompt_len
        for j, (token, value) in enumerate(p.logit_bias.items()):
            bias_ids[i, j], bias_values[i, j] = token, value
        mode = max(mode, _mode(p), key=_MODES.index)
    wanted = [r.top_logprobs for r in rows if r.top_logprobs is not None]
    return Sampling(
        **columns,
        seed=seed,
        draw=draw,
        history=history,
        output_start=output_start,
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed=token_masks({i: r.constraint for i, r in enumerate(rows) if r.constraint}, size),
        targets=targets,
        mode=mode,
        logprobs=bool(wanted),
        top_logprobs=TOP_LOGPROBS if any(wanted) else 0,
    )


class SamplingTable:
    """Sampling parameters of the running sequences, a row each (Sequence.row), so that a step's arrays are gathered and
    not built anew.

    keep: brings what is the same in many steps to the device.
    """

    def __init__(self, max_seqs: int, keep: Callable[[Sampling], Sampling] = lambda sampling: sampling):
        self._keep = keep
        self._columns = dict(
            temperature=np.zeros(max_seqs, np.float32),
            top_k=np.zeros(max_seqs, np.int32),
            top_p=np.ones(max_seqs, np.float32),
            min_p=np.zeros(max_seqs, np.float32),
            seed=np.zeros(max_seqs, np.uint32),
        )
        self._prompt_len = np.zeros(max_seqs, np.int32)
        self._mode = np.zeros(max_seqs, np.int8)
        self._logprobs = np.zeros(max_seqs, bool)
        self._special = np.zeros(max_seqs, bool)
        self._greedy: dict[int, Sampling] = {}  # by size

    def set(self, row: int, params: SamplingParams, seed: int, prompt_len: int) -> None:
        """A sequence with these parameters starts in this row."""
        for name in ("temperature", "top_k", "top_p", "min_p"):
            self._columns[name][row] = getattr(params, name)
        self._columns["seed"][row] = _fold(seed)
        self._prompt_len[row] = prompt_len
        self._mode[row] = _MODES.index(_mode(params))
        self._logprobs[row] = params.logprobs is not None
        self._special[row] = bool(params.logit_bias or params.structured) or penalised(params)

    def covers(self, chunks: Iterable[Chunk]) -> bool:
        """Whether gather takes all that these chunks sample: it knows no penalties, biases or forms."""
        return not self._special.any() or not any(c.samples and self._special[c.seq.row] for c in chunks)

    def gather(self, rows: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"], size: int) -> Sampling:
        """Arrays of `size` rows, of which the first are those of sequences `rows` that have `lengths` tokens; the
        others are greedy padding.
        """
        logprobs = bool(self._logprobs[rows].any())
        mode = int(self._mode[rows].max(initial=0))
        if not mode and not logprobs:
            if size not in self._greedy:
                self._greedy[size] = self._keep(build_sampling([], size))
            return self._greedy[size]
        columns = {}
        for name, column in self._columns.items():
            columns[name] = np.zeros(size, column.dtype)
            columns[name][: len(rows)] = column[rows]
        columns["draw"] = np.zeros(size, np.int32)
        columns["draw"][: len(rows)] = lengths - self._prompt_len[rows]
        empty = build_sampling([], size)
        return dataclasses.replace(
            empty, **columns, mode=_MODES[mode], logprobs=logprobs, top_logprobs=TOP_LOGPROBS if logprobs else 0
        )
