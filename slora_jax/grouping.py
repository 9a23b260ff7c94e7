"""When waiting sequences start: at once, or a few steps later together. Pure host code, no jax."""

from slora_jax.step_plan import StepDraft


class Grouping:
    """Leaves `gap` steps without starts after one that started all it could.

    A step with prompts takes some milliseconds more than their tokens do, so that the prompts of a few steps cost less
    in one. Whoever waits does so for `gap` steps more at most, and only while at least half of `max_seqs` run: where
    few run, nobody waits. 0 starts everybody at once.
    """

    def __init__(self, gap: int, max_seqs: int):
        if gap < 0:
            raise ValueError(f"prompt_gap must not be negative, not {gap}")
        self._gap = gap
        self._enough = (max_seqs + 1) // 2
        self._passed = gap  # steps since the last one that started all it could

    def holds_back(self, draft: StepDraft, running: int) -> bool:
        """Whether this step, which has something to compute, starts nobody."""
        return self._passed < self._gap and running >= self._enough and bool(draft.chunks)

    def planned(self, draft: StepDraft) -> None:
        """A step was planned."""
        if any(chunk.length > 1 for chunk in draft.chunks):
            # where the tokens ran out, more is to be started
            self._passed = 0 if draft.budget else self._gap
        else:
            self._passed += 1
