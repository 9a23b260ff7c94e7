"""The adapters' part of the Engine's interface."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
import dataclasses
import os
import time
from typing import Any, Literal, overload

from slora_jax.adapters import Adapter, AdapterFiles, AdapterReader, AdapterShape, read_adapter
from slora_jax.core import EngineCore
from slora_jax.engine_config import EngineConfig, ResolvedConfig
from slora_jax.engine_loop import EngineLoop
from slora_jax.errors import AdapterError, CapacityError
from slora_jax.loading import LoadedModel
from slora_jax.model_config import ModelConfig
from slora_jax.placement import HostImages
from slora_jax.registry import AdapterRecord, AdapterRegistry, Contents


@dataclasses.dataclass(frozen=True)
class AddedDirectory:
    """What add_adapter_directory did. added: names. refused: name -> why, one line. seconds: that it took."""

    added: list[str]
    refused: dict[str, str]
    seconds: float


class EngineAdapters:
    """Adds, removes, prefetches, pins and lists adapters. A base class of Engine."""

    settings: ResolvedConfig
    model: LoadedModel
    _registry: AdapterRegistry
    _reader: AdapterReader
    _images: HostImages
    _core: EngineCore
    _loop: EngineLoop

    @overload
    def add_adapter(self, name: str, source: Any, *, lazy: Literal[False, "verified"] = False) -> str: ...

    @overload
    def add_adapter(self, name: str, source: Any, *, lazy: bool | Literal["verified"]) -> str | None: ...

    def add_adapter(self, name: str, source: Any, *, lazy: bool | Literal["verified"] = False) -> str | None:
        """Registers an adapter and returns the digest of its contents.

        source: PEFT directory, Hugging Face id, ``{"weights": pytree, "lora_alpha": 16}`` or an Adapter (see
        read_adapter). A name that is known is pointed at the new contents at once: requests already queued or running
        keep the old, later ones get the new, and neither meets the other's pages.
        lazy: for a directory: check its configuration and header now, and read its tensors when a request needs them;
        returns None then. What only the tensors show, NaN and infinity, ends those requests. "verified": read the
        tensors now as well, so that nothing is left to be found wrong, but keep none of them.
        Raises AdapterError if the adapter is not acceptable, CapacityError if the pool or the host's memory cannot hold
        it; nothing is changed then.
        """
        contents = read_contents(name, source, self._reader, self.model.config, bool(lazy))
        shape = contents if isinstance(contents, Adapter) else contents.shape
        self._check_shape(name, shape)
        verified = read_contents(name, contents, self._reader, self.model.config) if lazy == "verified" else None
        self._loop.call(lambda: self._core.runner.require_adapters(shape.max_rank, shape.groups))
        record, old = self._registry.add(name, contents)
        if isinstance(verified, Adapter):
            self._registry.read(record, verified.digest, verified.weights_digest)
        if old is not None and old.identity != record.identity:
            self._loop.call(lambda: self._core.tiers.release(old))
        return record.digest

    def add_adapter_directory(self, path: str | os.PathLike[str]) -> AddedDirectory:
        """Registers every adapter of a directory under the name of its subdirectory, as add_adapter does with
        ``lazy=True``: 100,000 in seconds. Those that are refused are named in the result, and the others are added.

        Subdirectories without adapter_config.json, and those whose name begins with a dot, are left alone. Raises
        AdapterError if the directory cannot be read or holds no adapter.
        """
        began = time.monotonic()
        added, refused = self._add_checked(*self._reader.check_all(path))
        return AddedDirectory(added, refused, time.monotonic() - began)

    def add_adapters(self, directories: Mapping[str, str | os.PathLike[str]]) -> AddedDirectory:
        """add_adapter_directory for PEFT directories wherever they are, by the names that the adapters shall have."""
        began = time.monotonic()
        found: dict[str, AdapterFiles] = {}
        refused: dict[str, str] = {}
        for name, path in directories.items():
            try:
                found[name] = self._reader.check(path)
            except AdapterError as error:
                refused[name] = f"adapter {name!r}: {error}"
        added, refused = self._add_checked(found, refused)
        return AddedDirectory(added, refused, time.monotonic() - began)

    def _add_checked(
        self, found: Mapping[str, AdapterFiles], refused: dict[str, str]
    ) -> tuple[list[str], dict[str, str]]:
        """Registers what the engine can take. Returns the names, and all that was refused."""
        unfit = refusals(found, self._check_shape)
        replaced = []
        if shapes := {files.shape for name, files in found.items() if name not in unfit}:
            rank = max(shape.max_rank for shape in shapes)
            groups = frozenset().union(*(shape.groups for shape in shapes))
            self._loop.call(lambda: self._core.runner.require_adapters(rank, groups))
        added = []
        for name, files in found.items():
            if name in unfit:
                continue
            record, old = self._registry.add(name, files)
            added.append(name)
            if old is not None and old.identity != record.identity:
                replaced.append(old)
        if replaced:
            self._loop.call(lambda: self._core.tiers.release(*replaced))
        return added, refused | unfit

    def remove_adapter(self, name: str, timeout: float | None = None) -> None:
        """Forgets an adapter: new requests are refused, those in flight are waited for, then its memory is freed.

        Raises AdapterError if the name is unknown, TimeoutError if requests still run after `timeout` seconds (the name
        is gone by then, and the memory follows when they end).
        """
        record = self._registry.remove(name)
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._loop.call(lambda: self._core.tiers.in_use(record)):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"requests still use adapter {name!r} after {timeout} seconds")
            time.sleep(0.01)
        self._loop.call(lambda: self._core.tiers.release(record))

    def prefetch_adapter(self, name: str) -> "Future[None]":
        """Brings an adapter to host memory, and to pages when some are free, before anybody asks it.

        Returns a future that ends when it is in host memory, with an AdapterError if it cannot be read. Raises
        AdapterError if the name is unknown.
        """
        record = self._registry.get(name)
        return self._loop.call(lambda: self._core.prefetch(record))

    def pin_adapter(self, name: str) -> None:
        """Keeps an adapter in host memory, and in pages for as long as anything else that is idle can go instead.

        Returns when it is in host memory. Raises AdapterError if it is unknown or cannot be read, CapacityError if the
        budget of host memory would not hold the largest adapter beside the pinned ones.
        """
        record = self._registry.get(name)
        largest = max(map(self._images.nbytes, self._registry.shapes()))
        need = self._pinned_bytes(record) + self._images.nbytes(record.shape) + largest
        if need > self.settings.host_adapter_bytes:
            raise CapacityError(
                f"adapter {name!r} cannot be pinned: {need} bytes of host memory would be needed for the pinned "
                f"adapters and one more, host_adapter_bytes is {self.settings.host_adapter_bytes}; set it higher or "
                "unpin others"
            )
        self._loop.call(lambda: self._core.tiers.pin(record, True))
        try:
            self.prefetch_adapter(name).result()
        except AdapterError as error:
            raise AdapterError(f"adapter {name!r}: {error}") from None

    def unpin_adapter(self, name: str) -> None:
        """Ends pin_adapter; the adapter may leave like any other. AdapterError if the name is unknown."""
        record = self._registry.get(name)
        self._loop.call(lambda: self._core.tiers.pin(record, False))

    def list_adapters(self, names: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Registered adapters, or those of some names: name, digest (None until the contents were read), rank, targets,
        pages that it takes, the tier where it is ("pages", "host" or "disk"), resident (whether that is "pages"),
        pinned, hits (requests that named it), last_used (when the last one came, seconds since 1970, or None), error
        (why its files could not be read when that was last tried, or None).
        """
        resident, ready = self._loop.call(self._core.tiers.snapshot)
        pages: dict[AdapterShape, int] = {}
        rows = []
        for name, record in self._registry.items():
            if names is not None and name not in names:
                continue
            shape = record.shape
            if shape not in pages:
                pages[shape] = self._images.num_pages(shape)
            in_host = record.weights_digest in ready or isinstance(record.contents, Adapter)
            tier = "pages" if record.digest in resident else "host" if in_host else "disk"
            rows.append(
                dict(
                    name=name,
                    digest=record.digest,
                    rank=shape.max_rank,
                    targets=list(shape.targets),
                    pages=pages[shape],
                    tier=tier,
                    resident=tier == "pages",
                    pinned=record.pinned,
                    hits=record.hits,
                    last_used=record.last_used,
                    error=record.error,
                )
            )
        return rows

    def _pinned_bytes(self, apart_from: AdapterRecord | None = None) -> int:
        pinned = self._core.tiers.pinned
        return sum(self._images.nbytes(record.shape) for record in pinned if record is not apart_from)

    def _check_shape(self, name: str, shape: AdapterShape) -> None:
        """Raises if the pool or the host's memory cannot hold an adapter, or if the settings refuse it."""
        need, num_pages = self._images.num_pages(shape), self._core.pool.num_pages
        if need >= num_pages:
            raise CapacityError(
                f"adapter {name!r} needs {need} pages and the pool has {num_pages}: set page_pool_bytes higher"
            )
        check_settings(name, shape, self.settings)
        if self.settings.deterministic and self.settings.max_lora_rank is None:
            # steps for a higher rank may give other bits
            _check_rank(name, shape, self._core.runner.max_rank)
        nbytes = self._images.nbytes(shape)
        if nbytes > self.settings.host_adapter_bytes - self._pinned_bytes():
            raise CapacityError(
                f"adapter {name!r} needs {nbytes} bytes of host memory, host_adapter_bytes is "
                f"{self.settings.host_adapter_bytes}, pinned adapters included; set it higher"
            )


