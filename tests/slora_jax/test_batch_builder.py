"""A step's arrays against the plan they are built from, over many steps of a random run."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np

from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import random_adapter
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.scheduler import Scheduler
from slora_jax.seats import sequence_owner
from slora_jax.sequence import AdapterUse, Sequence
from slora_jax.shapes import named_shape

CONFIG = named_shape("tiny-gqa")
ADAPTERS = {a.digest: a for a in (random_adapter(CONFIG, r, seed=i) for i, r in enumerate((8, 16, 8, 24, 8, 16)))}
USES = [AdapterUse(d, a.num_pages(CONFIG.geometry), 0.1) for d, a in ADAPTERS.items()]


def check(builder, plan, pool):
    """The whole batch, element by element, from its chunks."""
    batch, rows = builder.build(plan.chunks, pool, ADAPTERS)
    at, wanted = 0, []
    for b, chunk in enumerate(plan.chunks):
        seq, end = chunk.seq, chunk.start + chunk.length
        pages = pool.pages(sequence_owner(seq))
        assert batch.q_start[b] == at and batch.kv_lens[b] == end
        assert batch.page_tables[b, : len(pages)].tolist() == list(pages)
        for p in range(chunk.start, end):
            assert batch.positions[at] == p and batch.slots[at] == p % 16 and batch.page_ids[at] == pages[p // 16]
            assert batch.tokens[at] == (seq.tokens[p] if p < len(seq.tokens) else -1 - seq.row)
            segment = int(np.searchsorted(batch.seg_start, at, "right")) - 1
            row = batch.seg_adapter[segment]
            assert (row >= 0) == (seq.adapter is not None)
            if seq.adapter is not None:
                adapter, owned = ADAPTERS[seq.adapter.digest], pool.pages(adapter_owner(seq.adapter.digest))
                table = batch.adapters
                first = table.page_start[row]
                assert table.pages[first : first + len(owned)].tolist() == list(owned)
                assert (table.granules[row] == adapter.granules).all() and (table.scaling[row] == adapter.scaling).all()
                assert (table.tile_start[row] == adapter.tile_start(CONFIG.geometry)).all()
            if seq.prompt_logprobs and p < seq.prompt_len - 1:
                wanted.append((chunk, p, False, at))
            if chunk.samples and p == end - 1:
                wanted.append((chunk, p, True, at))
            at += 1
    assert (batch.q_start[len(plan.chunks) :] == at).all()
    assert (batch.page_ids[at:] == pool.num_pages).all() and not batch.kv_lens[len(plan.chunks) :].any()
    got = [(*row, int(where)) for row, where in zip(rows, batch.logit_rows, strict=False)]
    key = lambda w: (w[3], w[2])  # noqa: E731
    assert sorted(got, key=key) == sorted(wanted, key=key)


@settings(max_examples=20)
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from([1, 20, 40, 60]),
            st.integers(1, 30),
            st.sampled_from([None, *range(6)]),
            st.integers(0, 7).map(lambda n: n == 0),
            st.integers(0, 40),
        ),
        min_size=1,
        max_size=24,
    ),
    spare=st.integers(6, 60),
    max_seqs=st.integers(1, 3),
    step_pages=st.sampled_from([None, 1, 8]),
)
def test_batches_say_what_the_plans_say(requests, spare, max_seqs, step_pages):
    num_pages = max(use.num_pages for use in USES) + spare
    pool = PagePool(num_pages)
    loads = PageLoads(chunk_pages=1, step_pages=step_pages)
    scheduler = Scheduler(pool, max_seqs=max_seqs, max_step_tokens=24, prefix_page_cost=0.01, loads=loads)
    builder = BatchBuilder(CONFIG.geometry, Buckets.default(max_seqs, 24), num_pages, 96)
    arrivals = []
    for i, (prompt, answer, use, logprobs, pause) in enumerate(requests):
        tokens = [(i % 3 * 7 + t) % 256 for t in range(prompt)]
        adapter = None if use is None else USES[use]
        seq = Sequence(seq_id=i, tokens=tokens, prompt_len=prompt, max_tokens=answer, adapter=adapter)
        seq.prompt_logprobs = logprobs
        arrivals.append((pause + (arrivals[-1][0] if arrivals else 0), seq))
    pending, now = None, 0
    while arrivals or scheduler.has_work() or pending:
        while arrivals and arrivals[0][0] <= now:
            scheduler.add(arrivals.pop(0)[1])
        now += 1
        plan = scheduler.schedule()
        if plan.chunks:
            check(builder, plan, pool)
        if pending:
            scheduler.complete(pending)
            for chunk in pending.chunks:
                if chunk.samples:
                    chunk.seq.push(chunk.start % 256)
                    if chunk.seq.output_len == chunk.seq.max_tokens:
                        scheduler.remove(chunk.seq)
        pending = plan if plan.chunks else None


def test_an_adapter_that_was_evicted_and_loaded_again_beside_others_is_looked_up():
    """Its next sequence begins with a cached prefix, so nobody gets first pages in the step in which it starts."""
    beside, again = USES[0], dataclasses.replace(USES[3], reload_cost=1e-6)
    num_pages = beside.num_pages + again.num_pages + 7
    pool = PagePool(num_pages)
    loads = PageLoads(chunk_pages=1, step_pages=1)
    scheduler = Scheduler(pool, max_seqs=2, max_step_tokens=96, prefix_page_cost=1.0, loads=loads)
    builder = BatchBuilder(CONFIG.geometry, Buckets.default(2, 96), num_pages, 96)
    shared = list(range(40))
    in_its_place = [200] * 90
    # the prefix is used more often than the other one, and stays
    requests = [*[(again, shared, 1)] * 3, (beside, [1, 2], 80), (beside, in_its_place, 1), (again, shared, 3)]
    for i, (use, tokens, answer) in enumerate(requests):
        was_there, first, goes_on = pool.holds(adapter_owner(again.digest)), [], answer == 80
        seq = Sequence(seq_id=i, tokens=[*tokens], prompt_len=len(tokens), max_tokens=answer, adapter=use)
        scheduler.add(seq)
        while seq.output_len < (1 if goes_on else answer):
            plan = scheduler.schedule()
            check(builder, plan, pool)
            first += [chunk.start for chunk in plan.chunks if chunk.seq is seq]
            scheduler.complete(plan)
            for chunk in plan.chunks:
                if chunk.samples:
                    chunk.seq.push(7)
                    if chunk.seq.output_len == chunk.seq.max_tokens:
                        scheduler.remove(chunk.seq)
    assert not was_there and first[0] == 32 and len(plan.chunks) == 2


def test_a_table_that_was_given_out_never_changes():
    pool = PagePool(64)
    scheduler = Scheduler(pool, max_seqs=2, max_step_tokens=24)
    builder = BatchBuilder(CONFIG.geometry, Buckets.default(2, 24), 64, 96)
    tables = []
    for i, use in enumerate([USES[0], USES[0], USES[1], USES[2]]):
        seq = Sequence(seq_id=i, tokens=[1, 2], prompt_len=2, max_tokens=1, adapter=use)
        scheduler.add(seq)
        batch, _ = builder.build((plan := scheduler.schedule()).chunks, pool, ADAPTERS)
        tables.append((batch.adapters, batch.adapters.granules.copy(), batch.adapters.pages.copy()))
        scheduler.complete(plan)
        scheduler.remove(seq)
    assert tables[0][0] is tables[1][0] and tables[1][0] is not tables[2][0]  # made anew only when something changed
    for table, granules, pages in tables:
        assert (table.granules == granules).all() and (table.pages == pages).all()
