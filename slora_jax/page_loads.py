"""Adapters on their way to their pages: a bounded number of pages a step, so that running requests keep their pace.

Plain Python, no jax.
"""

from collections.abc import Iterator
import dataclasses

from slora_jax.sequence import AdapterUse


def chunk_sizes(num_pages: int, largest: int) -> Iterator[int]:
    """Cuts an adapter's pages into powers of two, at most `largest` (itself one): the largest first, the rest in its
    binary digits. So nothing is padded, and there are few sizes to compile.
    """
    while num_pages:
        size = min(largest, 1 << num_pages.bit_length() - 1)
        yield size
        num_pages -= size


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Pages `start` to `stop` of those an adapter owns."""

    adapter: AdapterUse
    start: int
    stop: int

    @property
    def num_pages(self) -> int:
        return self.stop - self.start

    @property
    def last(self) -> bool:
        """Whether the adapter is complete with it."""
        return self.stop == self.adapter.num_pages


class PageLoads:
    """Plans which pages are sent to the device and written in which step, first come, first served.

    A device begins to copy when the step before is over, and a step waits for what is written before it. So what is
    sent with a step in which somebody runs is written before the next one: it crosses the bus while the device works.

    chunk_pages: pages that are copied at a time, a power of two; None: an adapter as a whole.
    step_pages: pages that may be copied with a step in which somebody runs, and at least a chunk; None: any number, all
    of them written before the step.
    """

    def __init__(self, chunk_pages: int | None = None, step_pages: int | None = None):
        self.chunk_pages = chunk_pages
        self.step_pages = step_pages
        self._under_way: dict[str, tuple[AdapterUse, int]] = {}  # digest -> pages that are sent or written
        self._planned: list[Load] = []
        self._sent: list[Load] = []
        self._left = 0

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def adapters(self) -> list[AdapterUse]:
        """Adapters that lie in their pages in part."""
        return [use for use, _ in self._under_way.values()]

    def under_way(self, digest: str) -> bool:
        return digest in self._under_way

    def begin_step(self, limited: bool) -> None:
        """Goes on with what is under way. limited: whether somebody runs, who must not be held up."""
        self._left = max(self.step_pages or 0, self.chunk_pages or 0)
        self._planned, self._sent = self._sent, []
        for load in self._planned:
            if load.last:
                del self._under_way[load.adapter.digest]
        for digest in list(self._under_way):
            if not self._advance(digest, not self._waits(limited)):
                break

    def completes(self, use: AdapterUse, limited: bool, urgent: bool = False) -> bool:
        """Whether `start` would write all of the adapter before this step. urgent: even if a step waits for it, as long
        as that is within step_pages.
        """
        return not self._waits(limited) or (urgent and not self._under_way and use.num_pages <= self._left)

    def start(self, use: AdapterUse, limited: bool, urgent: bool = False) -> None:
        """Begins with an adapter that has its pages. Behind others that are under way it waits for its turn."""
        at_once = self.completes(use, limited, urgent)
        behind = any(done < other.num_pages for other, done in self._under_way.values())
        self._under_way[use.digest] = use, 0
        if at_once or not behind:
            self._advance(use.digest, at_once)

    def cancel(self, digest: str) -> None:
        del self._under_way[digest]
        self._sent = [load for load in self._sent if load.adapter.digest != digest]

    def clear(self) -> None:
        self._under_way.clear()
        self._sent.clear()

    def take(self) -> tuple[list[Load], list[Load]]:
        """What is to be written before this step, and what is to be sent with it, to be written before the next."""
        planned, self._planned = self._planned, []
        return planned, list(self._sent)

    def _waits(self, limited: bool) -> bool:
        return limited and self.step_pages is not None

    def _advance(self, digest: str, at_once: bool) -> bool:
        """Goes on with an adapter. at_once: all of it before this step. False if there is no room for more."""
        use, done = self._under_way[digest]
        start = done
        for size in chunk_sizes(use.num_pages - done, self.chunk_pages or use.num_pages):
            if not at_once and size > self._left:
                break
            done += size
            self._left -= size
        if done > start:
            (self._planned if at_once else self._sent).append(Load(use, start, done))
        self._under_way[digest] = use, done
        if at_once:
            del self._under_way[digest]
        return done == use.num_pages