def read_contents(name: str, source: Any, reader: AdapterReader, config: ModelConfig, lazy: bool = False) -> Contents:
    """What a name will point at. Raises AdapterError beginning with the adapter's name."""
    try:
        if isinstance(source, AdapterFiles):
            return reader.read(source)
        if isinstance(source, str | os.PathLike):
            return reader.check(source) if lazy else reader.read(source)
        if lazy:
            raise AdapterError("lazy is for directories; leave it out for weights that are in memory already")
        return read_adapter(source, config)
    except AdapterError as error:
        raise AdapterError(f"adapter {name!r}: {error}") from None


def check_settings(name: str, shape: AdapterShape, settings: EngineConfig) -> None:
    """Raises AdapterError if an adapter's rank or targets are not among those that the settings allow."""
    if settings.max_lora_rank is not None:
        _check_rank(name, shape, settings.max_lora_rank)
    allowed = settings.lora_targets
    if allowed is not None and (others := [module for module in shape.targets if module not in allowed]):
        raise AdapterError(
            f"adapter {name!r} targets {', '.join(others)}, lora_targets is {', '.join(allowed)}; "
            "name there all that adapters may target"
        )


def _check_rank(name: str, shape: AdapterShape, limit: int) -> None:
    if shape.max_rank > limit:
        raise AdapterError(f"adapter {name!r} has rank {shape.max_rank}, max_lora_rank is {limit}; set it higher")


def refusals(found: Mapping[str, AdapterFiles], check: Callable[[str, AdapterShape], None]) -> dict[str, str]:
    """Why adapters are refused, by name. A shape that passes is checked once, however many adapters have it."""
    fits: set[AdapterShape] = set()
    refused = {}
    for name, files in found.items():
        if files.shape in fits:
            continue
        try:
            check(name, files.shape)
            fits.add(files.shape)
        except (AdapterError, CapacityError) as error:
            refused[name] = str(error)
    return refused
