"""What a step takes and returns, as pytrees of arrays.

Every array's shape is a bucket; what the step works on is data. Requests, adapters, ranks, lengths and pages change
freely without a new compilation.
"""

import dataclasses
from typing import Any

import jax

from pallas_kernels import AdapterTable
from sharding import ShardedTable

Leaf = Any  # a jax or numpy array, or whatever a pytree transformation puts in its place


def _static(**kwargs):
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What lives on the device from one step to the next. Donated to every step."""

    pages: Leaf  # compute dtype [L, P, E]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token of each row is chosen. Rows are those of ``Batch.logit_rows``.

    ``history`` serves the penalties: tokens of the prompt, then of the output; -1 pads. Empty (width 0) arrays switch a
    feature off at compile time.
    ``mode``: "greedy" takes the largest logit, "random" draws at a temperature, "filtered" also honours top_k, top_p
    and min_p.
    """

    temperature: Leaf  # float32 [R]: 0 = greedy
    top_k: Leaf  # int32 [R]: 0 = off
    top_p: Leaf  # float32 [R]: 1 = off
    min_p: Leaf  # float32 [R]: 0 = off
    seed: Leaf  # uint32 [R]
    draw: Leaf  # int32 [R]: index of the token within its request: with the seed it fixes the draw
    presence: Leaf  # float32 [R]
    frequency: Leaf  # float32 [R]
    repetition: Leaf  # float32 [R]: 1 = off
    history: Leaf  # int32 [R, Hn]
    output_start: Leaf  # int32 [R]: where the output begins in `history`
    bias_ids: Leaf  # int32 [R, Nb]: -1 pads
    bias_values: Leaf  # float32 [R, Nb]
    allowed: Leaf  # uint32 [R, W]: bit v % 32 of word v // 32 = token v may be chosen; W = 0 = every token may
    targets: Leaf  # int32 [R]: token whose log-probability is asked for (prompt_logprobs); -1 = the one sampled
    mode: str = _static(default="greedy")
    top_logprobs: int = _static(default=0)  # how many of the best tokens to return
    logprobs: bool = _static(default=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's tokens: decode tokens and prompt chunks together, sequences of one adapter next to each other.

    Token rows past ``q_start[-1]`` and sequences without tokens are padding.
    """

    tokens: Leaf  # int32 [T]
    positions: Leaf  # int32 [T]
    page_ids: Leaf  # int32 [T]: page that takes the token's key and value; P or more drops it (padding)
    slots: Leaf  # int32 [T]: slot in that page, 0 to 15
    q_start: Leaf  # int32 [B+1]: token rows of sequence b: q_start[b] to q_start[b + 1]
    kv_lens: Leaf  # int32 [B]: tokens of context after this step
    page_tables: Leaf  # int32 [B, Pmax]
    seg_start: Leaf  # int32 [S+1]: token rows of adapter segment s
    seg_adapter: Leaf  # int32 [S]: row of `adapters`, -1 = base model
    adapters: AdapterTable | ShardedTable  # the latter where the step runs on several devices
    logit_rows: Leaf  # int32 [R]: token rows whose next token is wanted
    sampling: Sampling | None = None  # None leaves sampling to the caller: only `forward` takes such a batch
    max_query: int = _static(default=1)  # 1 = every sequence has one token; else a bound, for prompt chunks
    use_adapters: bool = _static(default=True)  # False leaves all LoRA work out of the program
    # True promises that in no module of any layer the segments' adapters take more than MOST_FEW ranks in all
    # (few_ranks), each counted in every segment that names it. Where that does not hold, the step's results are not
    # finite.
    few_adapters: bool = _static(default=False)
    return_logits: bool = _static(default=False)
    return_hidden: bool = _static(default=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Results for the rows of ``Batch.logit_rows``. Optional fields are None unless the batch asks for them."""

    tokens: Leaf  # int32 [R]
    logprobs: Leaf | None = None  # float32 [R]: of the sampled token, or of ``Sampling.targets``
    top_ids: Leaf | None = None  # int32 [R, n]
    top_logprobs: Leaf | None = None  # float32 [R, n]
    logits: Leaf | None = None  # float32 [R, V]
    hidden: Leaf | None = None  # float32 [R, H]: final hidden state, after the last norm
    finite: Leaf | None = None  # bool [R]: False where the logits hold NaN or Inf
