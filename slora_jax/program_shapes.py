"""What programs are compiled for: what all of an engine have in common, and the padded shapes of steps and samplers."""

import dataclasses
from typing import Literal

from jax import numpy as jnp

from pallas_kernels import GROUPS, Implementation
from slora_jax.batch import Batch, Sampling
from slora_jax.model_config import ModelConfig
from slora_jax.parallel import Parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What all programs of an engine have in common. See EngineConfig and make_batch_step."""

    config: ModelConfig
    dtype: jnp.dtype
    max_rank: int
    lora_groups: tuple[str, ...] = tuple(GROUPS)
    implementation: Implementation
    loop: Literal["unroll", "scan"]
    parallel: Parallel | None = None


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Padded sizes of a step: sequences, tokens, rows of logits; whether each sequence has one token only; whether some
    sequence has an adapter; whether the rows' hidden states are wanted, too; whether the adapters are few
    (Batch.few_adapters).
    """

    seqs: int
    tokens: int
    rows: int
    decode_only: bool
    use_adapters: bool
    hidden: bool = False
    few: bool = False

    @classmethod
    def of(cls, batch: Batch) -> "StepShape":
        sizes = (len(batch.kv_lens), len(batch.tokens), len(batch.logit_rows))
        return cls(*sizes, batch.max_query == 1, batch.use_adapters, batch.return_hidden, batch.few_adapters)

    def __str__(self) -> str:
        kind = "decode" if self.decode_only else "prompt"
        hidden = " for embeddings" if self.hidden else ""
        adapters = (" with few adapters" if self.few else "") if self.use_adapters else " without adapters"
        return f"{kind} step of {self.tokens} tokens{hidden}{adapters}"


@dataclasses.dataclass(frozen=True)
class SampleShape:
    """What a sampler is compiled for: see Sampling."""

    rows: int
    mode: str
    logprobs: bool
    top_logprobs: int
    history: int
    biases: int
    mask_words: int

    @classmethod
    def of(cls, s: Sampling) -> "SampleShape":
        return cls(
            len(s.temperature),
            s.mode,
            s.logprobs,
            s.top_logprobs,
            s.history.shape[1],
            s.bias_ids.shape[1],
            s.allowed.shape[1],
        )

    def __str__(self) -> str:
        return f"sampler of {self.rows} rows"
