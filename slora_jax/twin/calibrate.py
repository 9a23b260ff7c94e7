"""A cost model from measured steps."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from slora_jax.buckets import Buckets
from slora_jax.errors import SloraError
from slora_jax.twin.cost import CostModel
from slora_jax.twin.steps import StepLog, join

_LEAST_STEPS = 20
_KNEES, _ROUNDS = 24, 2
_LINEAR = ("decode_context", "prompt_context", "adapter_bytes", "load_bytes", "sequences")
_FIELD = dict(adapter_bytes="adapter_byte", load_bytes="load_byte", sequences="sequence")


def fit_cost(log: StepLog, name: str = "measured") -> tuple[CostModel, float]:
    """Non-negative least squares of the steps' seconds on what they had to do.

    ``max(weights, token * tokens)`` is linear on either side of the number of tokens at which the two are equal; that
    number is found by trying, ever finer. Returns the model and its relative error: the mean absolute one of a step
    over the mean step. Raises SloraError where there are too few steps.
    """
    if len(log) < _LEAST_STEPS:
        raise SloraError(f"{len(log)} steps are too few to calibrate a cost model; measure at least {_LEAST_STEPS}")
    seconds = np.array(log.seconds)
    tokens = np.array([w.tokens for w in log.work], float)
    prompt = np.array([w.prompt_tokens > 0 for w in log.work], float)
    linear = [np.array([getattr(w, field) for w in log.work], float) for field in _LINEAR]

    def fit(knee: float) -> tuple[float, float, np.ndarray]:
        # Columns: each step; its tokens, of which those up to the knee cost nothing of their own; and so on. The knee
        # times a token's price is what reading the weights takes.
        columns = [np.ones_like(tokens), np.maximum(tokens, knee), prompt, *linear]
        solution, error = _nnls(np.stack(columns, axis=1), seconds)
        return error, knee, solution

    sizes = np.unique(np.concatenate([[0.0], tokens]))
    knees = sizes[np.linspace(0, len(sizes) - 1, min(len(sizes), _KNEES)).astype(int)]
    for _ in range(_ROUNDS):  # ever finer around the best
        _, best, _ = min(map(fit, knees.tolist()), key=lambda result: result[0])
        at = int(np.searchsorted(knees, best))
        knees = np.linspace(knees[max(at - 1, 0)], knees[min(at + 1, len(knees) - 1)], _KNEES)
    _, knee, solution = min(map(fit, knees.tolist()), key=lambda result: result[0])
    step, token, prompt_step, *rest = map(float, solution)
    fields: dict[str, Any] = {_FIELD.get(field, field): value for field, value in zip(_LINEAR, rest, strict=True)}
    model = CostModel(
        name=name,
        step=step,
        prompt_step=prompt_step,
        weights=token * knee,
        token=token,
        **fields,
    )
    predicted = np.array([model.seconds(w) for w in log.work])
    return model, float(np.abs(predicted - seconds).mean() / seconds.mean())


def _nnls(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Columns differ by many orders of magnitude, so they are brought to one scale first."""
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    solution, error = nnls(columns / scale, target)
    return solution / scale, float(error)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a benchmark's file says of the device and the engine it ran on. error: see fit_cost."""

    cost: CostModel
    error: float
    setting: Mapping[str, Any]  # shape, ranks, targets
    engine: Mapping[str, Any]  # max_seqs, max_step_tokens, page_pool_bytes, item_bytes, prefix_caching, …
    buckets: Buckets


def calibrate(path: str | Path) -> Calibration:
    """Reads a file that ``slora-jax bench --json`` wrote. SloraError names what is wrong with it."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SloraError(f"benchmark result {path} cannot be read: {error}") from None
    try:
        log = join([StepLog.from_json(point["steps"]) for point in result["points"]])
        engine = result["engine"]
        buckets = Buckets(seqs=tuple(engine["seq_buckets"]), tokens=tuple(engine["token_buckets"]))
        cost, deviation = fit_cost(log, f"measured, {Path(path).name}")
        return Calibration(cost, deviation, result["setting"], engine, buckets)
    except (KeyError, TypeError) as error:
        raise SloraError(f"{path} is no result of slora-jax bench with steps: {error} is missing") from None
