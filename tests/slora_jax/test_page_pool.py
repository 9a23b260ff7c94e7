"""The allocator never loses, leaks or double-owns a page, whatever is asked of it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
import pytest

from slora_jax.page_pool import OutOfPages, PagePool


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, shares, releases, retirements and revivals against a model made of plain sets."""

    def __init__(self):
        super().__init__()
        self.evicted = set()
        self.pool = PagePool(24, self.evicted.add)
        self.model = {}  # owner -> pages
        self.idle = set()
        self.names = 0

    active = Bundle("active")
    retired = Bundle("retired")

    def forget_evicted(self):
        for owner in self.evicted:
            assert owner in self.idle
            del self.model[owner]
            self.idle.discard(owner)
        self.evicted.clear()

    @rule(target=active, count=st.integers(0, 9), cost=st.floats(0, 1))
    def allocate_new(self, count, cost):
        self.names += 1
        owner = f"owner{self.names}"
        available = self.pool.available
        try:
            pages = self.pool.allocate(owner, count, cost)
        except OutOfPages:
            assert count > available
            return multiple()
        assert len(pages) == count <= available
        self.forget_evicted()
        self.model[owner] = list(pages)
        return owner

    @rule(owner=active, count=st.integers(1, 4))
    def grow(self, owner, count):
        if self.model.get(owner) is None:
            return
        try:
            pages = self.pool.allocate(owner, count)
        except OutOfPages:
            return
        self.forget_evicted()
        self.model[owner] += pages

    @rule(target=active, source=active)
    def share(self, source):
        if self.model.get(source) is None:
            return multiple()
        self.names += 1
        owner = f"owner{self.names}"
        self.pool.share(owner, self.model[source])
        self.model[owner] = list(self.model[source])
        return owner

    @rule(owner=consumes(active))
    def release(self, owner):
        if self.model.pop(owner, None) is not None:
            self.pool.release(owner)

    @rule(target=retired, owner=consumes(active))
    def retire(self, owner):
        if self.model.get(owner) is None:
            return multiple()
        self.pool.retire(owner)
        self.idle.add(owner)
        return owner

    @rule(target=active, owner=consumes(retired))
    def revive(self, owner):
        if owner not in self.idle:
            assert not self.pool.holds(owner)  # evicted meanwhile
            return multiple()
        assert list(self.pool.revive(owner)) == self.model[owner]
        self.idle.discard(owner)
        return owner

    @invariant()
    def consistent(self):
        self.pool.check_integrity()
        owned = [p for pages in self.model.values() for p in pages]
        assert self.pool.free == 24 - len(set(owned))
        busy = {p for o, pages in self.model.items() if o not in self.idle for p in pages}
        assert self.pool.available == 24 - len(busy)
        for owner, pages in self.model.items():
            assert list(self.pool.pages(owner)) == pages


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_failed_allocation_changes_nothing():
    pool = PagePool(4)
    pool.allocate("a", 3)
    pool.allocate("b", 1)
    pool.retire("b")
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 4 available"):
        pool.allocate("c", 2)
    assert pool.holds("b") and not pool.holds("c")
    pool.check_integrity()


def test_cheap_large_and_unused_owners_go_first():
    pool = PagePool(10)
    for owner, pages, cost in (("cheap", 3, 0.1), ("dear", 3, 9.0), ("popular", 3, 0.5)):
        pool.allocate(owner, pages, cost)
        pool.retire(owner)
    for _ in range(4):
        pool.revive("popular")
        pool.retire("popular")
    pool.allocate("new", 2)
    assert not pool.holds("cheap") and pool.holds("dear") and pool.holds("popular")
    pool.allocate("new", 3)
    assert not pool.holds("popular") and pool.holds("dear")


def test_an_old_favourite_is_evicted_in_the_end():
    pool = PagePool(4)
    pool.allocate("favourite", 2, 1.0)
    pool.retire("favourite")
    for _ in range(3):
        pool.revive("favourite")
        pool.retire("favourite")
    for i in range(12):  # a stream of adapters used once each
        pool.allocate(i, 2, 1.0)
        pool.retire(i)
    assert not pool.holds("favourite")


def test_the_end_of_a_text_goes_before_its_beginning():
    evicted = []
    pool = PagePool(200, evicted.append)
    for i in range(200):
        pool.allocate(i, 1, 1.0)
    for _ in range(3):  # the heap is made anew now and then
        for i in reversed(range(200)):
            pool.retire(i)
        pool.check_integrity()
        for i in range(200):
            pool.revive(i)
    for i in reversed(range(200)):
        pool.retire(i)
    pool.allocate("new", 50)
    assert evicted == list(range(199, 149, -1))
    pool.check_integrity()


def test_misuse_is_refused():
    pool = PagePool(4)
    pool.allocate("a", 1)
    pool.retire("a")
    with pytest.raises(ValueError, match="idle"):
        pool.allocate("a", 1)
    with pytest.raises(ValueError, match="idle"):
        pool.retire("a")
    with pytest.raises(ValueError, match="free"):
        pool.share("b", [next(p for p in range(4) if p not in pool.pages("a"))])
    pool.revive("a")
    with pytest.raises(ValueError, match="not idle"):
        pool.revive("a")
    with pytest.raises(ValueError, match="at least 1"):
        PagePool(0)
