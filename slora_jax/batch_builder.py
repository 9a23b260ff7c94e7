"""Turns a step plan into the arrays of a Batch, on the host in numpy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from pallas_kernels import PAGE_TOKENS, Geometry
from sharding import Layout
from slora_jax.adapter_rows import AdapterRows, Table
from slora_jax.adapters import AdapterShape
from slora_jax.batch import Batch
from slora_jax.buckets import Buckets
from slora_jax.page_pool import PagePool
from slora_jax.seats import sequence_owner
from slora_jax.sequence import Chunk


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
    """

    def __init__(
        self,
        geometry: Geometry,
        buckets: Buckets,
        num_pages: int,
        max_model_len: int,
        layout: Layout | None = None,
        put: Callable[[Table], Table] | None = None,
        deterministic: bool = False,
    ):
        self.geometry = geometry
        self.deterministic = deterministic
        self.layout = layout
        self.buckets = buckets
        self.num_pages = num_pages
        self.max_model_len = max_model_len
        self.table_pages = -(-max_model_len // PAGE_TOKENS)
        self._adapters = AdapterRows(geometry, num_pages, buckets.max_seqs, layout, put)
        # by Sequence.row
        self._page_tables = np.zeros((buckets.max_seqs, self.table_pages), np.int32)
        self._filled = np.zeros(buckets.max_seqs, np.int32)  # pages in the table
        self._tickets = np.full(buckets.max_seqs, -1, np.int64)  # of the sequence that it is for

    def forget(self) -> None:
        """Forgets the sequences of earlier steps; those that come may have the same names."""
        self._tickets[:] = -1

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
        count = len(chunks)
        lengths = np.fromiter((c.length for c in chunks), np.int32, count)
        starts = np.fromiter((c.start for c in chunks), np.int32, count)
        ends = starts + lengths
        if decode_only is None:
            decode_only = bool((lengths == 1).all()) and not hidden
        num_tokens = int(lengths.sum())
        rows = self._rows(chunks, ends)
        widest = widest or not rows.samples.all()
        size, width = self.buckets.shape(self.buckets.max_seqs if widest else count, num_tokens, decode_only)
        num_rows = size
        if len(rows) > size or (self.deterministic and not decode_only):
            # with log-probabilities of prompts, which have a shape of their own
            width = self.buckets.tokens[-1]
            num_rows = self.buckets.wide_rows if len(rows) <= self.buckets.wide_rows else width
        q_start = np.full(size + 1, num_tokens, np.int32)
        q_start[:count] = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(count), lengths)  # chunk of each token
        positions = np.zeros(width, np.int32)
        positions[:num_tokens] = np.arange(num_tokens) + (starts - q_start[:count])[owner]
        tables = self._tables(chunks, ends, pool, size)
        page_ids = np.full(width, self.num_pages, np.int32)
        page_ids[:num_tokens] = tables[owner, positions[:num_tokens] // PAGE_TOKENS]
        seg_start, seg_adapter, table = self._segments(chunks, q_start, pool, adapters)
        logit_rows = (q_start[:count] - starts)[rows.index] + rows.position
        batch = Batch(
            tokens=self._tokens(chunks, width),
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
            use_adapters=self.deterministic or bool((seg_adapter >= 0).any()),
            return_hidden=not decode_only and (hidden or self.deterministic),
        )
        return batch, rows

    @staticmethod
    def _tokens(chunks: Sequence[Chunk], width: int) -> np.ndarray:
        tokens: list[int] = []
        for chunk in chunks:
            if chunk.length == 1:
                known, at = chunk.seq.tokens, chunk.start
                tokens.append(known[at] if at < len(known) else -1 - chunk.seq.row)
                continue
            part = chunk.seq.tokens[chunk.start : chunk.start + chunk.length]
            tokens += part
            if len(part) < chunk.length:
                tokens.append(-1 - chunk.seq.row)
        return _padded(np.array(tokens, np.int32), width)

    def _tables(self, chunks: Sequence[Chunk], ends: np.ndarray, pool: PagePool, size: int) -> np.ndarray:
        """Page tables of the chunks' sequences, int32 [size, Pmax]. Only those that have grown are looked up."""
        count = len(chunks)
        rows = np.fromiter((c.seq.row for c in chunks), np.int32, count)
        tickets = np.fromiter((c.seq.ticket for c in chunks), np.int64, count)
        if count and rows[0] < 0:  # sequences without a scheduler: nothing is known of them
            rows = np.arange(count, dtype=np.int32)
            self.forget()
        new = self._tickets[rows] != tickets
        self._filled[rows[new]] = 0
        self._tickets[rows] = tickets
        for i in np.flatnonzero(self._filled[rows] * PAGE_TOKENS < ends).tolist():
            row = rows[i]
            pages = pool.pages(sequence_owner(chunks[i].seq))
            first = self._filled[row]
            self._page_tables[row, first : len(pages)] = pages[first:]
            self._filled[row] = len(pages)
        tables = np.zeros((size, self.table_pages), np.int32)
        np.take(self._page_tables, rows, axis=0, out=tables[:count], mode="clip")
        return tables

    def _segments(
        self, chunks: Sequence[Chunk], q_start: np.ndarray, pool: PagePool, adapters: Mapping[str, AdapterShape]
    ) -> tuple[np.ndarray, np.ndarray, Table]:
        """Runs of chunks with the same adapter: token rows where they begin, their adapters' rows of the table, and the
        table.
        """
        size = len(q_start) - 1
        groups = [c.seq.group for c in chunks]
        row_of, table = self._adapters.place([d for d in dict.fromkeys(groups) if d], pool, adapters)
        of_chunk = np.array([row_of[d] if d else -1 for d in groups], np.int32)
        first = np.ones(len(chunks), bool)
        first[1:] = of_chunk[1:] != of_chunk[:-1]
        begin = np.flatnonzero(first)
        seg_start = np.full(size + 1, q_start[-1], np.int32)
        seg_start[: len(begin)] = q_start[begin]
        seg_adapter = np.full(size, -1, np.int32)
        seg_adapter[: len(begin)] = of_chunk[begin]
        return seg_start, seg_adapter, table

    @staticmethod
    def _rows(chunks: Sequence[Chunk], ends: np.ndarray) -> Rows:
        count = len(chunks)
        samples = np.fromiter((c.samples for c in chunks), bool, count)
        index, position = np.flatnonzero(samples).astype(np.int32), ends[samples] - 1
        sampled = np.ones(len(index), bool)
        asked = [
            (i, p)
            for i, c in enumerate(chunks)
            if c.seq.prompt_logprobs
            for p in range(c.start, min(c.start + c.length, c.seq.prompt_len - 1))
        ]
        if asked:
            more = np.array(asked, np.int32)
            index, position = np.concatenate([more[:, 0], index]), np.concatenate([more[:, 1], position])
            sampled = np.concatenate([np.zeros(len(asked), bool), sampled])
        return Rows(chunks, index, position, sampled)

    def padding(
        self,
        num_seqs: int,
        num_tokens: int,
        *,
        decode_only: bool,
        use_adapters: bool,
        rows: int | None = None,
        hidden: bool = False,
    ) -> Batch:
        """A batch of the given padded shape that holds no token: compiling and running it changes nothing. rows: of
        logits, if not as many as sequences. hidden: with the rows' hidden states.
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
            return_hidden=hidden,
        )


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """A copy with zeros appended up to `size` on the first axis."""
    padded = np.zeros((size, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return padded
