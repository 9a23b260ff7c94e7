"""Gathers the sampling parameters of a step's rows into arrays."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from slora_jax.batch import Sampling
from slora_jax.grammar import Constraint, token_masks
from slora_jax.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """Sampling of one row of logits. `params` is None for a row that only reports the log-probability of `target`."""

    params: SamplingParams | None
    seed: int = 0
    tokens: Sequence[int] = ()  # prompt and output so far
    prompt_len: int = 0
    target: int = -1
    top_logprobs: int | None = None
    constraint: Constraint | None = None


def _bucket(n: int) -> int:
    """0, or the next power of two from 16 on, so that few widths are compiled."""
    return 0 if n == 0 else max(16, 1 << (n - 1).bit_length())


def _penalised(p: SamplingParams) -> bool:
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)


def build_sampling(rows: Sequence[RowSampling], size: int) -> Sampling:
    """Arrays of `size` rows; rows past ``len(rows)`` are greedy padding."""
    with_history = [bool(r.params and _penalised(r.params)) for r in rows]
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
        seed[i] = (row.seed ^ (row.seed >> 32)) & 0xFFFFFFFF
        draw[i] = len(row.tokens) - row.prompt_len
        if with_history[i]:
            history[i, : len(row.tokens)] = row.tokens
            output_start[i] = row.prompt_len
        for j, (token, value) in enumerate(p.logit_bias.items()):
            bias_ids[i, j], bias_values[i, j] = token, value
        if p.temperature > 0:
            filtered = p.top_k or p.top_p < 1 or p.min_p
            mode = "filtered" if filtered or mode == "filtered" else "random"
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
        top_logprobs=20 if any(wanted) else 0,
    )
