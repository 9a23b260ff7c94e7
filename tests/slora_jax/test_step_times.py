"""The seconds of steps: sums of parts, and what an engine counts as the device's."""

import time

from engines import PROMPT, config, greedy
import pytest

from slora_jax import Engine, Request
from slora_jax.step_times import PARTS, StepTimes


def test_parts_are_the_times_between_marks():
    seconds = iter([10.0, 11.0, 11.5, 20.0, 24.0])
    times = StepTimes(lambda: next(seconds))
    times.begin()
    times.mark("plan")
    times.mark("wait")
    times.begin()
    times.mark("plan")
    assert times.as_dict() == dict(host=dict.fromkeys(PARTS, 0.0) | dict(plan=5.0, wait=0.5), device=0.0)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_engines_parts_fit_into_the_time_that_passed(overlap):
    """Every part of a step is counted once; a device that takes long is waited for."""
    model, options = config(overlap=overlap)
    with Engine(model, options) as engine:
        request = Request(None, None, greedy(10), PROMPT)
        engine.generate([request])  # compiles
        runner, before, began = engine._core.runner, engine.stats()["step_seconds"], time.monotonic()
        fetch = runner.fetch

        def slow(*args):
            time.sleep(0.01)
            return fetch(*args)

        runner.fetch = slow
        engine.generate([request])
        passed, after = time.monotonic() - began, engine.stats()["step_seconds"]
    spent = {part: after["host"][part] - before["host"][part] for part in PARTS}
    assert all(spent[part] > 0 for part in PARTS) and sum(spent.values()) < passed
    assert spent["wait"] >= 0.1 and 0.1 <= after["device"] - before["device"] < passed
