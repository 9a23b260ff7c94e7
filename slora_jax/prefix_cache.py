"""Keys and values that later sequences can use: full pages, known by the adapter and all tokens up to their end.

Plain Python, no jax. A page's key is a hash over the key of the page before it and its own tokens; the first one's over
the adapter's digest. So equal keys mean equal tokens from the start on, under equal weights.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import hashlib
import struct

from pallas_kernels.geometry import PAGE_TOKENS
from slora_jax.page_pool import Owner, PagePool
from slora_jax.sequence import Sequence as Seq

Key = bytes

_as_bytes = struct.Struct(f"{PAGE_TOKENS}q").pack


def prefix_owner(key: Key) -> Hashable:
    return ("prefix", key)


def page_keys(seq: Seq, count: int) -> list[Key]:
    """Keys of the sequence's first `count` pages, which must be full. They are kept in the sequence."""
    keys = seq.page_keys
    for i in range(len(keys), count):
        before = keys[i - 1] if i else (seq.adapter.digest.encode() if seq.adapter else b"")
        tokens = _as_bytes(*seq.tokens[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS])
        # 128 bits: that two different texts ever meet is out of the question, also if someone tries
        keys.append(hashlib.blake2b(before + b":" + tokens, digest_size=16).digest())
    return keys[:count]


@dataclasses.dataclass(slots=True)
class _Held:
    """What a running sequence has to do with the cache."""

    keys: list[Key]  # entries it uses, from the start of the sequence on
    pages: int  # of its pages that were offered to the cache, or came from there


class PrefixCache:
    """Entries of one page each. An entry that a running sequence uses is in use; any other is idle in the pool, which
    evicts it when the space is needed, and the last page of a text before those in front of it.

    page_cost: seconds to compute a page's keys and values again.
    """

    def __init__(self, pool: PagePool, page_cost: float):
        self._pool = pool
        self._page_cost = page_cost
        self._users: dict[Key, int] = {}  # entry -> running sequences that use it
        self._digests: dict[Key, str | None] = {}  # entry -> adapter
        self._by_digest: dict[str | None, set[Key]] = {}
        self._held: dict[Seq, _Held] = {}
        self.prompt_tokens = 0  # of sequences when they started
        self.hit_tokens = 0  # of those, found in the cache
        self.resumed_tokens = 0  # found in the cache by sequences that had been preempted

    def __len__(self) -> int:
        return len(self._users)

    def match(self, seq: Seq, limit: int) -> list[Key]:
        """Entries that hold the beginning of a waiting sequence, in order; `limit` tokens at most.

        limit: less than the sequence has, for somebody must predict its next token. Where log-probabilities of the
        prompt are wanted, there are none.
        """
        if seq.prompt_logprobs:
            return []
        keys = page_keys(seq, max(limit, 0) // PAGE_TOKENS)
        count = next((i for i, key in enumerate(keys) if key not in self._users), len(keys))
        return keys[:count]

    def count_idle(self, keys: Sequence[Key]) -> int:
        """How many of these entries nobody uses, so that their pages count as available."""
        return sum(not self._users[key] for key in keys)

    def take(self, seq: Seq, owner: Owner, keys: Sequence[Key]) -> None:
        """Starts a sequence with the pages of these entries, which match() gave. owner: of its pages in the pool."""
        pages: list[int] = []
        for key in keys:
            if not self._users[key]:
                self._pool.revive(prefix_owner(key))
            self._users[key] += 1
            pages += self._pool.pages(prefix_owner(key))
        if pages:
            self._pool.share(owner, pages)
        self._held[seq] = _Held(list(keys), len(keys))
        seq.num_computed = len(keys) * PAGE_TOKENS
        if seq.preemptions:
            self.resumed_tokens += seq.num_computed
        else:
            self.prompt_tokens += seq.prompt_len
            self.hit_tokens += seq.num_computed

    def publish(self, seq: Seq, owner: Owner, end: int) -> None:
        """Makes entries of the pages that a running sequence has filled up to token `end` since the last call. The
        values of these tokens must be known.
        """
        held = self._held[seq]
        full = end // PAGE_TOKENS
        if held.pages == full:
            return
        keys, pages = page_keys(seq, full), self._pool.pages(owner)
        for i in range(held.pages, full):
            key = keys[i]
            if key not in self._users:  # else another sequence computed the same meanwhile
                self._pool.share(prefix_owner(key), [pages[i]], self._page_cost)
                self._users[key] = 1
                digest = self._digests[key] = seq.adapter.digest if seq.adapter else None
                self._by_digest.setdefault(digest, set()).add(key)
                held.keys.append(key)
        held.pages = full

    def leave(self, seq: Seq) -> None:
        """A running sequence stops. Entries that nobody else uses become idle, the last of its text first."""
        for key in reversed(self._held.pop(seq).keys):
            self._users[key] -= 1
            if not self._users[key]:
                self._pool.retire(prefix_owner(key))

    def evicted(self, owner: Owner) -> None:
        """The pool took an owner's pages; it may be one of the entries."""
        if isinstance(owner, tuple) and owner[0] == "prefix":
            self._forget(owner[1])

    def forget(self, digest: str | None) -> None:
        """Frees the idle entries of an adapter, None for those of the base model."""
        for key in [k for k in self._by_digest.get(digest, ()) if not self._users[k]]:
            self._pool.release(prefix_owner(key))
            self._forget(key)

    def clear(self) -> None:
        """Forgets all entries, whose pages are gone, and who uses them."""
        self._held.clear()
        self._users.clear()
        self._digests.clear()
        self._by_digest.clear()

    def _forget(self, key: Key) -> None:
        assert not self._users.pop(key), "an entry in use was evicted"
        digest = self._digests.pop(key)
        self._by_digest[digest].discard(key)
        if not self._by_digest[digest]:
            del self._by_digest[digest]


def prefix_stats(cache: PrefixCache | None) -> dict[str, float]:
    """Prompt tokens of started requests, how many of them were found in the cache, and their share; and how many tokens
    preempted requests found there when they were resumed. None: no cache.
    """
    if cache is None:
        return dict(prompt_tokens=0, hit_tokens=0, hit_rate=0.0, resumed_tokens=0)
    return dict(
        prompt_tokens=cache.prompt_tokens,
        hit_tokens=cache.hit_tokens,
        hit_rate=cache.hit_tokens / max(cache.prompt_tokens, 1),
        resumed_tokens=cache.resumed_tokens,
    )
