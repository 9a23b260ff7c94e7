"""First come, first served."""

from slora_jax.policies.policy import Policy


class Fcfs(Policy):
    """Tries sequences in order of arrival and gives none up."""
