"""The order of running sequences in a batch, and that the scheduler's plans have it. Plain Python."""

import random

from slora_jax.batch_order import BatchOrder
from slora_jax.page_pool import PagePool
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Sequence


def make_seqs(count):
    rng = random.Random(0)
    seqs = []
    for i in range(count):
        digest = rng.choice(("", "a", "b", "c", "d"))
        adapter = AdapterUse(digest, 1 + ord(digest) % 2) if digest else None
        seqs.append(Sequence(seq_id=i, tokens=[0] * rng.randint(1, 40), prompt_len=1, max_tokens=100, adapter=adapter))
        seqs[-1].prompt_len = len(seqs[-1].tokens)
    return seqs


def test_sequences_of_equal_place_stand_in_order_of_admission():
    order, seqs = BatchOrder(), make_seqs(20)
    for seq in seqs:
        order.add(seq)
    assert order.of(seqs) == sorted(seqs, key=lambda seq: seq.place)
    order.remove(seqs[0])
    order.add(seqs[0])  # started again
    assert order.of(seqs) == sorted([*seqs[1:], seqs[0]], key=lambda seq: seq.place)
    assert order.of(seqs[5:9]) == sorted(seqs[5:9], key=lambda seq: seq.place)
    order.clear()
    assert order.of([]) == []


def test_plans_are_in_batch_order_whether_pages_run_out_or_not():
    for pages in (1000, 45):
        scheduler = Scheduler(PagePool(pages), max_seqs=12, max_step_tokens=64)
        for seq in make_seqs(30):
            scheduler.add(seq)
        preempted = 0
        for _ in range(150):
            plan = scheduler.schedule()
            preempted += len(plan.preempted)
            keys = [(chunk.length > 1, chunk.seq.place) for chunk in plan.chunks]
            assert keys == sorted(keys)
            scheduler.complete(plan)
            for chunk in plan.chunks:
                if chunk.samples:
                    chunk.seq.push(0)
                    if chunk.seq.output_len == chunk.seq.max_tokens:
                        scheduler.remove(chunk.seq)
        assert bool(preempted) == (pages == 45)


def test_those_that_begin_alike_stand_together():
    """Of one adapter, so that attention sees from its neighbour which of a sequence's pages are read again."""
    scheduler = Scheduler(PagePool(1000), max_seqs=12, max_step_tokens=256, prefix_page_cost=1.0)
    for i in range(12):
        tokens = [i % 3] * 20 + [i]
        adapter = AdapterUse("a", 1) if i % 2 else None
        scheduler.add(Sequence(seq_id=i, tokens=tokens, prompt_len=21, max_tokens=9, adapter=adapter))
    plan = scheduler.schedule()
    found = [(chunk.seq.group, chunk.seq.tokens[0]) for chunk in plan.chunks]
    assert len(found) == 12
    assert sum(a != b for a, b in zip(found[1:], found, strict=False)) == 5
