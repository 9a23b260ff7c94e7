"""Turns a step plan into the arrays of a Batch, on the host in numpy."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from pallas_kernels import MODULES, PAGE_TOKENS, AdapterTable, Geometry
from sharding import Layout, ShardedTable
from slora_jax.adapters import Adapter
from slora_jax.adapters.shards import table_rows
from slora_jax.batch import Batch
from slora_jax.buckets import Buckets
from slora_jax.page_pool import PagePool
from slora_jax.scheduler import Chunk, adapter_owner, sequence_owner


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of logits: which chunk it comes from, and the position whose next token it predicts."""

    chunk: Chunk
    position: int

    @property
    def samples(self) -> bool:
        return self.position == len(self.chunk.seq.tokens) - 1


class BatchBuilder:
    """Builds batches of bucketed shapes for one model and one pool. layout: where the model is on several devices."""

    def __init__(
        self, geometry: Geometry, buckets: Buckets, num_pages: int, max_model_len: int, layout: Layout | None = None
    ):
        self.geometry = geometry
        self.layout = layout
        self.buckets = buckets
        self.num_pages = num_pages
        self.table_pages = -(-max_model_len // PAGE_TOKENS)

    def build(
        self, chunks: Sequence[Chunk], pool: PagePool, adapters: Mapping[str, Adapter]
    ) -> tuple[Batch, list[Row]]:
        """Batch of numpy arrays for chunks in batch order, and what its rows of logits mean.

        adapters: by digest; every adapter of `chunks` must have its pages in the pool.
        """
        decode_only = all(c.length == 1 for c in chunks)
        num_tokens = sum(c.length for c in chunks)
        size, width = self.buckets.shape(len(chunks), num_tokens, decode_only)
        tokens = np.zeros(width, np.int32)
        positions = np.zeros(width, np.int32)
        page_ids = np.full(width, self.num_pages, np.int32)
        q_start = np.full(size + 1, num_tokens, np.int32)
        kv_lens = np.zeros(size, np.int32)
        page_tables = np.zeros((size, self.table_pages), np.int32)
        seg_start = np.full(size + 1, num_tokens, np.int32)
        seg_adapter = np.full(size, -1, np.int32)
        row_of_digest: dict[str, int] = {}
        rows: list[Row] = []
        at = segments = 0
        last_digest: str | None = ""  # no digest is empty, so the first chunk opens a segment
        for b, chunk in enumerate(chunks):
            seq, start, end = chunk.seq, chunk.start, chunk.start + chunk.length
            pages = np.asarray(pool.pages(sequence_owner(seq)), np.int32)
            part = slice(at, at + chunk.length)
            tokens[part] = seq.tokens[start:end]
            positions[part] = np.arange(start, end)
            page_ids[part] = pages[positions[part] // PAGE_TOKENS]
            q_start[b], kv_lens[b] = at, end
            page_tables[b, : len(pages)] = pages
            digest = seq.adapter.digest if seq.adapter else None
            if digest != last_digest:
                seg_start[segments] = at
                if digest is not None:
                    seg_adapter[segments] = row_of_digest.setdefault(digest, len(row_of_digest))
                segments += 1
                last_digest = digest
            if seq.prompt_logprobs and start < seq.prompt_len - 1:
                rows.extend(Row(chunk, p) for p in range(start, min(end, seq.prompt_len - 1)))
            if chunk.samples:
                rows.append(Row(chunk, end - 1))
            at += chunk.length
        row_of = {id(c): start for c, start in zip(chunks, q_start, strict=False)}
        logit_rows = np.zeros(size if len(rows) <= size else width, np.int32)
        for r, row in enumerate(rows):
            logit_rows[r] = row_of[id(row.chunk)] + row.position - row.chunk.start
        batch = Batch(
            tokens=tokens,
            positions=positions,
            page_ids=page_ids,
            slots=positions % PAGE_TOKENS,
            q_start=q_start,
            kv_lens=kv_lens,
            page_tables=page_tables,
            seg_start=seg_start,
            seg_adapter=seg_adapter,
            adapters=self._table(list(row_of_digest), pool, adapters, size),
            logit_rows=logit_rows,
            max_query=1 if decode_only else width,
            use_adapters=bool(row_of_digest),
        )
        return batch, rows

    def _table(
        self, digests: list[str], pool: PagePool, adapters: Mapping[str, Adapter], size: int
    ) -> AdapterTable | ShardedTable:
        layers = self.geometry.num_layers
        pages = np.zeros(self.num_pages, np.int32)
        page_start = np.zeros(size, np.int32)
        granules = np.zeros((size, layers, len(MODULES)), np.int32)
        scaling = np.zeros((size, layers, len(MODULES)), np.float32)
        at = 0
        for row, digest in enumerate(digests):
            ids = pool.pages(adapter_owner(digest))
            pages[at : at + len(ids)] = ids
            page_start[row] = at
            granules[row] = adapters[digest].granules
            scaling[row] = adapters[digest].scaling
            at += len(ids)
        common = dict(pages=pages, page_start=page_start, granules=granules, scaling=scaling)
        used = [adapters[digest] for digest in digests]
        if self.layout is not None:
            return ShardedTable(**common, **table_rows(used, self.layout, size))
        tile_start = np.zeros((size, layers), np.int32)
        for row, adapter in enumerate(used):
            tile_start[row] = adapter.tile_start(self.geometry)
        return AdapterTable(**common, tile_start=tile_start)

    def padding(self, num_seqs: int, num_tokens: int, *, decode_only: bool, use_adapters: bool) -> Batch:
        """A batch of the given padded shape that holds no token: compiling and running it changes nothing."""
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
            adapters=self._table([], PagePool(1), {}, num_seqs),
            logit_rows=np.zeros(num_seqs, np.int32),
            max_query=1 if decode_only else num_tokens,
            use_adapters=use_adapters,
        )
