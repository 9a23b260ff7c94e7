"""The running sequences and what each of them holds: a row, pages, its adapter, cached prefixes. No jax."""

from collections.abc import Hashable

from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from slora_jax.adapter_pages import AdapterPages
from slora_jax.page_pool import PagePool
from slora_jax.prefix_cache import PrefixCache
from slora_jax.sequence import Sequence


def sequence_owner(seq: Sequence) -> Hashable:
    """A running sequence's name in the page pool."""
    return ("seq", seq.seq_id)


class Seats:
    """Seats for `max_seqs` sequences, each with a row in the step's arrays.

    running: who has one, in order of admission. deterministic: see Scheduler.
    """

    def __init__(
        self,
        pool: PagePool,
        adapters: AdapterPages,
        prefixes: PrefixCache | None,
        *,
        max_seqs: int,
        deterministic: bool,
    ):
        self.running: dict[Sequence, None] = {}
        self.max_seqs = max_seqs
        self._pool = pool
        self._adapters = adapters
        self._prefixes = prefixes
        self._deterministic = deterministic
        self._rows = list(range(max_seqs - 1, -1, -1))  # not in use
        self._tickets = 0

    def any_free(self, seats: int = 0, pages: int = 0) -> bool:
        """Whether another sequence may fit beside a spare page for each running one, `seats` and `pages` left free."""
        running = len(self.running)
        return running + seats < self.max_seqs and self._pool.available - pages > running

    def pages_needed(self, seq: Sequence) -> int:
        """Pages for a waiting sequence's tokens, and one because whoever starts before it needs a spare one."""
        return ceil_div(len(seq.tokens), PAGE_TOKENS) + 1

    def enter(self, seq: Sequence, urgent: bool = False, reserved: int = 0) -> bool:
        """Seats a waiting sequence if its adapter and its tokens fit beside a spare page for each running sequence.

        If they fit, but the adapter has to be copied and cannot be there before this step, that is begun. urgent: see
        PageLoads.completes. reserved: available pages that must be left to others.
        """
        assert not seq.num_unknown, "a sequence cannot start while its last token is not known"
        # what was decoded is decoded again, and at least two tokens of a prompt are computed together
        limit = seq.prompt_len - 2 if self._deterministic else len(seq.tokens) - 1
        hits = self._prefixes.match(seq, limit) if self._prefixes is not None else []
        need = ceil_div(len(seq.tokens), PAGE_TOKENS) - len(hits)
        available = self._pool.available - reserved
        if self._prefixes is not None:
            available -= self._prefixes.count_idle(hits)
        adapter, limited = seq.adapter, bool(self.running)
        missing, own = self._adapters.pages_needed(adapter)
        if need + missing + len(self.running) > available - own or self._adapters.is_loading(adapter):
            return False
        if adapter is not None and not self._adapters.completes(adapter, limited, urgent):
            self._adapters.load(adapter, limited)
            seq.missed = True
            return False
        if self._prefixes is not None:  # before anything is evicted to make room
            self._prefixes.take(seq, sequence_owner(seq), hits)
        seq.room = seq.num_computed  # of the pages that the cache gave
        if adapter is not None:
            self._adapters.enter(adapter, limited, urgent, seq.missed)
        seq.missed = False
        self.make_room(seq, seq.num_computed + seq.num_pending)
        self.running[seq] = None
        seq.row = self._rows.pop()
        self._tickets += 1
        seq.ticket = self._tickets
        return True

    def make_room(self, seq: Sequence, end: int) -> None:
        """Gets the pages for a sequence's tokens up to `end`. Raises OutOfPages."""
        missing = ceil_div(end - seq.room, PAGE_TOKENS)
        if missing > 0:
            self._pool.allocate(sequence_owner(seq), missing)
            seq.room += missing * PAGE_TOKENS

    def publish(self, seq: Sequence, end: int) -> None:
        """Offers the full pages of a running sequence up to token `end` to later ones."""
        if self._prefixes is not None:
            end = min(end, seq.prompt_len) if self._deterministic else end
            self._prefixes.publish(seq, sequence_owner(seq), end)

    def leave(self, seq: Sequence) -> None:
        """Takes a running sequence off its seat and frees all that it holds."""
        del self.running[seq]
        self._rows.append(seq.row)
        seq.row, seq.room = -1, 0
        if self._prefixes is not None:
            self._prefixes.leave(seq)
        self._pool.release(sequence_owner(seq))
        if seq.adapter is not None:
            self._adapters.leave(seq.adapter)

    def reset(self) -> None:
        """Clears all seats and all pages, whose contents are lost."""
        for seq in self.running:
            seq.row, seq.room = -1, 0
        self.running.clear()
        self._rows = list(range(self.max_seqs - 1, -1, -1))
        self._adapters.reset()
        for owner in list(self._pool.owners()):
            self._pool.release(owner)
        if self._prefixes is not None:
            self._prefixes.clear()
