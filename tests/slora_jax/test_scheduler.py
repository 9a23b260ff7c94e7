"""The scheduler against a stand-in for the model: every request finishes, in any pool it fits in, and pages stay
consistent.
"""

import inspect

from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.adapter_pages import adapter_owner
from slora_jax.page_loads import PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.page_uses import used_pages
from slora_jax.policies import Cluster, EarlyAbort, Fair, Gather, Priority, Quota, Quotas
from slora_jax.scheduler import Scheduler
from slora_jax.seats import sequence_owner
from slora_jax.sequence import AdapterUse, Sequence


class FakeModel:
    """Remembers what was written to which page, and samples a token that depends on everything the sequence attends
    to.
    """

    def __init__(self):
        self.slots = {}  # (page, slot) -> token
        self.adapters = {}  # page -> digest
        self.last = {}  # row -> token that was sampled last for the sequence there

    def run(self, plan, pool):
        for load in plan.loads:
            digest = load.adapter.digest
            for page in pool.pages(adapter_owner(digest))[load.start : load.stop]:
                self.adapters[page] = digest
        sampled = []
        for chunk in plan.chunks:
            seq = chunk.seq
            pages = pool.pages(sequence_owner(seq))
            for i in range(chunk.start, chunk.start + chunk.length):
                self.slots[pages[i // 16], i % 16] = seq.tokens[i] if i < len(seq.tokens) else self.last[seq.row]
                self.adapters.pop(pages[i // 16], None)
            if seq.adapter:
                held = [self.adapters.get(p) for p in pool.pages(adapter_owner(seq.adapter.digest))]
                assert held == [seq.adapter.digest] * seq.adapter.num_pages, "the adapter's pages were overwritten"
            if chunk.samples:
                context = [self.slots[pages[i // 16], i % 16] for i in range(chunk.start + chunk.length)]
                token = hash((tuple(context), seq.adapter and seq.adapter.digest)) % 1000
                self.last[seq.row] = token
                sampled.append((seq, token))
        return sampled


def batch_place(chunk):
    """Single tokens come before longer chunks, and in each part large adapters first."""
    adapter = chunk.seq.adapter
    return chunk.length > 1, -adapter.num_pages if adapter else 0, adapter.digest if adapter else ""


def unused(policy):
    """A policy of the same kind and options that has counted nothing yet."""
    if policy is None:
        return None
    return type(policy)(**{k: v for k, v in vars(policy).items() if k in inspect.signature(type(policy)).parameters})


def serve(
    requests,
    num_pages,
    max_seqs,
    max_step_tokens,
    aborts=(),
    texts=1000,
    stats=None,
    overlap=False,
    end=None,
    **options,
):
    """Runs requests to their end. requests: (prompt length, max_tokens, adapter index or None, arrival step).

    texts: how many different prompts there are, each the beginning of one text. stats: takes the prefix cache's.
    overlap: a step's results are taken after the next one was planned and run. end: tokens divisible by it end a text.
    """
    pool = PagePool(num_pages)
    scheduler = Scheduler(pool, max_seqs=max_seqs, max_step_tokens=max_step_tokens, clock=lambda: step * 1.0, **options)
    model, done, seqs = FakeModel(), {}, {}
    uses = [AdapterUse(f"adapter{i}", pages, 0.1) for i, pages in enumerate((1, 3, 5, 2))]
    arrivals = sorted((arrival, i) for i, (_, _, _, arrival) in enumerate(requests))
    step = 0
    pending = None
    while arrivals or scheduler.has_work() or pending:
        while arrivals and (arrivals[0][0] <= step or not scheduler.has_work()):
            _, i = arrivals.pop(0)
            prompt, answer, adapter, _ = requests[i]
            seqs[i] = Sequence(
                seq_id=i,
                tokens=[(i % texts * 7 + t) % 1000 for t in range(prompt)],
                prompt_len=prompt,
                max_tokens=answer,
                adapter=None if adapter is None else uses[adapter],
                adapter_name=None if adapter is None else str(adapter),
                tenant=str(i % 3),
                priority=i % 4,
            )
            scheduler.add(seqs[i])
        for i in aborts:
            if i in seqs and i not in done and step % 3 == 2:
                scheduler.remove(seqs[i])
                done[i] = None
        if not scheduler.has_work() and not pending:
            continue
        plan = scheduler.schedule()
        pool.check_integrity()
        for drop in plan.dropped:
            done[drop.seq.seq_id] = None
        assert plan.chunks or pending or not scheduler.has_work(), "nothing was scheduled although there is work"
        assert plan.num_tokens <= max_step_tokens and len(plan.chunks) <= max_seqs
        kinds = [batch_place(c) for c in plan.chunks]
        assert kinds == sorted(kinds)
        assert len({id(c.seq) for c in plan.chunks}) == len(plan.chunks)
        ready = plan, model.run(plan, pool)
        if overlap:
            pending, ready = ready if plan.chunks else None, pending
        if ready:
            scheduler.complete(ready[0])
            for seq, token in ready[1]:
                if seq.seq_id in done:
                    continue  # aborted, or ended a token before
                seq.push(token)
                if seq.output_len == seq.max_tokens or (end and token % end == 0):
                    scheduler.remove(seq)
                    done[seq.seq_id] = seq.tokens[seq.prompt_len :]
        step += 1
        assert step < 20000, "the requests do not finish"
    assert all(pool.is_idle(owner) for owner in pool.owners())  # only idle adapters and prefixes are left
    assert pool.available == num_pages
    pages = used_pages(scheduler.pool)
    assert pages["kv"] == pages["adapter"] == 0 and sum(pages.values()) == num_pages
    if scheduler.prefixes is not None:
        assert len(scheduler.prefixes) == pages["idle_kv"]
        for use in uses:
            scheduler.forget_adapter(use.digest)
        pool.check_integrity()
        if stats is not None:
            stats.append(scheduler.prefixes)
    return done


requests = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 40), st.sampled_from([None, 0, 1, 2, 3]), st.integers(0, 30)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(requests=requests, num_pages=st.integers(12, 20), max_seqs=st.integers(1, 6), extra=st.integers(0, 40))
def test_a_tiny_pool_gives_the_tokens_of_a_large_one(requests, num_pages, max_seqs, extra):
    large = serve(requests, 1000, 64, 4096)
    small = serve(requests, num_pages, max_seqs, max_seqs + extra)
    assert small == large


@settings(max_examples=100, deadline=None)
@given(
    requests=requests,
    num_pages=st.integers(12, 40),
    max_seqs=st.integers(1, 6),
    extra=st.integers(0, 40),
    texts=st.integers(1, 3),
    page_cost=st.sampled_from([0.0, 0.01, 1.0]),
    aborts=st.sets(st.integers(0, 11), max_size=2),
)
def test_prefix_caching_changes_no_token(requests, num_pages, max_seqs, extra, texts, page_cost, aborts):
    large = serve(requests, 1000, 64, 4096, texts=texts)
    for pages, seqs, step in ((num_pages, max_seqs, max_seqs + extra), (1000, 64, 4096)):
        small = serve(requests, pages, seqs, step, aborts, texts, prefix_page_cost=page_cost)
        for i, tokens in small.items():
            assert tokens == large[i] or (tokens is None and i in aborts)


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    num_pages=st.integers(12, 40),
    max_seqs=st.integers(1, 6),
    extra=st.integers(0, 40),
    texts=st.sampled_from([1, 3, 1000]),
    page_cost=st.sampled_from([None, 0.01]),
    aborts=st.sets(st.integers(0, 11), max_size=2),
    end=st.sampled_from([None, 5, 20]),
)
def test_planning_before_the_results_are_known_changes_no_token(
    requests, num_pages, max_seqs, extra, texts, page_cost, aborts, end
):
    large = serve(requests, 1000, 64, 4096, texts=texts, end=end)
    sizes = (num_pages, max_seqs, max_seqs + extra)
    small = serve(requests, *sizes, aborts, texts, overlap=True, end=end, prefix_page_cost=page_cost)
    for i, tokens in small.items():
        assert tokens == large[i] or (tokens is None and i in aborts)


def test_equal_beginnings_are_computed_once_for_each_adapter():
    stats = []
    serve(
        [(70, 20, a, 40 * i) for i, a in enumerate((None, None, 0, None, 0))],
        200,
        4,
        64,
        texts=1,
        stats=stats,
        prefix_page_cost=0.1,
    )
    assert (stats[0].prompt_tokens, stats[0].hit_tokens) == (350, 3 * 64)
    serve([(64, 20, None, 0), (64, 20, None, 40)], 200, 4, 64, texts=1, stats=stats, prefix_page_cost=0.1)
    assert stats[1].hit_tokens == 48  # the last token must be computed, and pages are shared whole
    serve([(33, 60, None, 0)] * 2, 10, 4, 64, stats=stats, prefix_page_cost=0.1)
    assert stats[2].hit_tokens == 0 and stats[2].resumed_tokens > 0  # preempted, and most of it was still there


def test_prompts_whose_log_probabilities_are_wanted_are_computed_whole():
    scheduler = Scheduler(PagePool(20), max_seqs=2, max_step_tokens=64, prefix_page_cost=0.1)
    for wanted in (False, True):
        seq = Sequence(seq_id=wanted, tokens=[1] * 40, prompt_len=40, max_tokens=1, prompt_logprobs=wanted)
        scheduler.add(seq)
        plan = scheduler.schedule()
        assert [c.length for c in plan.chunks] == [40]
        scheduler.complete(plan)
        scheduler.remove(seq)


def test_a_step_that_failed_leaves_no_prefix_behind():
    scheduler = Scheduler(PagePool(20), max_seqs=2, max_step_tokens=64, prefix_page_cost=0.1)
    for i in range(2):
        seq = Sequence(seq_id=i, tokens=[1] * 40, prompt_len=40, max_tokens=1)
        scheduler.add(seq)
        plan = scheduler.schedule()
        assert [c.length for c in plan.chunks] == [40]
        scheduler.complete(plan)
        scheduler.remove(seq)
        scheduler.reset()
        scheduler.pool.check_integrity()
        assert scheduler.pool.free == 20


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    num_pages=st.integers(12, 30),
    max_seqs=st.integers(1, 6),
    step_pages=st.integers(1, 3),
    policy=st.sampled_from([None, Cluster(1, 5.0), Fair(), Gather(2)]),
    max_overtakes=st.integers(1, 64),
    page_cost=st.sampled_from([None, 0.01]),
    overlap=st.booleans(),
)
def test_adapters_that_are_copied_beside_steps_change_no_token(
    requests, num_pages, max_seqs, step_pages, policy, max_overtakes, page_cost, overlap
):
    large = serve(requests, 1000, 64, 4096)
    options = dict(policy=unused(policy), max_overtakes=max_overtakes, prefix_page_cost=page_cost, overlap=overlap)
    small = serve(requests, num_pages, max_seqs, max_seqs + 20, loads=PageLoads(1, step_pages), **options)
    assert small == large


@settings(max_examples=60, deadline=None)
@given(
    requests=requests,
    policy=st.sampled_from(
        [Cluster(1, 5.0), EarlyAbort(9.0), EarlyAbort(4.0, 1.0), Fair(), Fair("adapter"), Gather(2), Priority(9)]
    ),
    quota=st.sampled_from([None, Quota(max_running=1), Quota(max_pages=12)]),
    max_overtakes=st.integers(1, 3),
    prompt_gap=st.integers(0, 3),
)
def test_no_policy_changes_a_token(requests, policy, quota, max_overtakes, prompt_gap):
    large = serve(requests, 1000, 64, 4096)
    options = dict(policy=unused(policy), quotas=Quotas(quota), max_overtakes=max_overtakes, prompt_gap=prompt_gap)
    small = serve(requests, 14, 4, 32, **options)
    for i, tokens in small.items():
        assert tokens == large[i] or (tokens is None and isinstance(policy, EarlyAbort))


@settings(max_examples=30, deadline=None)
@given(requests=requests, aborts=st.sets(st.integers(0, 11)))
def test_aborted_requests_leave_the_others_alone(requests, aborts):
    large = serve(requests, 1000, 64, 4096)
    small = serve(requests, 14, 4, 32, aborts)
    for i, tokens in small.items():
        assert tokens == large[i] or (tokens is None and i in aborts)
