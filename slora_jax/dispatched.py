"""A step that was dispatched, and how its results are read."""

import dataclasses
from typing import Any

from slora_jax.batch import Output
from slora_jax.batch_builder import Rows
from slora_jax.jobs import Generation
from slora_jax.requests import TokenLogprob
from slora_jax.step_plan import StepPlan


@dataclasses.dataclass(slots=True)
class DispatchedStep:
    """A step that was dispatched and whose results were not taken yet."""

    plan: StepPlan
    rows: Rows
    generations: list[Generation]  # of each row
    output: Output | None  # on the device; None if there are no rows
    logits: Any  # on the device: there when the step is over
    hidden: Any  # on the device: of each row, if one of them is of an embedding; else None
    began: float
    compiles: int  # programs that had been compiled when it began
    needs_host_tokens: bool  # before the next step is planned; see Generation

    def take_prompt_logprob(self, row: int, output: Output) -> None:
        """Enters what a row says of its prompt's next token in the request's output. output: fetched."""
        generation, position = self.generations[row], int(self.rows.position[row])
        table, top = generation.job.output.prompt_logprobs, generation.job.params.prompt_logprobs
        if generation.completion.index == 0 and table is not None and top is not None:
            table[position + 1] = token_logprob(output, row, generation.seq.tokens[position + 1], top)


def token_logprob(output: Output, row: int, token: int, num_top: int) -> TokenLogprob:
    """Log-probability of a row's token, and of the best `num_top`. output: fetched."""
    assert output.logprobs is not None
    top: dict[int, float] = {}
    if num_top:
        assert output.top_ids is not None and output.top_logprobs is not None
        ids, values = output.top_ids[row, :num_top].tolist(), output.top_logprobs[row, :num_top].tolist()
        top = dict(zip(ids, values, strict=True))
    return TokenLogprob(token, float(output.logprobs[row]), top)
