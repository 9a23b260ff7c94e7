"""Fixed batches: what adapters cost at 1 to max_seqs sequences, prefill and decode apart, against the base model.

The rows of a case all start at once and are equally long; ``distinct`` adapters are given out in turn.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.serving.workloads import OpenSession
from slora_jax.traces import TraceRequest

_BATCHES = (1, 8, 32, 64, 128, 256)  # below max_seqs, which is measured too
_DISTINCT = (1, 8, 32)
_LENGTH = 256  # tokens of a prompt, and of an answer


def measure(args: argparse.Namespace, open_session: OpenSession) -> Iterator[dict[str, Any]]:
    length = min(_LENGTH, args.lengths[1])
    most = max(args.adapters)
    with open_session(adapters=most, longest=2 * length, base=True) as session:
        limit = session.settings.max_seqs
        batches = [*(b for b in _BATCHES if b < limit), limit]
        for batch in batches:
            base: dict[str, float] | None = None
            for distinct in sorted({0, *(d for d in _DISTINCT if d < batch), batch}):
                if distinct > most:
                    continue
                adapters = [i % distinct if distinct else None for i in range(batch)]
                trace = [TraceRequest(0.0, a, length, length) for a in adapters]
                point, run = session.measure(trace, dict(batch=batch, distinct=distinct), floor=False)
                started = max(r.first_token or 0.0 for r in run.records)
                ended = max(r.finished or 0.0 for r in run.records)
                speeds = dict(
                    prefill_tokens_per_second=batch * length / started,
                    decode_tokens_per_second=batch * (length - 1) / max(ended - started, 1e-9),
                )
                base = base or speeds
                shares = {f"{name}_of_base": value / base[name] for name, value in speeds.items()}
                yield point | dict(more=speeds | shares) | session.describe()
