"""Turns a step plan into the arrays of a Batch, on the host in numpy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from pallas_kernels import MOST_FEW, PAGE_TOKENS, Geometry, small_for_few
from sharding import Layout
from slora_jax.adapter_rows import AdapterRows, Table
from slora_jax.adapters import AdapterShape
from slora_jax.batch import Batch
from slora_jax.buckets import Buckets
from slora_jax.page_pool import PagePool
from slora_jax.seats import sequence_owner
from slora_jax.sequence import Chunk
from slora_jax.sequence import Sequence as Seq

_UNKNOWN = -2  # where -1 is the base model


class Row(NamedTuple):
    """A row of logits: which chunk it comes from, the position whose next token it predicts, and whether that token is
    sampled for the sequence (else it is a token of the prompt, whose log-probability is asked for).
    """

    chunk: Chunk
    position: int
    samples: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What a batch's rows of logits are, as arrays over the rows. Iterating gives a Row for each."""

    chunks: Sequence[Chunk]  # of the batch
    index: Int[np.ndarray, "R"]  # of each row's chunk
    position: Int[np.ndarray, "R"]
    samples: Bool[np.ndarray, "R"]
    seq_row: Int[np.ndarray, "R"]  # Sequence.row

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Row]:
        columns = (self.index.tolist(), self.position.tolist(), self.samples.tolist())
        return (Row(self.chunks[i], position, samples) for i, position, samples in zip(*columns, strict=True))


