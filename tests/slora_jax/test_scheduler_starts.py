"""Who starts, who is overtaken, who makes way: the scheduler's plans for a few sequences each."""

import pytest

from slora_jax.adapter_pages import adapter_owner
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.policies import Quota, Quotas
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Sequence


def test_preempted_sequences_keep_their_place_and_their_tokens():
    pool = PagePool(6)
    scheduler = Scheduler(pool, max_seqs=4, max_step_tokens=64)
    first, second = (Sequence(seq_id=i, tokens=list(range(31)), prompt_len=31, max_tokens=60) for i in range(2))
    scheduler.add(first)
    scheduler.add(second)
    late = Sequence(seq_id=2, tokens=[1], prompt_len=1, max_tokens=1)
    preempted = []
    for step in range(60):
        plan = scheduler.schedule()
        preempted += plan.preempted
        scheduler.complete(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.seq.push(7)
        if step == 0:
            scheduler.add(late)
        if preempted:
            break
    assert preempted[0] is late or preempted[0] is second
    assert first in scheduler.running
    assert second.num_computed in (0, len(second.tokens) - 1)
    pool.check_integrity()


def test_one_that_does_not_fit_is_overtaken_but_only_so_often():
    pool = PagePool(10)
    now = [0.0]
    scheduler = Scheduler(pool, max_seqs=3, max_step_tokens=512, max_overtakes=5, clock=lambda: now[0])
    made = iter(range(10**6))

    def add(prompt, answer):
        seq = Sequence(seq_id=next(made), tokens=[1] * prompt, prompt_len=prompt, max_tokens=answer)
        scheduler.add(seq)
        return seq

    add(16, 20).tokens.append(1)
    large = add(16 * 9, 2)  # fits only alone
    overtook = 0
    for _ in range(200):
        while len(scheduler.waiting) < 8:  # small ones never end, one more in each step
            add(16, 3)
        plan = scheduler.schedule()
        scheduler.complete(plan)
        now[0] += 1
        for chunk in plan.chunks:
            overtook += chunk.seq.seq_id > 1 and large in scheduler.waiting and chunk.start == 0
            if chunk.samples:
                chunk.seq.push(1)
                if chunk.seq.output_len >= chunk.seq.max_tokens:
                    scheduler.remove(chunk.seq)
        if large in scheduler.running:
            break
    assert large in scheduler.running and large.overtaken == overtook == 5


def test_a_long_queue_behind_one_adapter_does_not_hide_the_others():
    quotas = Quotas(None, {"noisy": Quota(max_running=1)})
    scheduler = Scheduler(PagePool(64), max_seqs=4, max_step_tokens=64, quotas=quotas)
    names = ["noisy"] * 300 + ["quiet"]
    for i, name in enumerate(names):
        use = AdapterUse(name, 1)
        scheduler.add(Sequence(seq_id=i, tokens=[1], prompt_len=1, max_tokens=5, adapter=use, adapter_name=name))
    plan = scheduler.schedule()
    assert [c.seq.adapter_name for c in plan.chunks] == ["noisy", "quiet"]
    with pytest.raises(ValueError, match="9 pages needed, the quota of its adapter is 4"):
        Scheduler(PagePool(64), max_seqs=4, max_step_tokens=64, quotas=Quotas(Quota(max_pages=4))).add(
            Sequence(seq_id=0, tokens=[1] * 120, prompt_len=120, max_tokens=5, adapter=use, adapter_name="quiet")
        )


def test_prompts_of_a_few_steps_are_computed_together_while_many_run():
    scheduler = Scheduler(PagePool(64), max_seqs=4, max_step_tokens=64, prompt_gap=2)

    def add(name):
        scheduler.add(Sequence(seq_id=name, tokens=[1] * 8, prompt_len=8, max_tokens=20))

    def step():
        plan = scheduler.schedule()
        scheduler.complete(plan)
        for chunk in plan.chunks:
            chunk.seq.push(1)
        return [seq.seq_id for seq in plan.admitted]

    add("a")
    assert step() == ["a"]
    add("b")
    assert step() == ["b"]  # one runs of four: nobody is held back
    add("c")
    assert step() == []
    add("d")
    assert [step(), step()] == [[], ["c", "d"]]


def test_where_tokens_ran_out_the_next_step_starts_more():
    scheduler = Scheduler(PagePool(64), max_seqs=8, max_step_tokens=32, prompt_gap=9)
    for i in range(8):
        scheduler.add(Sequence(seq_id=i, tokens=[1] * 12, prompt_len=12, max_tokens=20))
    started = []
    for _ in range(6):
        plan = scheduler.schedule()
        scheduler.complete(plan)
        started.append(len(plan.admitted))
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.seq.push(1)
    assert sum(started) == 8 and started[5] == 0


def test_no_more_adapters_are_begun_than_there_are_seats():
    scheduler = Scheduler(PagePool(64), max_seqs=4, max_step_tokens=64, loads=PageLoads(1, 1))
    for i in range(8):
        use = AdapterUse(f"adapter{i}", 4) if i else None
        scheduler.add(Sequence(seq_id=i, tokens=[1] * 8, prompt_len=8, max_tokens=20, adapter=use))
    plan = scheduler.schedule()
    assert [seq.seq_id for seq in plan.admitted] == [0]
    assert len(scheduler.waiting.tried) == 3


def test_tokens_per_second_are_kept_on_average():
    now = [0.0]
    quotas = Quotas(Quota(tokens_per_second=10.0))
    scheduler = Scheduler(PagePool(64), max_seqs=4, max_step_tokens=20, quotas=quotas, clock=lambda: now[0])
    for i in range(30):
        scheduler.add(Sequence(seq_id=i, tokens=[1] * 20, prompt_len=20, max_tokens=1, adapter_name="a"))
    starts = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        scheduler.complete(plan)
        for chunk in plan.chunks:
            starts.append(now[0])
            scheduler.remove(chunk.seq)
        now[0] += 0.25
    assert 20 * 30 / (starts[-1] - starts[0]) == pytest.approx(10, rel=0.1)


def test_a_request_that_cannot_fit_alone_is_refused():
    scheduler = Scheduler(PagePool(4), max_seqs=2, max_step_tokens=16)
    with pytest.raises(ValueError, match="6 pages needed, the pool has 4"):
        scheduler.add(Sequence(seq_id=0, tokens=[1] * 60, prompt_len=60, max_tokens=37))
    with pytest.raises(ValueError, match="max_step_tokens 4 must be at least max_seqs 8"):
        Scheduler(PagePool(4), max_seqs=8, max_step_tokens=4)


def test_idle_adapters_stay_until_the_space_is_needed():
    pool = PagePool(8)
    scheduler = Scheduler(pool, max_seqs=2, max_step_tokens=64)
    loads = []

    def run_one(use, prompt=10):
        seq = Sequence(seq_id=object(), tokens=[1] * prompt, prompt_len=prompt, max_tokens=1, adapter=use)
        scheduler.add(seq)
        plan = scheduler.schedule()
        loads.extend(load.adapter.digest for load in plan.loads)
        scheduler.complete(plan)
        scheduler.remove(seq)

    a, b = AdapterUse("a", 3, 0.1), AdapterUse("b", 3, 0.1)
    for use in (a, b, a, b, a):
        run_one(use)
    assert loads == ["a", "b"]
    run_one(None, 100)  # 7 pages: both must go
    assert not pool.holds(adapter_owner("b"))
    run_one(b)
    assert loads == ["a", "b", "b"]
