"""Early abort: give up requests that would miss their target, so that others meet it."""

from collections.abc import Iterable, Sequence

from pallas_kernels.geometry import ceil_div
from slora_jax.policies.policy import Drop, Policy, View
from slora_jax.sequence import Chunk
from slora_jax.sequence import Sequence as Seq

_ASSUMED_SLACK = 0.5  # seconds; S-LoRA's, until a step was measured
_NEW = 0.7  # weight of the newest value in the moving averages, as in S-LoRA


class EarlyAbort(Policy):
    """S-LoRA's admission control (arXiv 2311.03285, 4.3; abort_req_queue.py), with measured times.

    A waiting sequence is given up as soon as its first token can no longer come within `ttft` seconds of its arrival.
    Nothing that ran is ever given up.

    slack: seconds from admission to the first token. None estimates it: the steps that the sequence's prompt takes
    behind the prompts that are being computed already, each as long as recent steps with prompts were. Those left are
    tried in order of arrival, which is that of their deadlines: whoever is given up would have been too late anyway and
    held up the others, so that more are in time than under first come, first served. A number (S-LoRA assumes 0.5) is
    S-LoRA's rule, which tries the newest first while more arrive than are admitted: those served wait less, but some
    are given up that had time left.
    """

    def __init__(self, ttft: float = 6.0, slack: float | None = None):
        if ttft <= 0:
            raise ValueError(f"ttft must be positive, not {ttft}")
        if slack is not None and slack < 0:
            raise ValueError(f"slack must not be negative, not {slack}")
        self.ttft = ttft
        self.slack = slack
        self._step_seconds = 0.0  # of a step with prompts, a moving average; 0: none was measured
        self._arrivals = 1  # moving average of the arrivals since the last admission
        self._batch = 1  # moving average of the sequences admitted at a time
        self._admitted = 0  # since the last call of order
        self._left = 0  # waiting when that call's admissions were done
        self._last_left = 0

    def drop(self, view: View) -> Sequence[Drop]:
        backlog = sum(seq.num_pending for seq in view.running if seq.num_pending > 1)
        reason = f"given up: its first token cannot come within the target of {self.ttft:g} s; try again later"
        return [
            Drop(seq, reason)
            for seq in view.waiting
            if view.now - (seq.arrival or 0.0) + self._slack(seq, backlog, view.max_step_tokens) >= self.ttft
        ]

    def _slack(self, seq: Seq, backlog: int, max_step_tokens: int) -> float:
        if self.slack is not None:
            return self.slack
        if not self._step_seconds:
            return min(_ASSUMED_SLACK, self.ttft / 2)
        return ceil_div(backlog + seq.num_pending, max_step_tokens) * self._step_seconds

    def order(self, view: View) -> Iterable[Seq]:
        if self.slack is None:
            return view.waiting
        if self._admitted:
            self._last_left = self._left
            self._batch = max(int(_NEW * self._admitted + (1 - _NEW) * self._batch), 1)
            self._admitted = 0
        self._left = len(view.waiting)
        self._arrivals = int(_NEW * (self._left - self._last_left) + (1 - _NEW) * self._arrivals)
        return view.waiting if self._arrivals < self._batch else list(reversed(view.waiting))

    def admitted(self, seq: Seq) -> None:
        if not seq.preemptions:
            self._admitted += 1
            self._left -= 1

    def completed(self, chunks: Sequence[Chunk], seconds: float) -> None:
        if seconds and any(c.length > 1 for c in chunks):
            last = self._step_seconds or seconds
            self._step_seconds = _NEW * last + (1 - _NEW) * seconds  # the other way round: steps differ much
