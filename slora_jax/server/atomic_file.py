"""Files that are either the old or the new, whatever happens meanwhile."""

import contextlib
import os
from pathlib import Path
import tempfile


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file. After a crash it holds the old bytes or the new ones, never a part. OSError if it cannot be."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
