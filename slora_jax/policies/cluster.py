"""Adapter clustering: prefer adapters that run already."""

from collections.abc import Iterable

from slora_jax.policies.policy import Policy, View
from slora_jax.sequence import Sequence as Seq


class Cluster(Policy):
    """S-LoRA's adapter clustering (arXiv 2311.03285, 4.2; cluster_req_queue.py).

    Once `adapters` distinct ones run, sequences of those go first, then all others, each part first come, first served.
    Fewer adapters in a batch leave more memory to the KV cache and are fewer bytes to read. `adapters` is no limit.

    patience: seconds after which a sequence goes before all that came later, whatever its adapter, so that a popular
    adapter keeps nobody waiting for ever. S-LoRA has no such bound. Under a load that makes everybody wait for that
    long this is first come, first served.
    """

    def __init__(self, adapters: int = 8, patience: float = 30.0):
        if adapters < 1:
            raise ValueError(f"adapters must be at least 1, not {adapters}")
        if patience < 0:
            raise ValueError(f"patience must not be negative, not {patience}")
        self.adapters = adapters
        self.patience = patience

    def order(self, view: View) -> Iterable[Seq]:
        running = {seq.adapter.digest for seq in view.running if seq.adapter}
        if len(running) < self.adapters:
            return view.waiting
        parts: tuple[list[Seq], ...] = ([], [], [])
        for seq in view.waiting:
            if view.now - (seq.arrival or 0.0) >= self.patience:
                part = 0
            else:
                part = 1 if seq.adapter is None or seq.adapter.digest in running else 2
            parts[part].append(seq)
        return [seq for part in parts for seq in part]
