"""The allocator of the unified page pool: page ids for sequences and adapters alike. Plain Python, no jax.

Pages belong to owners. An owner in use (a running sequence, an adapter of a running sequence) is never touched. An idle
owner (an adapter nobody uses just now) keeps its pages until somebody needs them, and one cost function chooses who
goes.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
import heapq
import math

Owner = Hashable


class OutOfPages(Exception):
    """Fewer pages are free or evictable than were asked for. Nothing was changed."""


@dataclasses.dataclass(slots=True)
class _Entry:
    pages: list[int]
    reload_cost: float = 0.0  # seconds to bring the contents back
    uses: int = 1
    idle: bool = False
    priority: float = 0.0
    ticket: int = 0  # of its place among the idle owners
    keep: bool = False  # whether it goes after all that are not


class PagePool:
    """Hands out page ids 0 to num_pages - 1.

    Eviction is GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998): an idle owner's priority is the pool's clock when
    it was last used, plus uses x reload cost / pages; the lowest goes first and the clock moves up to it, so that what
    is cheap to reload, large or long unused leaves before what is costly, small or popular. Of equals the one that has
    been idle longest goes first.

    on_evict: called with the owner after its pages were taken away. owners_made: how often somebody who owned nothing
    was allocated pages; while it stays, whoever owns pages that were allocated all at once, as an adapter does, owns
    the same ones as before.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[Owner], None] | None = None):
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, not {num_pages}")
        self.num_pages = num_pages
        self.on_evict = on_evict
        self.owners_made = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages
        self._entries: dict[Owner, _Entry] = {}
        self._idle_refs: dict[int, int] = {}  # page -> how many idle owners hold it
        self._evictable = 0  # pages that only idle owners hold
        self._clock = 0.0
        self._tickets = 0
        self._num_idle = 0
        # (priority, ticket, owner) of idle owners, and of some that are not idle any more or were retired again
        self._heap: list[tuple[float, int, Owner]] = []

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that can be had: free ones and those only idle owners hold."""
        return len(self._free) + self._evictable

    def owners(self) -> Iterable[Owner]:
        return self._entries.keys()

    def pages(self, owner: Owner) -> Sequence[int]:
        """The owner's page ids in the order it got them. KeyError if it owns none."""
        return self._entries[owner].pages

    def holds(self, owner: Owner) -> bool:
        return owner in self._entries

    def is_idle(self, owner: Owner) -> bool:
        return self._entries[owner].idle

    def allocate(self, owner: Owner, count: int, reload_cost: float = 0.0) -> list[int]:
        """Gives `owner` `count` more pages, evicting idle owners as needed, and returns the new ids.

        Raises OutOfPages, with nothing changed, if they cannot be had, and ValueError if the owner is idle.
        """
        entry = self._entries.get(owner)
        if entry is not None and entry.idle:
            raise ValueError(f"{owner!r} is idle; revive it before it takes pages")
        if count > self.available:
            raise OutOfPages(f"{count} pages wanted, {self.available} of {self.num_pages} available")
        while len(self._free) < count:
            self._evict_one()
        if entry is None:
            self.owners_made += 1
            entry = self._entries[owner] = _Entry([], reload_cost)
        new = [self._free.pop() for _ in range(count)]
        for page in new:
            self._refs[page] = 1
        entry.pages.extend(new)
        return new

    def share(self, owner: Owner, pages: Sequence[int], reload_cost: float = 0.0) -> None:
        """Makes `owner` a further owner of pages that somebody holds already."""
        entry = self._entries.get(owner)
        if entry is not None and entry.idle:
            raise ValueError(f"{owner!r} is idle; revive it before it takes pages")
        for page in pages:
            if not self._refs[page]:
                raise ValueError(f"page {page} is free and cannot be shared")
        if entry is None:
            entry = self._entries[owner] = _Entry([], reload_cost)
        for page in pages:
            if self._idle_refs.get(page, 0) == self._refs[page]:
                self._evictable -= 1
            self._refs[page] += 1
        entry.pages.extend(pages)

    def release(self, owner: Owner) -> None:
        """Takes all pages from `owner`; those nobody else holds become free."""
        entry = self._entries.pop(owner)
        if entry.idle:
            self._forget_idle(entry)
        for page in entry.pages:
            self._refs[page] -= 1
            if not self._refs[page]:
                self._free.append(page)
            elif self._idle_refs.get(page, 0) == self._refs[page]:
                self._evictable += 1

    def retire(self, owner: Owner) -> None:
        """Marks `owner` as idle: it keeps its pages until the space is needed."""
        entry = self._entries[owner]
        if entry.idle:
            raise ValueError(f"{owner!r} is idle already")
        entry.idle = True
        entry.priority = self._clock + entry.uses * entry.reload_cost / max(len(entry.pages), 1)
        if entry.keep:
            entry.priority = math.inf
        self._tickets += 1
        entry.ticket = self._tickets
        self._num_idle += 1
        heapq.heappush(self._heap, (entry.priority, entry.ticket, owner))
        if len(self._heap) > 2 * self._num_idle + 64:
            self._heap = [item for item in self._heap if self._is_current(item)]
            heapq.heapify(self._heap)
        for page in entry.pages:
            self._idle_refs[page] = self._idle_refs.get(page, 0) + 1
            if self._idle_refs[page] == self._refs[page]:
                self._evictable += 1

    def revive(self, owner: Owner) -> Sequence[int]:
        """Takes an idle owner back in use, its pages intact, and returns them."""
        entry = self._entries[owner]
        if not entry.idle:
            raise ValueError(f"{owner!r} is not idle")
        self._forget_idle(entry)
        entry.uses += 1
        return entry.pages

    def keep(self, owner: Owner, keep: bool) -> None:
        """Says whether `owner`, while it is idle, goes only when no other idle owner is left."""
        entry = self._entries[owner]
        entry.keep = keep
        if entry.idle:
            self._forget_idle(entry)
            self.retire(owner)

    def _forget_idle(self, entry: _Entry) -> None:
        entry.idle = False
        self._num_idle -= 1
        for page in entry.pages:
            if self._idle_refs[page] == self._refs[page]:
                self._evictable -= 1
            self._idle_refs[page] -= 1
            if not self._idle_refs[page]:
                del self._idle_refs[page]

    def _is_current(self, item: tuple[float, int, Owner]) -> bool:
        entry = self._entries.get(item[2])
        return entry is not None and entry.idle and entry.ticket == item[1]

    def _evict_one(self) -> None:
        while not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        priority, _, owner = heapq.heappop(self._heap)
        if priority < math.inf:
            self._clock = max(self._clock, priority)
        self.release(owner)
        if self.on_evict:
            self.on_evict(owner)

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page is free, or owned as often as its reference count says."""
        counts = [0] * self.num_pages
        idle = [0] * self.num_pages
        for owner, entry in self._entries.items():
            assert len(set(entry.pages)) == len(entry.pages), f"{owner!r} owns a page twice"
            for page in entry.pages:
                counts[page] += 1
                idle[page] += entry.idle
        assert counts == self._refs, "reference counts differ from what owners hold"
        assert sorted(self._free) == [p for p in range(self.num_pages) if not counts[p]], "the free list is wrong"
        assert self._idle_refs == {p: n for p, n in enumerate(idle) if n}, "idle counts are wrong"
        evictable = sum(1 for n, i in zip(counts, idle, strict=True) if n and n == i)
        assert self._evictable == evictable, "the count of evictable pages is wrong"
        current = {item[2] for item in self._heap if self._is_current(item)}
        assert current == {o for o, e in self._entries.items() if e.idle}, "the queue of idle owners is wrong"
        assert self._num_idle == len(current), "the count of idle owners is wrong"
