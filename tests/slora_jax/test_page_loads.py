"""How adapters come to their pages: so many a step, first come, first served."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from slora_jax.adapter_pages import adapter_owner
from slora_jax.page_loads import PageLoads, chunk_sizes
from slora_jax.page_pool import PagePool
from slora_jax.page_uses import used_pages
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import AdapterUse, Sequence


@given(st.integers(0, 300), st.integers(0, 6))
def test_chunks_cover_the_pages_and_are_few_sizes(num_pages, bits):
    sizes = list(chunk_sizes(num_pages, 1 << bits))
    assert sum(sizes) == num_pages and sizes == sorted(sizes, reverse=True)
    assert set(sizes) <= {1 << b for b in range(bits + 1)}
    assert all(sizes.count(size) == 1 for size in sizes if size < 1 << bits)


def parts(loads):
    return [(load.adapter.digest, load.start, load.stop) for load in loads]


def take(loads):
    """What is written before the step, and what is sent with it."""
    return tuple(map(parts, loads.take()))


def test_a_step_in_which_somebody_runs_copies_so_much_and_no_more():
    loads = PageLoads(chunk_pages=2, step_pages=4)
    a, b, c = AdapterUse("a", 7), AdapterUse("b", 2), AdapterUse("c", 1)
    loads.begin_step(limited=True)
    assert not loads.completes(b, True) and loads.completes(a, False)
    loads.start(a, True)
    loads.start(b, True)
    assert take(loads) == ([], [("a", 0, 4)]) and loads.under_way("a") and loads.under_way("b")
    loads.begin_step(limited=True)
    assert take(loads) == ([("a", 0, 4)], [("a", 4, 7)]) and loads.under_way("a")
    loads.begin_step(limited=True)
    assert not loads.under_way("a")
    loads.start(c, True)
    assert take(loads) == ([("a", 4, 7)], [("b", 0, 2), ("c", 0, 1)])
    loads.begin_step(limited=True)
    assert not loads and take(loads) == ([("b", 0, 2), ("c", 0, 1)], [])


def test_where_nobody_runs_an_adapter_is_copied_at_once():
    loads = PageLoads(chunk_pages=2, step_pages=2)
    loads.begin_step(limited=True)
    for name in "ab":
        loads.start(AdapterUse(name, 5), True)
    assert take(loads) == ([], [("a", 0, 2)])
    loads.begin_step(limited=False)
    assert take(loads) == ([("a", 0, 2), ("a", 2, 5), ("b", 0, 5)], []) and not loads


def test_what_is_urgent_holds_up_a_step_if_it_is_small_and_nothing_is_before_it():
    loads = PageLoads(chunk_pages=1, step_pages=4)
    loads.begin_step(limited=True)
    assert not loads.completes(AdapterUse("large", 5), True, urgent=True)
    assert loads.completes(AdapterUse("a", 4), True, urgent=True)
    loads.start(AdapterUse("a", 4), True, urgent=True)
    assert not loads.completes(AdapterUse("b", 1), True, urgent=True)
    loads.start(AdapterUse("b", 1), True)
    assert take(loads) == ([("a", 0, 4)], []) and loads.under_way("b")


def test_what_was_sent_for_nobody_is_not_written():
    loads = PageLoads(chunk_pages=1, step_pages=4)
    loads.begin_step(limited=True)
    for name in "ab":
        loads.start(AdapterUse(name, 2), True)
    assert take(loads) == ([], [("a", 0, 2), ("b", 0, 2)])
    loads.cancel("a")
    loads.start(AdapterUse("a", 2), True)  # again, from its beginning
    loads.begin_step(limited=True)
    assert take(loads) == ([("b", 0, 2)], [("a", 0, 2)])


def make_scheduler(num_pages=40, ready=None, step_pages=None, **options):
    pool = PagePool(num_pages)
    options = dict(max_seqs=4, max_step_tokens=64) | options
    scheduler = Scheduler(pool, loads=PageLoads(1, step_pages), **options)
    if ready is not None:
        scheduler.adapters.is_ready = lambda use: use.digest in ready
    return scheduler


def add(scheduler, name, use=None, prompt=4, answer=50):
    seq = Sequence(seq_id=name, tokens=[1] * prompt, prompt_len=prompt, max_tokens=answer, adapter=use)
    scheduler.add(seq)
    return seq


def step(scheduler):
    plan = scheduler.schedule()
    scheduler.complete(plan)
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.seq.push(1)
    scheduler.pool.check_integrity()
    return plan


def started(plan):
    return [c.seq.seq_id for c in plan.chunks if c.start == 0]


def test_a_request_whose_adapter_is_not_there_holds_up_nobody():
    ready = set()
    scheduler = make_scheduler(ready=ready)
    add(scheduler, "cold", AdapterUse("a", 3))
    add(scheduler, "base")
    assert started(step(scheduler)) == ["base"]
    assert [use.digest for use in scheduler.upcoming(8)] == ["a", "a"]
    add(scheduler, "later")
    assert started(step(scheduler)) == ["later"]
    ready.add("a")
    plan = step(scheduler)
    assert started(plan) == ["cold"] and [load.num_pages for load in plan.loads] == [3]
    assert not list(scheduler.upcoming(8))


def test_nothing_to_compute_while_all_wait_for_their_adapters():
    ready = set()
    scheduler = make_scheduler(ready=ready)
    add(scheduler, "cold", AdapterUse("a", 3))
    assert step(scheduler).chunks == [] and scheduler.has_work()
    ready.add("a")
    assert started(step(scheduler)) == ["cold"]


def test_running_requests_go_on_while_an_adapter_is_copied_part_by_part():
    scheduler = make_scheduler(step_pages=2)
    add(scheduler, "base")
    step(scheduler)
    add(scheduler, "cold", AdapterUse("a", 5))
    add(scheduler, "small", AdapterUse("b", 1))
    parts = []
    for wanted in ([], [], [], ["cold", "small"]):
        plan = step(scheduler)
        parts += [(load.adapter.digest, load.start, load.stop) for load in plan.loads]
        assert started(plan) == wanted and any(c.seq.seq_id == "base" for c in plan.chunks)
    assert parts == [("a", 0, 2), ("a", 2, 4), ("a", 4, 5), ("b", 0, 1)]
    assert (scheduler.adapters.hits, scheduler.adapters.misses) == (0, 2)


def test_adapters_of_waiting_requests_go_to_free_pages_ahead_of_their_turn():
    scheduler = make_scheduler(max_seqs=1)
    first = add(scheduler, "first")
    step(scheduler)
    add(scheduler, "next", AdapterUse("a", 3))
    add(scheduler, "large", AdapterUse("b", 30))
    plan = step(scheduler)
    assert [load.adapter.digest for load in plan.loads] == ["a", "b"]
    assert used_pages(scheduler.pool)["idle_adapter"] == 33
    add(scheduler, "third", AdapterUse("c", 8))  # the pages that are free would not hold it
    assert step(scheduler).loads == [] and scheduler.adapters.evictions == 0
    scheduler.remove(first)
    assert started(step(scheduler)) == ["next"]
    adapters = scheduler.adapters
    assert (adapters.hits, adapters.misses, adapters.evictions) == (1, 0, 0)


def test_an_adapter_on_its_way_keeps_the_pages_that_its_request_needs():
    scheduler = make_scheduler(num_pages=12, step_pages=1)
    add(scheduler, "base")
    step(scheduler)  # 11 pages are left
    add(scheduler, "cold", AdapterUse("a", 3, reload_cost=0.1), prompt=64)  # 7 of them
    add(scheduler, "large", prompt=48)  # 3, and there would be none to spare for the others
    add(scheduler, "small", prompt=16)
    assert started(step(scheduler)) == ["small"]
    for wanted in ([], [], ["cold"]):
        assert started(step(scheduler)) == wanted
    assert (scheduler.adapters.misses, scheduler.adapters.evictions) == (1, 0)
    for name in ("base", "small"):
        scheduler.remove(next(seq for seq in scheduler.running if seq.seq_id == name))
    assert started(step(scheduler)) == ["large"]


def test_no_pages_are_kept_for_a_request_that_left():
    scheduler = make_scheduler(num_pages=12, step_pages=1)
    add(scheduler, "base")
    step(scheduler)
    cold = add(scheduler, "cold", AdapterUse("a", 2), prompt=64)
    add(scheduler, "other", prompt=64)
    assert started(step(scheduler)) == []
    scheduler.remove(cold)
    assert started(step(scheduler)) == ["other"] and scheduler.adapters.loads


def test_an_adapter_that_is_forgotten_while_it_is_copied_gives_its_pages_back():
    scheduler = make_scheduler(step_pages=1)
    add(scheduler, "base")
    step(scheduler)
    cold = add(scheduler, "cold", AdapterUse("a", 5))
    step(scheduler)
    assert scheduler.pool.holds(adapter_owner("a")) and not scheduler.adapters.resident("a")
    scheduler.remove(cold)
    scheduler.forget_adapter("a")
    assert not scheduler.pool.holds(adapter_owner("a"))
    assert step(scheduler).loads == []


def test_what_was_copied_for_somebody_who_left_becomes_idle():
    scheduler = make_scheduler(step_pages=1)
    base = add(scheduler, "base")
    step(scheduler)
    cold = add(scheduler, "cold", AdapterUse("a", 5))
    step(scheduler)
    scheduler.remove(cold)
    scheduler.remove(base)
    assert scheduler.has_work()  # the rest of the copy
    assert [load.num_pages for load in step(scheduler).loads] == [1, 4]
    assert used_pages(scheduler.pool)["idle_adapter"] == 5 and not scheduler.has_work()


def test_a_pinned_adapter_leaves_its_pages_last():
    scheduler = make_scheduler(num_pages=10)
    scheduler.adapters.pin("a", True)
    for name in "abc":
        seq = add(scheduler, name, AdapterUse(name, 3, reload_cost=0.1))
        step(scheduler)
        scheduler.remove(seq)
    assert scheduler.adapters.all_resident() == {"a", "b", "c"}
    seq = add(scheduler, "d", AdapterUse("d", 3, reload_cost=0.1))
    step(scheduler)
    assert scheduler.adapters.all_resident() == {"a", "c", "d"}
    scheduler.remove(seq)
    seq = add(scheduler, "all", prompt=64, answer=90)  # 10 pages in the end: everything must go
    while seq in scheduler.waiting or seq.num_computed < 150:
        step(scheduler)
    assert scheduler.adapters.all_resident() == set()
    scheduler.remove(seq)
    scheduler.adapters.pin("a", False)
    for name in "abcd":
        seq = add(scheduler, name, AdapterUse(name, 3, reload_cost=0.1))
        step(scheduler)
        scheduler.remove(seq)
    assert "a" not in scheduler.adapters.all_resident()


@pytest.mark.parametrize("step_pages", [None, 1])
def test_an_overdue_request_gets_its_adapter_in_spite_of_a_stream_of_others(step_pages):
    scheduler = make_scheduler(num_pages=12, step_pages=step_pages, max_overtakes=3)
    running = [add(scheduler, f"base{i}", answer=8) for i in range(4)]
    step(scheduler)
    cold = add(scheduler, "cold", AdapterUse("a", 6), prompt=48, answer=1)
    for i in range(200):
        plan = step(scheduler)
        if cold in scheduler.running:
            break
        for seq in [s for s in running if s.output_len >= 8]:
            scheduler.remove(seq)
            running.remove(seq)
            running.append(add(scheduler, f"more{i}-{len(running)}", answer=8))
        del plan
    assert cold in scheduler.running