class BatchBuilder:
    """Builds batches of bucketed shapes for one model and one pool.

    Page tables and the adapter table are kept from step to step; a step's arrays are copies, so that a step that still
    runs never sees them change.

    deterministic: one shape for each kind of step, so also steps without adapters, or without log-probabilities of
    prompts, have the shape of those with them.
    layout: where the model is on several devices. put: brings an adapter table to the device, see AdapterRows.
    few_adapters: small steps promise Batch.few_adapters where it holds, and would if all layers of an adapter were as
    its largest; never with `deterministic`, whose steps have one shape, or `layout`, where nothing makes use of it.
    """

    def __init__(
        self,
        geometry: Geometry,
        buckets: Buckets,
        num_pages: int,
        max_model_len: int,
        layout: Layout | None = None,
        put: Callable[[Table, Sequence[int]], Table] | None = None,
        deterministic: bool = False,
        few_adapters: bool = False,
    ):
        self.geometry = geometry
        self.deterministic = deterministic
        self.few_adapters = few_adapters and not deterministic and layout is None
        self.layout = layout
        self.buckets = buckets
        self.num_pages = num_pages
        self.max_model_len = max_model_len
        self.table_pages = -(-max_model_len // PAGE_TOKENS)
        self._adapters = AdapterRows(geometry, num_pages, buckets.max_seqs, layout, put)
        # by Sequence.row
        self._page_tables = np.zeros((buckets.max_seqs, self.table_pages), np.int32)
        self._filled = np.zeros(buckets.max_seqs, np.int32)  # pages in the table
        self._tickets = [-1] * buckets.max_seqs  # of the sequence that it is for
        self._adapter_rows = np.full(buckets.max_seqs, _UNKNOWN, np.int32)  # as when they were last looked up

    def forget(self) -> None:
        """Forgets the sequences of earlier steps; those that come may have the same names."""
        self._tickets = [-1] * len(self._tickets)

    def may_promise_few(self, num_tokens: int) -> bool:
        """Whether steps of so many tokens, padding included, set Batch.few_adapters where it holds. A single token is a
        product of its own kind.
        """
        return self.few_adapters and num_tokens > 1 and small_for_few(num_tokens, self.geometry)

    def build(
        self,
        chunks: Sequence[Chunk],
        pool: PagePool,
        adapters: Mapping[str, AdapterShape],
        *,
        widest: bool = False,
        decode_only: bool | None = None,
        hidden: bool = False,
    ) -> tuple[Batch, Rows]:
        """Batch of numpy arrays for chunks in batch order, and what its rows of logits mean.

        widest: pad to the largest number of sequences; always so with log-probabilities of a prompt.
        decode_only: kind of the step; None: as the chunks are. hidden: the rows' final hidden states are wanted, which
        only steps of the prompts' kind give; deterministic ones always do.
        A token whose value is not known on the host is given as ``-1 - row``, row being its sequence's. Only a
        sequence's last token can be.
        adapters: by digest; every adapter of `chunks` must have its pages in the pool.
        """
        count, seqs = len(chunks), [c.seq for c in chunks]
        num_tokens = sum([c.length for c in chunks])
        single = num_tokens == count  # a token each
        lengths = np.ones(count, np.int32) if single else np.array([c.length for c in chunks], np.int32)
        starts = np.array([c.start for c in chunks], np.int32)
        ends = starts + lengths
        if decode_only is None:
            decode_only = single and not hidden
        seq_rows = np.array([seq.row for seq in seqs], np.int32)
        rows = self._rows(chunks, seq_rows, ends)
        widest = widest or not rows.samples.all()
        size, width = self.buckets.shape(self.buckets.max_seqs if widest else count, num_tokens, decode_only)
        num_rows = size
        if len(rows) > size or (self.deterministic and not decode_only):
            # with log-probabilities of prompts, which have a shape of their own
            width = self.buckets.tokens[-1]
            num_rows = self.buckets.wide_rows if len(rows) <= self.buckets.wide_rows else width
        q_start = np.full(size + 1, num_tokens, np.int32)
        owner = np.arange(count)  # chunk of each token
        q_start[:count] = owner if single else np.cumsum(lengths) - lengths
        owner = owner if single else np.repeat(owner, lengths)
        positions = np.zeros(width, np.int32)
        positions[:num_tokens] = np.arange(num_tokens) + (starts - q_start[:count])[owner]
        kept = self._kept_rows(seqs, seq_rows)
        tables = self._tables(seqs, kept, ends, pool, size)
        page_ids = np.full(width, self.num_pages, np.int32)
        page_ids[:num_tokens] = tables[owner, positions[:num_tokens] // PAGE_TOKENS]
        seg_start, seg_adapter, table = self._segments(seqs, kept, q_start, pool, adapters)
        adapted = bool((seg_adapter >= 0).any())
        few = adapted and self.may_promise_few(width) and self._adapters.ranks_in_all(seg_adapter[:count]) <= MOST_FEW
        logit_rows = (q_start[:count] - starts)[rows.index] + rows.position
        batch = Batch(
            tokens=_padded(_single_tokens(seqs, seq_rows, starts) if single else _tokens(chunks), width),
            positions=positions,
            page_ids=page_ids,
            slots=positions % PAGE_TOKENS,
            q_start=q_start,
            kv_lens=_padded(ends, size),
            page_tables=tables,
            seg_start=seg_start,
            seg_adapter=seg_adapter,
            adapters=table,
            logit_rows=_padded(logit_rows, num_rows),
            max_query=1 if decode_only else width,
            use_adapters=self.deterministic or adapted,
            few_adapters=few,
            return_hidden=not decode_only and (hidden or self.deterministic),
        )
        return batch, rows

    def _kept_rows(self, seqs: Sequence[Seq], rows: np.ndarray) -> np.ndarray:
        """The sequences' rows of what is kept, int32. What was kept of others that had them is forgotten."""
        if len(seqs) and rows[0] < 0:  # sequences without a scheduler: nothing is known of them
            rows = np.arange(len(seqs))
            self.forget()
        tickets = self._tickets
        held = zip(rows.tolist(), seqs, strict=True)
        for row, ticket in [(row, seq.ticket) for row, seq in held if tickets[row] != seq.ticket]:
            self._filled[row] = 0
            self._adapter_rows[row] = _UNKNOWN
            tickets[row] = ticket
        return rows

    def _tables(self, seqs: Sequence[Seq], rows: np.ndarray, ends: np.ndarray, pool: PagePool, size: int) -> np.ndarray:
        """Page tables of sequences, int32 [size, Pmax]. Only those that have grown are looked up."""
        filled = self._filled[rows]
        grown = np.flatnonzero(filled * PAGE_TOKENS < ends)
        for i, row, first in zip(grown.tolist(), rows[grown].tolist(), filled[grown].tolist(), strict=True):
            pages = pool.pages(sequence_owner(seqs[i]))
            self._page_tables[row, first : len(pages)] = pages[first:]
            self._filled[row] = len(pages)
        tables = np.zeros((size, self.table_pages), np.int32)
        np.take(self._page_tables, rows, axis=0, out=tables[: len(rows)], mode="clip")
        return tables

    def _segments(
        self,
        seqs: Sequence[Seq],
        rows: np.ndarray,
        q_start: np.ndarray,
        pool: PagePool,
        adapters: Mapping[str, AdapterShape],
    ) -> tuple[np.ndarray, np.ndarray, Table]:
        """Runs of chunks with the same adapter: token rows where they begin, their adapters' rows of the table, and the
        table.
        """
        size = len(q_start) - 1
        of_chunk, table = self._adapter_rows[rows], self._adapters.current(pool)
        if table is None or of_chunk.min(initial=0) == _UNKNOWN:
            groups = [seq.group for seq in seqs]
            row_of, table = self._adapters.place([d for d in dict.fromkeys(groups) if d], pool, adapters)
            of_chunk = np.array([row_of[d] if d else -1 for d in groups], np.int32)
            self._adapter_rows[:] = _UNKNOWN  # others may have lost theirs
            self._adapter_rows[rows] = of_chunk
        first = np.ones(len(seqs), bool)
        first[1:] = of_chunk[1:] != of_chunk[:-1]
        begin = np.flatnonzero(first)
        seg_start = np.full(size + 1, q_start[-1], np.int32)
        seg_start[: len(begin)] = q_start[begin]
        seg_adapter = np.full(size, -1, np.int32)
        seg_adapter[: len(begin)] = of_chunk[begin]
        return seg_start, seg_adapter, table

    @staticmethod
    def _rows(chunks: Sequence[Chunk], seq_rows: np.ndarray, ends: np.ndarray) -> Rows:
        samples = [c.samples for c in chunks]
        index = np.arange(len(chunks)) if all(samples) else np.flatnonzero(samples)
        position = ends[index] - 1
        sampled = np.ones(len(index), bool)
        asking = [(i, c) for i, c in enumerate(chunks) if c.seq.prompt_logprobs]
        asked = [(i, p) for i, c in asking for p in range(c.start, min(c.start + c.length, c.seq.prompt_len - 1))]
        if asked:
            more = np.array(asked, np.int32)
            index, position = np.concatenate([more[:, 0], index]), np.concatenate([more[:, 1], position])
            sampled = np.concatenate([np.zeros(len(asked), bool), sampled])
        return Rows(chunks, index, position, sampled, seq_rows[index])

    def padding(
        self,
        num_seqs: int,
        num_tokens: int,
        *,
        decode_only: bool,
        use_adapters: bool,
        rows: int | None = None,
        hidden: bool = False,
        few_adapters: bool = False,
    ) -> Batch:
        """A batch of the given padded shape that holds no token: compiling and running it changes nothing. rows: of
        logits, if not as many as sequences. hidden: with the rows' hidden states. few_adapters: of the batch.
        """
        zeros = np.zeros(num_tokens, np.int32)
        return Batch(
            tokens=zeros,
            positions=zeros,
            page_ids=np.full(num_tokens, self.num_pages, np.int32),
            slots=zeros,
            q_start=np.zeros(num_seqs + 1, np.int32),
            kv_lens=np.zeros(num_seqs, np.int32),
            page_tables=np.zeros((num_seqs, self.table_pages), np.int32),
            seg_start=np.zeros(num_seqs + 1, np.int32),
            seg_adapter=np.full(num_seqs, -1, np.int32),
            adapters=self._adapters.place([], PagePool(1), {})[1],
            logit_rows=np.zeros(num_seqs if rows is None else rows, np.int32),
            max_query=1 if decode_only else num_tokens,
            use_adapters=use_adapters,
            few_adapters=few_adapters,
            return_hidden=hidden,
        )


def _tokens(chunks: Sequence[Chunk]) -> np.ndarray:
    tokens: list[int] = []
    for chunk in chunks:
        part = chunk.seq.tokens[chunk.start : chunk.start + chunk.length]
        tokens += part
        if len(part) < chunk.length:
            tokens.append(-1 - chunk.seq.row)
    return np.array(tokens, np.int32)


def _single_tokens(seqs: Sequence[Seq], seq_rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The same for chunks of one token each, of which few are known if steps overlap."""
    tokens = -1 - seq_rows
    known = np.flatnonzero(starts < np.array([len(seq.tokens) for seq in seqs]))
    if len(known):
        tokens[known] = [seqs[i].tokens[at] for i, at in zip(known.tolist(), starts[known].tolist(), strict=True)]
    return tokens


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """A copy with zeros appended up to `size` on the first axis."""
    padded = np.zeros((size, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded
