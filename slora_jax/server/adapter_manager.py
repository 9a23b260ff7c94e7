"""The life of adapters in a server: found in a directory or loaded by name, replaced, and drained when they go.

Everything here blocks (it reads files and waits for the engine) and belongs on a worker thread.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import heapq
import logging
from pathlib import Path
import threading
import time
from typing import Any

from slora_jax.engine import Engine
from slora_jax.errors import AdapterError, CapacityError, SloraError
from slora_jax.server.config import ServerConfig
from slora_jax.server.paths import Fingerprint, NameRefused, check_inside, check_name, confine, fingerprints
from slora_jax.server.registry_file import RegistryFile, RegistryState

logger = logging.getLogger(__name__)

_LOGGED_LOADS = 1000  # a line each; a directory of many more does not fill the log


class AlreadyLoaded(NameRefused):
    """The name is taken, and replacing it was not asked for."""


class UnknownAdapter(AdapterError):
    """No adapter has the name."""


class LoadingNotAllowed(SloraError):
    """The operator has named no directory from which clients may load."""


@dataclasses.dataclass(slots=True)
class AdapterEntry:
    """An adapter that is served, or should be. error: why its latest contents are not.

    path: under the watched directory or the load root. watched: whether it came from the watched directory.
    """

    name: str
    path: str
    watched: bool
    seen: Fingerprint | None = None
    served: bool = False
    error: str | None = None
    loaded_at: float | None = None  # seconds since 1970
    last_used: float | None = None
    hits: int = 0


class AdapterManager:
    """Keeps the engine's adapters as the watched directory and the API want them."""

    def __init__(self, config: ServerConfig, engine: Engine):
        self._config = config
        self._engine = engine
        self._file = RegistryFile(config.registry)
        self._unloaded: set[str] = set()
        self._entries: dict[str, AdapterEntry] = {}
        self._unsettled: dict[str, Fingerprint] = {}
        self._num_served = 0
        self._lock = threading.Lock()  # of changes; reading a dict needs none
        self.load_seconds = 0.0
        self.loads = 0
        self.failures = 0

    def restore(self) -> None:
        """Loads what the registry file and the watched directory have. What cannot be loaded is told, and kept."""
        state = self._file.read()
        with self._lock:
            self._unloaded = set(state.unloaded)
            entries = [AdapterEntry(name, path, watched=False) for name, path in state.loaded.items()]
            self._entries |= {entry.name: entry for entry in entries}
            self._add(entries)
        self.scan(settle=False)

    def scan(self, settle: bool = True) -> None:
        """Brings the engine up to the watched directory. settle: leaves files alone that changed since the last scan,
        because somebody may still be writing them.
        """
        root = self._config.adapters
        if root is None:
            return
        try:
            found = fingerprints(root)
        except OSError as error:  # gone for a moment, as when a volume is mounted anew: keep what there is
            logger.error("the adapters' directory cannot be read", extra={"fields": {"error": str(error.strerror)}})
            return
        with self._lock:
            for name in [n for n, e in self._entries.items() if e.watched and found.get(n) is None]:
                self._drop(self._entries.pop(name))
            self._forget_unloaded(
                {name for name, seen in found.items() if seen is None} | self._unloaded - found.keys()
            )
            changed = [self._changed(name, seen, settle) for name, seen in found.items() if seen is not None]
            self._add([entry for entry in changed if entry is not None])

    def load(self, name: str, path: str, replace: bool) -> str:
        """Loads an adapter for a client and returns its digest.

        AlreadyLoaded, LoadingNotAllowed, or AdapterError and CapacityError as of Engine.add_adapter; nothing is changed
        then. SloraError if the registry cannot be written.
        """
        root = self._config.load_root
        if root is None:
            raise LoadingNotAllowed("this server loads no adapters by name; its operator may give --load-root DIR")
        check_name(name, self._config.model_name)
        with self._lock:
            old = self._entries.get(name)
            if old is not None and old.served and not replace:
                raise AlreadyLoaded(f"the adapter {name!r} has already been loaded; send load_inplace to replace it")
            if old is not None and old.watched:
                raise AlreadyLoaded(f"the adapter {name!r} comes from the watched directory; load under another name")
            confine(root, path)
            entry = AdapterEntry(name, path, watched=False)
            self._save(entry)  # first, so that what is served is never more than what a restart finds
            try:
                digest = self._load(entry)
            except SloraError:
                self._save()
                raise
            if old is not None:
                self._num_served -= old.served
            self._entries[name] = entry
            return digest

    def unload(self, name: str) -> None:
        """Forgets an adapter: requests in flight end as they began, later ones are refused. UnknownAdapter if it is
        not there. One of the watched directory stays away until it leaves the directory and comes back.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise UnknownAdapter(f"the adapter {name!r} is not loaded")
            del self._entries[name]
            if entry.watched:
                self._unloaded.add(name)
            try:
                self._save()
            except SloraError:
                self._entries[name] = entry
                self._unloaded.discard(name)
                raise
            self._drop(entry)

    def touch(self, name: str) -> None:
        """Notes that a request uses an adapter."""
        if entry := self._entries.get(name):
            entry.hits += 1
            entry.last_used = time.time()

    def names(self) -> list[str]:
        """Adapters that can be asked."""
        return [name for name, entry in self._entries.copy().items() if entry.served]

    @property
    def num_served(self) -> int:
        """How many can be asked."""
        return self._num_served

    def serves(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and entry.served

    def path(self, name: str) -> str:
        """Where it lies under its root; "" if it has gone meanwhile."""
        entry = self._entries.get(name)
        return entry.path if entry else ""

    def describe(self, limit: int | None = None) -> list[dict[str, Any]]:
        """All adapters, with those that could not be loaded; or those that were used last and those with errors."""
        entries = self._entries.copy()
        if limit is not None and len(entries) > limit:
            last = heapq.nlargest(limit, entries.values(), key=lambda e: (e.error is not None, e.last_used or 0.0))
            entries = {entry.name: entry for entry in last}
        known = {adapter["name"]: adapter for adapter in self._engine.list_adapters(entries)}
        rows = []
        for name, entry in entries.items():
            adapter = known.get(name, {}) if entry.served else {}
            tier = adapter.get("tier")
            rows.append(
                dict(
                    name=name,
                    path=entry.path,
                    watched=entry.watched,
                    digest=adapter.get("digest"),
                    tier="device" if tier == "pages" else tier,
                    rank=adapter.get("rank"),
                    targets=adapter.get("targets"),
                    pages=adapter.get("pages"),
                    hits=entry.hits,
                    loaded_at=entry.loaded_at,
                    last_used=entry.last_used,
                    error=entry.error or self.without_paths(adapter.get("error")),
                )
            )
        return rows

    def without_paths(self, text: str | None) -> str | None:
        """What clients read names adapters, not where the server keeps them."""
        for root in (self._config.adapters, self._config.load_root):
            if text is not None and root is not None:
                text = text.replace(f"{root}/", "")
        return text

    def _changed(self, name: str, seen: Fingerprint, settle: bool) -> AdapterEntry | None:
        """The entry of a directory that is to be added, or added again."""
        entry = self._entries.get(name)
        if name in self._unloaded or (entry is not None and (not entry.watched or entry.seen == seen)):
            self._unsettled.pop(name, None)
            return None
        if settle and self._unsettled.get(name) != seen:
            self._unsettled[name] = seen
            return None
        self._unsettled.pop(name, None)
        if entry is None:
            entry = AdapterEntry(name, name, watched=True)
        entry.seen = seen  # so that what fails is tried again only when it changes
        self._entries[name] = entry
        return entry

    def _place(self, entry: AdapterEntry, coming: int = 0) -> Path:
        """Where an adapter lies, if it may be served. coming: how many others are about to be."""
        root = self._config.adapters if entry.watched else self._config.load_root
        if root is None:
            raise AdapterError(f"adapter {entry.name!r} was loaded with --load-root, which this server was not given")
        check_name(entry.name, self._config.model_name)
        path = check_inside(root, root / entry.path) if entry.watched else confine(root, entry.path)
        if not self.serves(entry.name) and self._num_served + coming >= self._config.max_adapters:
            raise CapacityError(f"{self._config.max_adapters} adapters are registered, the most that are allowed")
        return path

    def _add(self, entries: Sequence[AdapterEntry]) -> None:
        """Has the engine check adapters and take them over what it had under their names. It reads their tensors when
        they are asked for. What cannot be taken is told, and the others are added.
        """
        paths: dict[str, Path] = {}
        coming = 0
        for entry in entries:
            try:
                paths[entry.name] = self._place(entry, coming)
                coming += not entry.served
            except SloraError as error:
                self._fail(entry, str(error))
        if not paths:
            return
        # Paths, never strings: a string could be taken for a repository on the Hub
        report = self._engine.add_adapters(paths)
        for name, reason in report.refused.items():
            self._fail(self._entries[name], reason.replace(f"{paths[name]}: ", "").replace(f"{paths[name]}", name))
        for name in report.added:
            self._added(self._entries[name], None)
        self.load_seconds += report.seconds

    def _load(self, entry: AdapterEntry) -> str:
        """Reads an adapter whole, and has the engine take it over what it had under the name."""
        path = self._place(entry)
        start = time.monotonic()
        try:
            digest = self._engine.add_adapter(entry.name, path, lazy="verified")
        except AdapterError as error:
            raise AdapterError(str(error).replace(f"{path}: ", "").replace(str(path), entry.path)) from None
        self.load_seconds += time.monotonic() - start
        self._added(entry, digest)
        return digest

    def _added(self, entry: AdapterEntry, digest: str | None) -> None:
        self._num_served += not entry.served
        entry.served, entry.error, entry.loaded_at = True, None, time.time()
        self.loads += 1
        level = logging.INFO if self.loads <= _LOGGED_LOADS or digest is not None else logging.DEBUG
        logger.log(level, "adapter loaded", extra={"fields": {"adapter": entry.name, "digest": digest}})

    def _fail(self, entry: AdapterEntry, reason: str) -> None:
        """What was served under the name, if anything, still is."""
        entry.error = reason
        self.failures += 1
        logger.error("adapter not loaded", extra={"fields": {"adapter": entry.name, "error": reason}})

    def _drop(self, entry: AdapterEntry) -> None:
        """Takes an adapter out of the engine."""
        if not entry.served:
            return
        entry.served = False
        self._num_served -= 1
        # requests in flight go on; its memory is freed when the last of them ends
        with contextlib.suppress(TimeoutError):
            self._engine.remove_adapter(entry.name, timeout=0)
        logger.info("adapter removed", extra={"fields": {"adapter": entry.name}})

    def _forget_unloaded(self, gone: set[str]) -> None:
        """What was unloaded and has left the directory is served again when it comes back."""
        if not self._unloaded & gone:
            return
        self._unloaded -= gone
        try:
            self._save()
        except SloraError as error:
            logger.error("the registry is out of date", extra={"fields": {"error": str(error)}})

    def _save(self, coming: AdapterEntry | None = None) -> None:
        """Writes the registry, with an adapter that is about to be loaded."""
        loaded = {name: entry.path for name, entry in self._entries.items() if not entry.watched}
        if coming is not None:
            loaded[coming.name] = coming.path
        self._file.write(RegistryState(loaded, frozenset(self._unloaded)))
