"""What the steps of a run had to do and how long each took: measured by the benchmark, or simulated."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from slora_jax.errors import SloraError
from slora_jax.twin.cost import StepWork

_WORK = tuple(field.name for field in dataclasses.fields(StepWork))
_SECONDS = 1e-6  # to which times are written


@dataclasses.dataclass(slots=True)
class StepLog:
    """One entry a step. ends: moments in seconds of the trace's clock. seconds: what it took, from the end of the step
    before it, or from its planning if nothing ran then.
    """

    ends: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    work: list[StepWork] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.work)

    def add(self, end: float, seconds: float, work: StepWork) -> None:
        self.ends.append(end)
        self.seconds.append(seconds)
        self.work.append(work)

    def to_json(self) -> dict[str, Any]:
        """Columns, and one string of numbers a step, which keeps files small and readable."""
        rows = []
        for end, seconds, work in zip(self.ends, self.seconds, self.work, strict=True):
            times = (round(end / _SECONDS), round(seconds / _SECONDS))
            rows.append(" ".join(map(str, (*times, *(getattr(work, name) for name in _WORK)))))
        return dict(columns=["end_us", "us", *_WORK], rows=rows)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "StepLog":
        """What to_json gave. Raises SloraError if it is something else."""
        try:
            if fields["columns"] != ["end_us", "us", *_WORK]:
                raise ValueError(f"columns {fields['columns']}")
            log = cls()
            for row in fields["rows"]:
                end, seconds, *work = map(int, row.split())
                log.add(end * _SECONDS, seconds * _SECONDS, StepWork(**dict(zip(_WORK, work, strict=True))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SloraError(f"these are no steps that slora-jax bench wrote: {error}") from None
        return log

    def figures(self) -> dict[str, Any]:
        """Steps by kind: how many, their seconds together and their spread; and the seconds between steps."""
        seconds, prompt = np.array(self.seconds), np.array([w.prompt_tokens > 0 for w in self.work], bool)
        loading = np.array([w.load_bytes > 0 for w in self.work], bool)
        kinds = dict(decode=~prompt & ~loading, prompt=prompt & ~loading, loading=loading)
        span = self.ends[-1] - (self.ends[0] - self.seconds[0]) if self.ends else 0.0
        return {name: _spread(seconds[mask]) for name, mask in kinds.items()} | dict(
            idle_seconds=max(0.0, span - float(seconds.sum()))
        )


def _spread(seconds: np.ndarray) -> dict[str, float]:
    if not len(seconds):
        return dict(steps=0, seconds=0.0)
    p50, p99 = np.percentile(seconds, (50, 99)).tolist()
    return dict(steps=len(seconds), seconds=float(seconds.sum()), p50=p50, p99=p99)


def join(logs: Sequence[StepLog]) -> StepLog:
    """The steps of several runs."""
    return StepLog(*([x for log in logs for x in getattr(log, f.name)] for f in dataclasses.fields(StepLog)))
