"""Compiled programs on disk, found again without tracing.

JAX's own persistent cache is asked after a program was traced and lowered, which takes seconds of Python for a model of
many layers. Here the name of a file says all that the program was made from, this package's source included.

A file holds executable code: keep the directory where only you can write.
"""

from collections.abc import Hashable
import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
from pathlib import Path
import tempfile
import threading
from typing import Any

import jax
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)
_PACKAGES = ("slora_jax", "pallas_kernels", "sharding")


_thread = threading.local()


@functools.cache
def _count_hits() -> None:
    """Makes JAX tell, from now on, when a program comes from its own cache."""

    def listen(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _thread.hits = getattr(_thread, "hits", 0) + 1

    jax.monitoring.register_event_listener(listen)


@functools.cache
def _source_digest() -> str:
    """Of every source file that a program can depend on."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in _PACKAGES:
        found = (path for pattern in ("*.py", "*.json") for path in (root / package).rglob(pattern))
        for path in sorted(found):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class ExecutableCache:
    """Programs in a directory, each known by `fixed`, which all have in common, and a key of its own. Both must have a
    repr that tells all that matters. name: of what they have in common.
    """

    def __init__(self, directory: Path, fixed: Hashable):
        device = jax.local_devices()[0]
        versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
        flags = os.environ.get("XLA_FLAGS", "")
        about = (_source_digest(), versions, device.client.platform_version, device.device_kind, flags, fixed)
        self._fixed = repr(about)
        self.name = hashlib.sha256(self._fixed.encode()).hexdigest()[:16]
        self._directory = directory
        self._device = device

    def _path(self, key: Hashable) -> Path:
        return self._directory / (hashlib.sha256(f"{self._fixed}\0{key!r}".encode()).hexdigest() + ".step")

    def get(self, key: Hashable, in_tree: Any, out_tree: Any) -> jax.stages.Compiled | None:
        """The program of a key, or None. in_tree, out_tree: structures of ``(args, {})`` and of what it returns."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            return serialize_executable.deserialize_and_load(
                data, in_tree, out_tree, execution_devices=[self._device], backend=self._device.client
            )
        except Exception as error:  # whatever is wrong with the file, the program can be compiled again
            logger.warning("%s cannot be used (%s); compiling again", path, str(error).partition("\n")[0])
            return None

    def compile(self, key: Hashable, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program and keeps it, unless JAX has it in a cache of its own: a program that was loaded cannot be
        relied on to be written whole. For that not to happen after another version of it was kept, `name` should be in
        the program's name.
        """
        _count_hits()
        before = getattr(_thread, "hits", 0)
        program = lowered.compile()
        if getattr(_thread, "hits", 0) == before:
            self._put(key, program)
        return program

    def _put(self, key: Hashable, program: jax.stages.Compiled) -> None:
        """Writes a program. Where the backend cannot, or the directory cannot be written, nothing is kept."""
        path = self._path(key)
        try:
            data, _, _ = serialize_executable.serialize(program)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, part = tempfile.mkstemp(dir=path.parent)
        except Exception as error:  # the cache only saves time
            logger.warning("a compiled step is not kept: %s", str(error).partition("\n")[0])
            return
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(part, path)  # whole or not at all, also when several processes start at once
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
            with contextlib.suppress(OSError):
                os.unlink(part)
