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
_REWEIGHTED = 3
_TRUSTED = 1.5  # times the median error
_DOUBT = 0.01
_LINEAR = ("decode_context", "prompt_context", "adapter_bytes", "load_bytes", "sequences")
_FIELD = dict(adapter_bytes="adapter_byte", load_bytes="load_byte", sequences="sequence")


def fit_cost(log: StepLog, name: str = "measured") -> tuple[CostModel, float]:
    """Non-negative least squares of the steps' seconds on what they had to do.

    ``max(weights, token * tokens)`` is linear on either side of the number of tokens at which the two are equal; that
    number is found by trying, ever finer. Errors past 1.5 times their median count in proportion, not squared (Huber,
    Robust Estimation of a Location Parameter, 1964): a host that was busy for a moment says nothing of the device.
    Returns the model and its relative error: the mean absolute one of a step over the mean step. Raises SloraError
    where there are too few steps.
    """
    if len(log) < _LEAST_STEPS:
        raise SloraError(f"{len(log)} steps are too few to calibrate a cost model; measure at least {_LEAST_STEPS}")
    seconds = np.array(log.seconds)
    tokens = np.array([w.tokens for w in log.work], float)
    prompt = np.array([w.prompt_tokens > 0 for w in log.work], float)
    linear = [np.array([getattr(w, field) for w in log.work], float) for field in _LINEAR]
    sizes = np.unique(np.concatenate([[0.0], tokens]))

    def columns(knee: float) -> np.ndarray:
        # Each step; its tokens, of which those up to the knee cost nothing of their own; and so on. The knee times a
        # token's price is what reading the weights takes.
        return np.stack([np.ones_like(tokens), np.maximum(tokens, knee), prompt, prompt * tokens, *linear], axis=1)

    # A price of their own for tokens in steps with prompts counts as so large an error, so that there is none where the
    # steps without prompts are of one size and do not tell.
    doubt = np.array([0, 0, 0, _DOUBT * len(log) ** 0.5 * tokens.max(), *[0] * len(_LINEAR)])  # in the order of columns

    def best_fit(trust: np.ndarray) -> tuple[float, np.ndarray]:
        """The knee, and the coefficients of columns. trust: of each step, as a factor of its error."""

        def fit(knee: float) -> tuple[float, float, np.ndarray]:
            rows, target = columns(knee) * trust[:, None], seconds * trust
            solution, error = _nnls(np.vstack([rows, doubt]), np.append(target, 0.0))
            return error, knee, solution

        knees = sizes[np.linspace(0, len(sizes) - 1, min(len(sizes), _KNEES)).astype(int)]
        for _ in range(_ROUNDS):
            _, best, _ = min(map(fit, knees.tolist()), key=lambda result: result[0])
            at = int(np.searchsorted(knees, best))
            knees = np.linspace(knees[max(at - 1, 0)], knees[min(at + 1, len(knees) - 1)], _KNEES)
        _, knee, solution = min(map(fit, knees.tolist()), key=lambda result: result[0])
        return knee, solution

    knee, solution = best_fit(np.ones_like(seconds))
    for _ in range(_REWEIGHTED):
        off = np.abs(columns(knee) @ solution - seconds)
        trusted = max(_TRUSTED * float(np.median(off)), np.finfo(float).tiny)
        knee, solution = best_fit(np.sqrt(trusted / np.maximum(off, trusted)))
    step, token, prompt_step, prompt_token, *rest = map(float, solution)
    fields: dict[str, Any] = {_FIELD.get(field, field): value for field, value in zip(_LINEAR, rest, strict=True)}
    model = CostModel(
        name=name,
        step=step,
        prompt_step=prompt_step,
        prompt_token=prompt_token,
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
