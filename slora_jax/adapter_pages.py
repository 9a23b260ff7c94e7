"""Which adapters have pages, and which are on their way there. Plain Python, no jax.

An adapter that running sequences use, or that is being copied, keeps its pages. Any other is idle in the pool, which
evicts it when the space is needed.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable

from slora_jax.page_loads import Load, PageLoads
from slora_jax.page_pool import PagePool
from slora_jax.sequence import AdapterUse


def adapter_owner(digest: str) -> Hashable:
    return ("adapter", digest)


class AdapterPages:
    """The scheduler's view of adapters.

    is_ready: whether an adapter that has no pages can be written to them now. prefetches: adapters to bring to free
    pages although no sequence waits for them, by digest. pinned: digests of those that leave their pages last.
    hits, misses: sequences that found their adapter in its pages, and those that did not. evictions: adapters that lost
    their pages.
    """

    def __init__(self, pool: PagePool, loads: PageLoads | None = None):
        self._pool = pool
        self.loads = PageLoads() if loads is None else loads  # an empty one is false
        self.is_ready: Callable[[AdapterUse], bool] = lambda use: True
        self.prefetches: dict[str, AdapterUse] = {}
        self.pinned: set[str] = set()
        self.hits = self.misses = self.evictions = 0
        self._users: Counter[str] = Counter()  # running sequences

    def resident(self, digest: str) -> bool:
        """Whether all of an adapter lies in its pages, or will before the next step."""
        return self._pool.holds(adapter_owner(digest)) and not self.loads.under_way(digest)

    def all_resident(self) -> set[str]:
        """Digests of all adapters of which that is true."""
        owners = [owner for owner in self._pool.owners() if isinstance(owner, tuple) and owner[0] == "adapter"]
        return {digest for _, digest in owners if not self.loads.under_way(digest)}

    def is_loading(self, use: AdapterUse | None) -> bool:
        return use is not None and self.loads.under_way(use.digest)

    def may_load(self, use: AdapterUse | None) -> bool:
        """Whether there is nothing to wait for but pages and their contents."""
        return use is None or self._pool.holds(adapter_owner(use.digest)) or self.is_ready(use)

    def pages_needed(self, use: AdapterUse | None) -> tuple[int, int]:
        """(pages to be had, available pages that are its own, and so cannot be evicted for it)."""
        if use is None:
            return 0, 0
        owner = adapter_owner(use.digest)
        if not self._pool.holds(owner):
            return use.num_pages, 0
        return 0, use.num_pages if self._pool.is_idle(owner) else 0

    def load(self, use: AdapterUse, limited: bool, urgent: bool = False) -> None:
        """Takes pages, which must be available, and begins to fill them. limited, urgent: see PageLoads."""
        owner = adapter_owner(use.digest)
        self._pool.allocate(owner, use.num_pages, use.reload_cost)
        if use.digest in self.pinned:
            self._pool.keep(owner, True)
        self.loads.start(use, limited, urgent)

    def completes(self, use: AdapterUse | None, limited: bool, urgent: bool = False) -> bool:
        """Whether an adapter that is not loading would be complete before this step if it were begun."""
        return use is None or self._pool.holds(adapter_owner(use.digest)) or self.loads.completes(use, limited, urgent)

    def enter(self, use: AdapterUse, limited: bool, urgent: bool = False, missed: bool = False) -> None:
        """A sequence starts with it. missed: after it was copied for that sequence."""
        owner = adapter_owner(use.digest)
        missing = not self._pool.holds(owner)
        if missing:
            self.load(use, limited, urgent)
        elif self._pool.is_idle(owner):
            self._pool.revive(owner)
        self.misses += missing or missed
        self.hits += not (missing or missed)
        self._users[use.digest] += 1

    def leave(self, use: AdapterUse) -> None:
        """A sequence that started with it stops."""
        self._users[use.digest] -= 1
        if not self._users[use.digest]:
            del self._users[use.digest]
            self._pool.retire(adapter_owner(use.digest))

    def prefetch(self, upcoming: Iterable[AdapterUse], spare: int, limited: bool) -> None:
        """Begins with adapters that will be needed, as far as pages are free, besides `spare` ones."""
        for use in (*upcoming, *self.prefetches.values()):
            if self._pool.holds(adapter_owner(use.digest)) or not self.is_ready(use):
                continue
            if use.num_pages + spare > self._pool.free:
                break
            self.load(use, limited)

    def take_loads(self) -> tuple[list[Load], list[Load]]:
        """See PageLoads.take. Adapters that are complete with this step, and that nobody uses, are idle."""
        loads, sends = self.loads.take()
        for load in loads:
            if load.last and load.adapter.digest not in self._users:
                self._pool.retire(adapter_owner(load.adapter.digest))
        return loads, sends

    def pin(self, digest: str, pinned: bool) -> None:
        """Says whether an adapter leaves its pages only when no other idle owner is left."""
        (self.pinned.add if pinned else self.pinned.discard)(digest)
        if self._pool.holds(adapter_owner(digest)):
            self._pool.keep(adapter_owner(digest), pinned)

    def forget(self, digest: str) -> None:
        """Frees the pages of an adapter that no sequence uses."""
        self.prefetches.pop(digest, None)
        self.pinned.discard(digest)
        owner = adapter_owner(digest)
        if self.loads.under_way(digest):
            self.loads.cancel(digest)
            self._pool.release(owner)
        elif self._pool.holds(owner) and self._pool.is_idle(owner):
            self._pool.release(owner)

    def reset(self) -> None:
        """The pages' contents are lost, and nobody runs; the pool's books are the caller's affair."""
        self.loads.clear()
        self._users.clear()
