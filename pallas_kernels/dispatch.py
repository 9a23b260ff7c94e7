"""Choice between an op's implementations: the XLA reference, which runs anywhere, and the Hopper kernel."""

from collections.abc import Callable
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
def log_fallback(op: str, instead: str, reason: str) -> None:
    """Says, once for each reason, what an op does instead of running its kernel."""
    logger.warning("%s: %s, because %s", op, instead, reason)


def use_mosaic(op: str, implementation: Implementation, unsupported: Callable[[], str | None]) -> bool:
    """True if the Hopper kernel of `op` should run.

    unsupported: says why the kernel cannot take this input, or None if it can; called only where the kernel may run.
    Raises UnsupportedInput if implementation is "mosaic" and there is such a reason.
    """
    if implementation not in ("auto", "mosaic", "xla"):
        raise ValueError(f"implementation must be 'auto', 'mosaic' or 'xla', not {implementation!r}")
    if implementation == "xla" or (implementation == "auto" and not hopper_available()):
        return False
    reason = unsupported()
    if reason is None:
        return True
    if implementation == "mosaic":
        raise UnsupportedInput(f"{op} has no Hopper kernel for this input: {reason}")
    log_fallback(op, "using the XLA implementation", reason)
    return False
