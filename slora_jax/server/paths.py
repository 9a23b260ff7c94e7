"""Names and paths that come from outside: what may name an adapter, and where its files may lie."""

import errno
import os
from pathlib import Path, PurePosixPath
import re
import stat

from slora_jax.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from slora_jax.errors import AdapterError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/+-]{0,199}")


class NameRefused(AdapterError):
    """An adapter may not have this name."""


Fingerprint = tuple[tuple[int, ...], ...]


def check_name(name: str, base_model: str) -> str:
    """The name itself, if an adapter may have it. NameRefused otherwise. A name is never used as a path."""
    if not _NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        shown = name if len(name) <= 64 else name[:63] + "…"
        raise NameRefused(
            f"adapter name {shown!r} is not usable: use 1 to 200 letters, digits and _ . : @ / + -, beginning with a "
            "letter, a digit or _"
        )
    if name == base_model:
        raise NameRefused(f"{name!r} is the base model; give the adapter another name")
    return name


def confine(root: Path, given: str) -> Path:
    """The directory that `given` names under `root`.

    AdapterError if it is absolute, climbs with .., is hidden, or leads out of the root through a symbolic link.
    """
    parts = PurePosixPath(given).parts
    usable = given and len(given) <= 1024 and given.isprintable() and "\\" not in given and parts
    if not usable or given.startswith("/") or any(part.startswith(".") for part in parts):
        raise AdapterError("the path must be relative to the server's --load-root, without .. and hidden parts")
    return check_inside(root, root / given)


def check_inside(root: Path, path: Path) -> Path:
    """The path itself, if it is an adapter's directory whose files truly lie under `root`. AdapterError otherwise."""
    try:
        real_root = root.resolve(strict=True)
        for file in (path, path / CONFIG_FILE, path / WEIGHTS_FILE):
            if not file.resolve(strict=True).is_relative_to(real_root):
                raise AdapterError(f"{path.name}: a symbolic link leads out of the adapters' directory; copy the files")
        for file in (path / CONFIG_FILE, path / WEIGHTS_FILE):
            if not stat.S_ISREG(file.stat().st_mode):
                raise AdapterError(f"{path.name}: {file.name} is no regular file")
    except (OSError, RuntimeError, ValueError):
        # RuntimeError: symbolic links in a circle
        raise AdapterError(
            f"no adapter is at {path.name!r}: a directory with {CONFIG_FILE} and {WEIGHTS_FILE} is needed"
        ) from None
    return path


def fingerprint(path: Path) -> Fingerprint | None:
    """What changes when an adapter's files do; None while it has no configuration file or cannot be read."""
    seen: list[tuple[int, ...]] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            stat_ = (path / name).stat()
            seen.append((stat_.st_ino, stat_.st_size, stat_.st_mtime_ns))
        except OSError:
            if name == CONFIG_FILE:
                return None
            seen.append(())
    return tuple(seen)


def fingerprints(root: Path) -> dict[str, Fingerprint | None]:
    """Of every adapter in a directory. OSError if it cannot be read, also if it goes away meanwhile, when its adapters
    seem to be gone.
    """
    before = root.stat()
    found = {p.name: fingerprint(p) for p in sorted(root.iterdir()) if not p.name.startswith(".")}
    after = root.stat()
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(root))
    return found
