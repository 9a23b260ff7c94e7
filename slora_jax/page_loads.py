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
    """Pages `start` to `stop` of those an adapter owns, to be written before the step."""

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
    """Plans which pages are written in which step, first come, first served.

    chunk_pages: pages that are copied at a time, a power of two; None: an adapter as a whole.
    step_pages: pages that may be written in a step in which somebody runs, and at least a chunk; None: any number.
    """

    def __init__(self, chunk_pages: int | None = None, step_pages: int | None = None):
        self.chunk_pages = chunk_pages
        self.step_pages = step_pages
        self._under_way: dict[str, tuple[AdapterUse, int]] = {}  # digest -> pages that are done
        self._planned: list[Load] = []
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
        for digest in list(self._under_way):
            if not self._advance(digest, limited):
                break

    def completes(self, use: AdapterUse, limited: bool) -> bool:
        """Whether `start` would write all of the adapter before this step."""
        limited = limited and self.step_pages is not None
        return not limited or (not self._under_way and use.num_pages <= self._left)

    def start(self, use: AdapterUse, limited: bool) -> None:
        """Begins with an adapter that has its pages. Behind others that are under way it waits for the next step."""
        waits = limited and bool(self._under_way)
        self._under_way[use.digest] = use, 0
        if not waits:
            self._advance(use.digest, limited)

    def cancel(self, digest: str) -> None:
        del self._under_way[digest]

    def clear(self) -> None:
        self._under_way.clear()

    def take(self) -> list[Load]:
        """What was planned for this step."""
        planned, self._planned = self._planned, []
        return planned

    def _advance(self, digest: str, limited: bool) -> bool:
        use, done = self._under_way[digest]
        limited = limited and self.step_pages is not None
        start = done
        for size in chunk_sizes(use.num_pages - done, self.chunk_pages or use.num_pages):
            if limited and size > self._left:
                break
            done += size
            self._left -= size
        if done > start:
            self._planned.append(Load(use, start, done))
        if done < use.num_pages:
            self._under_way[digest] = use, done
            return False
        del self._under_way[digest]
        return True
