"""A sequence: one completion being generated, as the scheduler sees it. Plain Python, no jax."""

from collections.abc import Hashable
import dataclasses

from pallas_kernels.geometry import PAGE_TOKENS, ceil_div


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterUse:
    """What the scheduler needs to know of a sequence's adapter. Equal digests share pages."""

    digest: str
    num_pages: int
    reload_cost: float = 0.0  # seconds


@dataclasses.dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One prompt and what has been generated after it.

    `num_computed` of its tokens have their keys and values in pages. Preemption sets it back to 0 and keeps the tokens.
    adapter_name, tenant: whom policies and quotas count it for. priority: larger goes first, where the policy heeds it.
    arrival: seconds of the scheduler's clock, set when it is queued if not given. overtaken: how many sequences were
    admitted before it although its turn had come, because it did not fit.
    """

    seq_id: Hashable
    tokens: list[int]  # prompt, then output
    prompt_len: int
    max_tokens: int
    adapter: AdapterUse | None = None
    prompt_logprobs: bool = False
    num_computed: int = 0
    preemptions: int = 0
    adapter_name: str | None = None
    tenant: str | None = None
    priority: int = 0
    arrival: float | None = None
    overtaken: int = 0
    page_keys: list[bytes] = dataclasses.field(default_factory=list, repr=False)  # see slora_jax/prefix_cache.py

    def __post_init__(self):
        assert 0 < self.prompt_len <= len(self.tokens)

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.num_computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def worst_case_pages(self) -> int:
        """Pages it needs at its longest, adapter included. The last token is never fed back, so it needs no slot."""
        pages = ceil_div(self.prompt_len + self.max_tokens - 1, PAGE_TOKENS)
        return pages + (self.adapter.num_pages if self.adapter else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + length`` of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that its next token is wanted."""
        return self.start + self.length == len(self.seq.tokens)
