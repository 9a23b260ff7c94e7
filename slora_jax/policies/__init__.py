"""Who goes first, who is given up, and how much one adapter may take. Host code only, no jax."""

from collections.abc import Mapping
import inspect
from typing import Any

from slora_jax.errors import SloraError
from slora_jax.policies.cluster import Cluster
from slora_jax.policies.early_abort import EarlyAbort
from slora_jax.policies.fair import Fair
from slora_jax.policies.fcfs import Fcfs
from slora_jax.policies.gather import Gather
from slora_jax.policies.policy import Drop, Policy, View
from slora_jax.policies.priority import Priority
from slora_jax.policies.quota import Quota, Quotas

__all__ = [
    "POLICIES",
    "Cluster",
    "Drop",
    "EarlyAbort",
    "Fair",
    "Fcfs",
    "Gather",
    "Policy",
    "Priority",
    "Quota",
    "Quotas",
    "View",
    "make_policy",
]

POLICIES: dict[str, type[Policy]] = {
    "fcfs": Fcfs,
    "cluster": Cluster,
    "early-abort": EarlyAbort,
    "fair": Fair,
    "gather": Gather,
    "priority": Priority,
}
"""Every policy, by the name that EngineConfig and the command line know it by."""


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> Policy:
    """A policy by name. options: arguments of its class. Raises SloraError if the name, an option or its value is
    unknown.
    """
    if name not in POLICIES:
        raise SloraError(f"policy must be one of {', '.join(map(repr, POLICIES))}, not {name!r}")
    kind, options = POLICIES[name], dict(options or {})
    known = [p for p in inspect.signature(kind).parameters if p not in ("args", "kwargs")]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise SloraError(f"policy {name!r} has no option {option!r}; {has}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise SloraError(f"policy {name!r}: {error}") from None
