"""A sequence: one completion being generated, as the scheduler sees it. Plain Python, no jax."""

from collections.abc import Hashable
import dataclasses
from typing import Any

from pallas_kernels.geometry import PAGE_TOKENS, ceil_div

_MOST_PAGES = (1 << 32) - 1  # of an adapter


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterUse:
    """What the scheduler needs to know of a sequence's adapter. Equal digests share pages.

    source: where its weights come from, for whoever writes them; the scheduler hands it on.
    """

    digest: str
    num_pages: int
    reload_cost: float = 0.0  # seconds
    source: Any = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One prompt and what has been generated after it.

    `num_computed` of its tokens have their keys and values in pages, or will have when the steps planned so far have
    run. Preemption sets it back to 0 and keeps the tokens. `num_unknown` tokens after `tokens` are being sampled: they
    count for lengths and pages, and only their values are not known on the host yet.
    row: of the running sequence in arrays with a row for each of them; -1 while it does not run. ticket: another one
    each time it is started. room: tokens that its pages hold. missed: whether its adapter had to be copied for
    it, so that it could not start at once.
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
    num_unknown: int = 0
    row: int = -1
    ticket: int = 0
    room: int = 0
    missed: bool = False
    page_keys: list[bytes] = dataclasses.field(default_factory=list, repr=False)  # see slora_jax/prefix_cache.py
    group: str = dataclasses.field(init=False, repr=False)  # sequences of one adapter stand together in a batch
    place: str = dataclasses.field(init=False, repr=False)  # orders sequences in a batch

    def __post_init__(self):
        assert 0 < self.prompt_len <= len(self.tokens)
        self._set_group()

    def name_adapter(self, digest: str) -> None:
        """The digest of the adapter's contents turned out. The sequence must not have run."""
        assert self.adapter is not None
        self.adapter = dataclasses.replace(self.adapter, digest=digest)
        self._set_group()

    def _set_group(self) -> None:
        self.group = self.adapter.digest if self.adapter else ""
        self.set_place()

    def set_place(self) -> None:
        """Where it stands in a batch, before it starts: large adapters first, for the LoRA kernels deal out their work
        in this order, and the last of it should be small. Those of one adapter that begin alike stand together, for
        attention looks at neighbours to know which pages are read again.
        """
        size = self.adapter.num_pages if self.adapter else 0
        beginning = self.page_keys[0].hex() if self.page_keys else ""
        self.place = f"{_MOST_PAGES - size:08x} {self.group} {beginning}"

    @property
    def length(self) -> int:
        """Tokens, with those whose values are not known yet."""
        return len(self.tokens) + self.num_unknown

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) + self.num_unknown - self.num_computed

    def push(self, token: int) -> None:
        """The value of the oldest unknown token."""
        assert self.num_unknown, "no token was sampled for the sequence"
        self.num_unknown -= 1
        self.tokens.append(token)

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def worst_case_pages(self) -> int:
        """Pages it needs at its longest, adapter included. The last token is never fed back, so it needs no slot."""
        pages = ceil_div(self.prompt_len + self.max_tokens - 1, PAGE_TOKENS)
        return pages + (self.adapter.num_pages if self.adapter else 0)


@dataclasses.dataclass(eq=False, slots=True, init=False)
class Chunk:
    """Tokens ``start`` to ``start + length`` of a sequence, to be computed in one step. Not to be changed.

    samples: whether the chunk reaches the sequence's end as it was when the chunk was made, so that its next token is
    wanted.
    """

    seq: Sequence
    start: int
    length: int
    samples: bool

    def __init__(self, seq: Sequence, start: int, length: int):
        self.seq, self.start, self.length = seq, start, length
        self.samples = start + length == len(seq.tokens) + seq.num_unknown
