"""Memory that is split, as most servers have it: some of the pool for slots of adapters, the rest for KV cache."""

from collections.abc import Callable, Hashable, Sequence

from slora_jax import SloraError
from slora_jax.adapter_pages import adapter_owner
from slora_jax.page_pool import PagePool
from slora_jax.policies import Quotas
from slora_jax.scheduler import Scheduler
from slora_jax.sequence import Sequence as Seq

_REGION: Hashable = ("adapter", "slots")  # owner of the pages that are set aside


def _is_adapter(owner: Hashable) -> bool:
    return isinstance(owner, tuple) and owner[0] == "adapter" and owner != _REGION


class SplitPool(PagePool):
    """A pool that sets `slots` x `slot_pages` pages aside. An adapter takes a slot, whatever it needs; idle ones leave
    their slots by the same cost function as in the unified pool. Everything else shares the rest.

    slot_pages 1: the slots hold nothing, because the weights lie elsewhere; an adapter's pages are all its slot's.
    """

    def __init__(self, num_pages: int, slots: int, slot_pages: int):
        super().__init__(num_pages)
        self._slot_pages = slot_pages
        self._region = super().allocate(_REGION, slots * slot_pages)
        self._slots = PagePool(slots, lambda owner: self.on_evict and self.on_evict(owner))
        self._lists: dict[Hashable, list[int]] = {}  # pages of adapters; a new list each time one gets a slot

    def has_slot(self, digest: str) -> bool:
        """Whether an adapter has a slot, or could get one."""
        return self._slots.holds(adapter_owner(digest)) or self._slots.available > 0

    def allocate(self, owner: Hashable, count: int, reload_cost: float = 0.0) -> list[int]:
        if not _is_adapter(owner):
            return super().allocate(owner, count, reload_cost)
        if count > self._slot_pages > 1:
            raise ValueError(f"{owner!r} needs {count} pages, a slot has {self._slot_pages}")
        self._slots.allocate(owner, 1, reload_cost)
        (slot,) = self._slots.pages(owner)
        first = slot * self._slot_pages
        whole = self._slot_pages > 1
        self._lists[owner] = self._region[first : first + count] if whole else [self._region[slot]] * count
        return self._lists[owner]

    def pages(self, owner: Hashable) -> Sequence[int]:
        return self._lists[owner] if _is_adapter(owner) else super().pages(owner)

    def holds(self, owner: Hashable) -> bool:
        return self._slots.holds(owner) if _is_adapter(owner) else super().holds(owner)

    def is_idle(self, owner: Hashable) -> bool:
        return self._slots.is_idle(owner) if _is_adapter(owner) else super().is_idle(owner)

    def release(self, owner: Hashable) -> None:
        (self._slots.release if _is_adapter(owner) else super().release)(owner)

    def retire(self, owner: Hashable) -> None:
        (self._slots.retire if _is_adapter(owner) else super().retire)(owner)

    def revive(self, owner: Hashable) -> Sequence[int]:
        if not _is_adapter(owner):
            return super().revive(owner)
        self._slots.revive(owner)
        return self.pages(owner)

    def check_integrity(self) -> None:
        super().check_integrity()
        self._slots.check_integrity()


class SlotQuotas(Quotas):
    """Lets a sequence start only if its adapter has a slot or can get one; others go before it meanwhile."""

    def __init__(self, pool: SplitPool):
        super().__init__()
        self._pool = pool

    def admits(self, seq: Seq, now: float) -> bool:
        return seq.adapter is None or self._pool.has_slot(seq.adapter.digest)


def pool_of_slots(slots: int, slot_pages: int) -> Callable[[int], SplitPool]:
    """Makes a SplitPool of a number of pages; raises SloraError where the slots would leave nothing of them."""

    def make(num_pages: int) -> SplitPool:
        if slots * slot_pages >= num_pages:
            raise SloraError(
                f"{slots} slots of {slot_pages} pages leave nothing of {num_pages} pages to the KV cache; "
                "use fewer --slots or a larger --page-pool"
            )
        return SplitPool(num_pages, slots, slot_pages)

    return make


def seat_by_slot(scheduler: Scheduler) -> None:
    """Lets a scheduler over a SplitPool start, and prefetch for, only who has a slot or can get one."""
    pool = scheduler.pool
    assert isinstance(pool, SplitPool)
    scheduler.quotas = SlotQuotas(pool)
    is_ready = scheduler.adapters.is_ready  # also asked before adapters are prefetched
    scheduler.adapters.is_ready = lambda use: pool.has_slot(use.digest) and is_ready(use)
