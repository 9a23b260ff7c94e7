"""The waiting queue on its own: order, overtaking, and what is looked at first. Plain Python."""

from slora_jax.sequence import Sequence
from slora_jax.waiting import WaitingQueue


def make_queue(count, max_overtakes=2):
    queue = WaitingQueue(max_overtakes)
    seqs = [Sequence(seq_id=i, tokens=[0], prompt_len=1, max_tokens=1) for i in range(count)]
    for seq in seqs:
        queue.add(seq)
    return queue, seqs


def test_preempted_go_first_in_their_old_order():
    queue, (a, b, c, d) = make_queue(4)
    for seq in (a, b, c):
        queue.remove(seq)
    queue.put_back([c, b])  # the one admitted last was preempted first
    assert list(queue) == [b, c, d] and queue.arrived == [d] and len(queue) == 3
    assert a not in queue and b in queue and d in queue
    assert list(queue.candidates(lambda: queue.arrived)) == [(b, True), (c, True), (d, False)]
    for seq in (b, c, d, d):
        queue.remove(seq)
    assert not queue and not queue.has_arrived


def test_who_was_overtaken_too_often_is_tried_first_and_alone():
    queue, (a, b, c) = make_queue(3)
    assert not queue.overtake([b, c])
    assert queue.overtake([c])
    assert list(queue.candidates(lambda: queue.arrived)) == [(c, True), (a, False), (b, False)]
    queue.tried = [b]
    assert list(queue.next_up(2)) == [b, c, a]
    queue.remove(c)
    assert list(queue.candidates(lambda: [b, c, a])) == [(b, False), (a, False)], "c does not wait any more"


def test_the_policys_order_is_asked_for_only_when_it_is_needed():
    queue, (a, b) = make_queue(2)
    queue.overtake([a])
    queue.overtake([a])

    def order():
        raise AssertionError("asked although the first candidate ends the search")

    assert next(queue.candidates(order)) == (a, True)
