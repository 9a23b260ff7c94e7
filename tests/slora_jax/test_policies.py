"""The order each policy gives, what it drops, and how options are checked."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from slora_jax import EngineConfig, SloraError
from slora_jax.policies import Cluster, EarlyAbort, Fair, Fcfs, Gather, Priority, View, make_policy
from slora_jax.sequence import AdapterUse, Chunk, Sequence


def seq(name, arrival=0.0, adapter=None, prompt=10, **kw):
    use = AdapterUse(adapter, 1) if adapter else None
    tokens = [1] * prompt
    return Sequence(
        seq_id=name,
        tokens=tokens,
        prompt_len=prompt,
        max_tokens=5,
        adapter=use,
        adapter_name=adapter,
        arrival=arrival,
        **kw,
    )


def order(policy, waiting, running=(), now=0.0):
    got = []
    for s in policy.order(View(now, list(waiting), list(running), 64)):
        got.append(s.seq_id)
        policy.admitted(s)
    return "".join(got)


def test_first_come_first_served():
    waiting = [seq("a"), seq("b", 1.0), seq("c", 2.0)]
    view = View(9.0, waiting, [], 64)
    assert order(Fcfs(), waiting) == "abc"
    assert Fcfs().drop(view) == () and Fcfs().victim(waiting) is waiting[-1]


def test_clustering_prefers_running_adapters_until_others_waited_long():
    running = [seq("x", adapter="one"), seq("y", adapter="two")]
    waiting = [
        seq("a", 0.0, "three"),
        seq("b", 1.0, "one"),
        seq("c", 2.0, "four"),
        seq("d", 2.5),
        seq("e", 2.6, "two"),
    ]
    assert order(Cluster(3), waiting, running) == "abcde"  # too few adapters run
    assert order(Cluster(2, patience=10), waiting, running, now=3.0) == "bdeac"
    assert order(Cluster(2, patience=2), waiting, running, now=3.0) == "abdec"


def test_gathering_starts_those_of_one_adapter_together():
    running = [seq("x", adapter="one")]
    waiting = [
        seq(n, i, a) for i, (n, a) in enumerate(zip("abcdefg", "two four one four three two four".split(), strict=True))
    ]
    waiting.append(seq("h", 9.0))
    assert order(Gather(100), waiting, running) == "chbdgafe"
    assert order(Gather(1), waiting, running) == "abcdefgh"
    assert order(Gather(3), waiting, running) == "chabdegf"


def test_gathering_goes_on_with_whom_it_tried():
    """Its adapter is being copied: if another took its place, that would be for nothing."""
    policy = Gather(100)
    waiting = [seq("a", adapter="one"), seq("b", adapter="two")]
    tried = policy.order(View(0.0, waiting, [], 64))
    assert next(tried).seq_id == "a"  # and it is not admitted, because its adapter is not there yet
    waiting += [seq(n, adapter="two") for n in "cd"]
    assert order(policy, waiting) == "abcd"


@settings(max_examples=100, deadline=None)
@given(
    oldest=st.integers(1, 5),
    arrivals=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=60),
    refusals=st.integers(0, 3),
)
def test_gathering_keeps_nobody_waiting_for_ever(oldest, arrivals, refusals):
    """Of `oldest` starts one is of whoever has waited longest, also where the first that are tried cannot start yet."""
    policy, waiting, ahead, number = Gather(oldest), [], {}, 0
    running = [seq("x", adapter="0")]
    for step in range(len(arrivals) * 5):
        for adapter in arrivals[step] if step < len(arrivals) else ():
            new = seq(number, step, str(adapter))
            ahead[new] = oldest * (len(waiting) + 1 + refusals)  # starts until it has its own
            waiting.append(new)
            number += 1
        tried = 0
        for candidate in policy.order(View(step, list(waiting), running, 64)):
            tried += 1
            if tried <= refusals and len(waiting) > refusals and step % 2:
                continue
            policy.admitted(candidate)
            waiting.remove(candidate)
            assert ahead.pop(candidate) > 0
            ahead = {s: left - 1 for s, left in ahead.items()}
            break


def test_early_abort_drops_by_slo_of_slora():
    policy = EarlyAbort(6.0, slack=0.5)
    waiting = [seq("a", 0.0), seq("b", 0.6)]
    dropped = policy.drop(View(5.6, waiting, [], 64))
    assert [d.seq.seq_id for d in dropped] == ["a"]
    assert dropped[0].reason == "given up: its first token cannot come within the target of 6 s; try again later"


def test_early_abort_estimates_from_measured_steps():
    policy = EarlyAbort(6.0)
    long = seq("a", 0.0, prompt=640)  # ten steps of 64 tokens
    policy.completed([Chunk(long, 0, 64)], 0.2)
    assert not policy.drop(View(3.9, [long], [], 64))
    assert policy.drop(View(4.1, [long], [], 64))
    behind = seq("b", 0.0, prompt=640)
    assert policy.drop(View(2.1, [long], [behind], 64))  # ten more steps before its own begin
    policy.completed([Chunk(long, 64, 1)], 9.0)  # a step without prompts says nothing
    assert not policy.drop(View(3.9, [long], [], 64))


def test_early_abort_serves_in_order_of_deadlines():
    policy = EarlyAbort()
    assert order(policy, [seq(name, i / 100) for i, name in enumerate("abcdefgh")]) == "abcdefgh"


def test_early_abort_serves_the_newest_first_while_more_arrive_than_are_admitted_as_s_lora_does():
    policy = EarlyAbort(slack=0.5)
    burst = [seq(name, i / 100) for i, name in enumerate("abcdefgh")]
    first = next(iter(policy.order(View(0.1, burst, [], 64))))
    assert first.seq_id == "h"
    policy.admitted(burst[-1])
    heads = [next(iter(policy.order(View(0.2, burst[:-1], [], 64)))).seq_id for _ in range(2)]
    assert heads == ["g", "a"]  # nobody came meanwhile, and the average comes down


def test_fairness_is_by_weighted_tokens():
    policy = Fair(weights={"big": 2.0})
    waiting = [seq(n, tenant=t) for n, t in zip("abcdefgh", ["big"] * 5 + ["small"] * 3, strict=True)]
    for s in waiting:
        policy.added(s)
    assert order(policy, waiting) == "afbcgdeh"
    assert policy.counters == {"big": 25.0, "small": 30.0}
    policy.completed([Chunk(waiting[0], 0, 10), Chunk(waiting[5], 0, 4)], 0.0)
    assert policy.counters == {"big": 26.0, "small": 30.0}  # only the first reached its end


@pytest.mark.parametrize("burst", [0.0, 25.0])
def test_a_pause_saves_up_no_more_than_a_burst(burst):
    policy = Fair("adapter", burst=burst)
    busy = [seq(i, adapter="busy") for i in range(10)]
    for s in busy:
        policy.added(s)
        policy.admitted(s)
    late = seq("late", adapter="late")
    policy.added(late)
    assert policy.counters == {"busy": 100.0, "late": 90.0 - burst}  # the last was admitted at 90
    policy.removed(late)
    policy.added(late)
    assert policy.counters["late"] == 90.0 - burst
    for s in [*busy, late]:
        policy.removed(s)
    for i in range(100):  # names that come and go are not remembered for ever
        policy.added(seq(i, adapter=f"once-{i}"))
        policy.removed(seq(i, adapter=f"once-{i}"))
    assert len(policy.counters) <= 65 + 1


def test_who_has_the_most_makes_way_for_who_has_less():
    policy = Fair(burst=0.0)
    running = [seq(n, tenant=t) for n, t in (("a", "big"), ("b", "small"), ("c", "big"))]
    for s in running:
        policy.added(s)
        policy.admitted(s)
    policy.completed([Chunk(s, 0, 10) for s in running], 0.0)
    waiting = [seq("d", tenant="big"), seq("e", tenant="small", prompt=11)]
    for s in waiting:
        policy.added(s)
    assert policy.counters == {"big": 24.0, "small": 12.0}
    assert policy.make_way(View(0.0, waiting, running, 64)) == (running[2], waiting[1])
    assert policy.make_way(View(0.0, waiting[:1], running, 64)) is None  # nobody makes way for their own
    policy.admitted(waiting[1])  # now as much as the other, nearly: changing places would gain nothing
    assert policy.make_way(View(0.0, [seq("f", tenant="small")], running, 64)) is None
    assert Fair(preempt=False).make_way(View(0.0, waiting, running, 64)) is None


def test_priorities_age():
    policy = Priority(aging=10.0)
    waiting = [seq("a", 0.0), seq("b", 1.0, priority=2), seq("c", 2.0, priority=1), seq("d", 30.0, priority=2)]
    assert order(policy, waiting) == "bcad"
    assert policy.victim([waiting[1], waiting[0], seq("e")]).seq_id == "e"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "best",
            {},
            "policy must be one of 'fcfs', 'cluster', 'early-abort', 'fair', 'gather', 'priority', not 'best'",
        ),
        ("cluster", {"adapters": 0}, "policy 'cluster': adapters must be at least 1, not 0"),
        ("cluster", {"patience": -1.0}, "patience must not be negative"),
        ("early-abort", {"slo": 1}, "policy 'early-abort' has no option 'slo'; its options are ttft, slack"),
        ("early-abort", {"ttft": 0.0}, "ttft must be positive"),
        ("early-abort", {"slack": -1.0}, "slack must not be negative"),
        ("fair", {"by": "user"}, "by must be 'tenant' or 'adapter', not 'user'"),
        ("fair", {"burst": -1.0}, "burst must not be negative, not -1.0"),
        ("fair", {"weights": {"a": 0.0}}, "the weight of 'a' must be positive, not 0.0"),
        ("gather", {"oldest": 0}, "policy 'gather': oldest must be at least 1, not 0"),
        ("priority", {"aging": 0.0}, "aging must be positive"),
        ("fcfs", {"x": 1}, "policy 'fcfs' has no option 'x'; it has none"),
    ],
)
def test_bad_options_are_named(name, options, words):
    with pytest.raises(SloraError, match=words):
        make_policy(name, options)
    with pytest.raises(SloraError):
        EngineConfig(policy=name, policy_options=options)
