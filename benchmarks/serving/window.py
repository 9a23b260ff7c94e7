"""What a run did between two moments: the steady state of a load that no engine keeps up with; and until one."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from slora_jax.twin import Record, StepLog


def window_figures(records: Sequence[Record], steps: StepLog, start: float, end: float) -> dict[str, Any]:
    """Rates between the seconds `start` and `end` of a run, in which there must always have been requests waiting.

    requests_per_second: answers that ended, which a few hundred answers of random lengths leave uncertain by a few per
    cent. by_tokens: the tokens that were computed, over those of the mean request; less uncertain.
    """
    seconds = end - start
    done = sum(r.finished is not None and start <= r.finished < end for r in records)
    work = [w for at, w in zip(steps.ends, steps.work, strict=True) if start <= at < end]
    prompt, decode = sum(w.prompt_tokens for w in work), sum(w.decode_tokens for w in work)
    mean = sum(r.request.prompt_len + r.request.output_len - 1 for r in records) / max(len(records), 1)
    return dict(
        start=start,
        end=end,
        requests_per_second=done / seconds,
        by_tokens=(prompt + decode) / mean / seconds if mean else 0.0,
        prompt_tokens_per_second=prompt / seconds,
        decode_tokens_per_second=decode / seconds,
        steps=len(work),
        sequences=sum(w.sequences for w in work) / max(len(work), 1),
    )


def pages_in_use(samples: Sequence[Mapping[str, float]], start: float, end: float) -> float:
    """Pages that running requests and their adapters held, on average between the seconds `start` and `end` of a run.

    samples: seconds and used_pages(), in their order; between two of them pages grow or shrink evenly.
    """
    moments = np.array([s["seconds"] for s in samples])
    held = np.array([s["kv"] + s["adapter"] for s in samples])
    inside = moments[(start < moments) & (moments < end)]
    at = np.concatenate([[start], inside, [end]])
    return float(np.trapezoid(np.interp(at, moments, held), at)) / (end - start)


def cut_off(records: Sequence[Record], until: float) -> list[Record]:
    """What is known of requests when a run ends at `until`, as replay does it: what came later never came."""

    def known(moment: float | None) -> float | None:
        return moment if moment is not None and moment <= until else None

    return [
        dataclasses.replace(
            r,
            scheduled=known(r.scheduled),
            first_token=known(r.first_token),
            finished=known(r.finished),
            aborted=known(r.first_token) is None,
        )
        for r in records
    ]
