"""Adapters by name. A name points at contents; contents are known by their digest once they were read."""

from collections import Counter
from collections.abc import Mapping
import dataclasses
import difflib
import threading
import weakref

from slora_jax.adapters import Adapter, AdapterFiles, AdapterShape
from slora_jax.errors import AdapterError

Contents = Adapter | AdapterFiles
"""What a name can point at: weights in memory, or files that were checked and will be read when they are needed."""


@dataclasses.dataclass(slots=True, eq=False)
class AdapterRecord:
    """What a name points at. A request keeps the record it began with, whatever the name means later.

    contents: weights that stay in host memory, or files. digest, weights_digest: see Adapter; None until the files are
    read for the first time. registered: whether the name still points here. hits: requests that named it. last_used:
    when the last of them came, seconds since 1970. pinned: see Engine.pin_adapter. error: why its files could not be
    read the last time that was tried.
    """

    contents: Contents
    digest: str | None = None
    weights_digest: str | None = None
    registered: bool = False
    hits: int = 0
    last_used: float | None = None
    pinned: bool = False
    error: str | None = None

    def __post_init__(self):
        if isinstance(self.contents, Adapter):
            self.digest, self.weights_digest = self.contents.digest, self.contents.weights_digest

    @property
    def shape(self) -> AdapterShape:
        return self.contents if isinstance(self.contents, Adapter) else self.contents.shape

    @property
    def identity(self) -> str:
        """The digest, or what stands for it until it is known: no request runs under that."""
        if self.digest is not None:
            return self.digest
        assert isinstance(self.contents, AdapterFiles)
        return f"unread {self.contents.stamp.hex()}"


class AdapterRegistry:
    """Names of adapters. Thread-safe. The same weights given under two names are kept once."""

    def __init__(self):
        self._by_name: dict[str, AdapterRecord] = {}
        self._digests: Counter[str] = Counter()  # of registered records
        self._weights: Counter[str] = Counter()
        self._adapters: weakref.WeakValueDictionary[str, Adapter] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, name: str, contents: Contents) -> tuple[AdapterRecord, AdapterRecord | None]:
        """Points `name` at `contents`. Returns its record, and that of what the name pointed at before."""
        if not name or name != name.strip() or len(name) > 256 or not name.isprintable():
            raise AdapterError(
                f"adapter name {name!r} is not usable: use 1 to 256 printable characters without spaces at the ends"
            )
        with self._lock:
            if isinstance(contents, Adapter):
                contents = self._adapters.setdefault(contents.digest, contents)
            old = self._by_name.get(name)
            record = self._by_name[name] = AdapterRecord(contents, registered=True)
            self._count(record, 1)
            if old is not None:
                old.registered = False
                self._count(old, -1)
                record.hits, record.last_used = old.hits, old.last_used
        return record, old

    def remove(self, name: str) -> AdapterRecord:
        """Forgets a name and returns what it pointed at. AdapterError if it is unknown."""
        with self._lock:
            record = self.get(name)
            del self._by_name[name]
            record.registered = False
            self._count(record, -1)
        return record

    def read(self, record: AdapterRecord, digest: str, weights_digest: str) -> None:
        """Notes what a record's files turned out to hold."""
        with self._lock:
            assert record.digest is None
            record.digest, record.weights_digest = digest, weights_digest
            if record.registered:
                self._count(record, 1)

    def get(self, name: str) -> AdapterRecord:
        """The record of a name. AdapterError, with the nearest known name, if it is unknown."""
        with self._lock:
            if name in self._by_name:
                return self._by_name[name]
            known = list(self._by_name)
        raise AdapterError(f"adapter {name!r} is unknown: {_hint(name, known)}")

    def items(self) -> list[tuple[str, AdapterRecord]]:
        with self._lock:
            return list(self._by_name.items())

    def shapes(self) -> set[AdapterShape]:
        """Shapes of all adapters; there are few, however many adapters there are."""
        return {record.shape for _, record in self.items()}

    def has_digest(self, digest: str) -> bool:
        """Whether some name points at these contents, as far as they were read."""
        return self._digests[digest] > 0

    def has_weights(self, weights_digest: str) -> bool:
        """The same for the weights, whatever the scaling."""
        return self._weights[weights_digest] > 0

    def _count(self, record: AdapterRecord, change: int) -> None:
        for counter, key in ((self._digests, record.digest), (self._weights, record.weights_digest)):
            if key is not None:
                counter[key] += change
                if not counter[key]:
                    del counter[key]


def _hint(name: str, known: list[str]) -> str:
    if not known:
        return "no adapter is registered; add it with add_adapter"
    near = difflib.get_close_matches(str(name), known[:2000], n=1)  # it compares with every one
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(sorted(known)[:10])}{', …' if len(known) > 10 else ''}"


def shapes_of(adapters: Mapping[str, Contents]) -> list[AdapterShape]:
    """The different shapes of some adapters."""
    return list({c if isinstance(c, Adapter) else c.shape for c in adapters.values()})
