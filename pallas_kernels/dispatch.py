"""Choice between an op's implementations: the XLA reference, which runs anywhere, and the Hopper kernel."""

import functools
import logging
from typing import Literal

import jax

Implementation = Literal["auto", "mosaic", "xla"]

logger = logging.getLogger(__name__)


class UnsupportedInput(ValueError):
    """A kernel was asked for by name and cannot take this input; the message says why."""


@functools.cache
def hopper_available() -> bool:
    """Whether the default backend is a GPU of compute capability 9.0 (H100, H200)."""
    devices = jax.devices()
    return devices[0].platform == "gpu" and getattr(devices[0], "compute_capability", "") == "9.0"


@functools.cache
def _log_once(op: str, reason: str) -> None:
    logger.warning("%s: using the XLA implementation, because %s", op, reason)


def use_mosaic(op: str, implementation: Implementation, unsupported: str | None) -> bool:
    """True if the Hopper kernel of `op` should run.

    unsupported: why the kernel cannot take this input, or None if it can.
    Raises UnsupportedInput if implementation is "mosaic" and there is such a reason.
    """
    if implementation not in ("auto", "mosaic", "xla"):
        raise ValueError(f"implementation must be 'auto', 'mosaic' or 'xla', not {implementation!r}")
    if implementation == "mosaic":
        if unsupported:
            raise UnsupportedInput(f"{op} has no Hopper kernel for this input: {unsupported}")
        return True
    if implementation == "xla" or not hopper_available():
        return False
    if unsupported:
        _log_once(op, unsupported)
        return False
    return True
