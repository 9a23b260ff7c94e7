"""Programs that are compiled ahead, kept on disk and found again; and that serving compiles none."""

import functools
import uuid

from engines import PROMPT, adapters_for, config
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from slora_jax import Engine, Request, SamplingParams, executable_cache
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.loading import random_params
from slora_jax.placement import new_state
from slora_jax.program_shapes import SampleShape, StepOptions, StepShape
from slora_jax.programs import Programs
from slora_jax.sampling_batch import RowSampling, build_sampling, sampling_shapes, with_all_features
from slora_jax.shapes import named_shape

CONFIG = named_shape("tiny-llama")
OPTIONS = StepOptions(
    config=CONFIG, dtype=jnp.dtype("float32"), max_rank=8, implementation="xla", loop="scan", parallel=None
)


@pytest.fixture
def compiled(monkeypatch):
    """Counts what JAX compiles, or takes from its own cache, from now on."""
    events = []
    listen = lambda name, seconds, **kw: events.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def test_serving_after_the_warm_up_compiles_nothing(compiled):
    model, settings = config(
        max_model_len=64, seq_buckets=(2,), max_seqs=2, token_buckets=(32,), max_step_tokens=32, warm_up=True
    )
    kinds = [
        dict(),
        dict(temperature=1.0, seed=1),
        dict(temperature=1.0, top_k=3, seed=1, n=2),
        dict(logprobs=3),
        dict(temperature=0.5, logprobs=0, seed=2),
        dict(repetition_penalty=1.2),
        dict(frequency_penalty=0.1, logit_bias={4: 1.0}, temperature=0.7, seed=3),
        dict(logit_bias=dict.fromkeys(range(200), 1.0)),
        dict(prompt_logprobs=2),
        dict(prompt_logprobs=0, logprobs=1, presence_penalty=0.3, logit_bias={4: 1.0}),
    ]
    with Engine(model, settings, adapters_for(model, 2)) as engine:
        assert compiled and engine.stats()["compiles"] == 0
        compiled.clear()
        requests = [
            Request(None, name, SamplingParams(max_tokens=9, ignore_eos=True, **kind), (PROMPT * 9)[:n])
            for kind in kinds
            for name, n in ((None, 5), ("a0", 50), (None, 33))
        ]
        engine.generate(requests)  # in all mixtures
        for request in requests:
            engine.generate([request])
        assert not compiled and engine.stats()["compiles"] == 0


def test_what_is_not_compiled_ahead_is_counted_and_not_measured(monkeypatch):
    model, settings = config()
    with Engine(model, settings) as engine:
        seconds = []
        completed = engine._core.scheduler.policy.completed
        monkeypatch.setattr(
            engine._core.scheduler.policy, "completed", lambda c, s: (seconds.append(s), completed(c, s))
        )
        request = Request(None, None, SamplingParams(max_tokens=4, ignore_eos=True), PROMPT)
        engine.generate([request])
        assert engine.stats()["compiles"] == 3  # a prompt step, a decode step, one sampler
        assert seconds[0] == 0 and all(s > 0 for s in seconds[2:])  # the second step was compiled while the first ran
        seconds.clear()
        engine.generate([request])
        assert engine.stats()["compiles"] == 3 and all(s > 0 for s in seconds)


def make(tmp_path, num_pages=8):
    params = random_params(CONFIG, dtype="float32")
    builder = BatchBuilder(CONFIG.geometry, Buckets.default(2, 64), num_pages, 64)
    return Programs(OPTIONS, params, builder, tmp_path), params


def run(programs, params, shape):
    last = jnp.zeros(2, jnp.int32)
    state = new_state(CONFIG, programs.builder.num_pages, np.dtype("float32"))
    return programs.forward(params, state, last, programs.padding(shape))[1]


@pytest.fixture
def changed(monkeypatch):
    """As if the source had just been changed: JAX's own cache has none of the programs."""
    monkeypatch.setattr(executable_cache, "_source_digest", functools.cache(lambda: str(uuid.uuid4())))


def test_programs_are_found_again_without_tracing(changed, tmp_path, monkeypatch, caplog):
    shape = StepShape(2, 2, 2, True, True)
    sampler = build_sampling([], 2)
    first, params = make(tmp_path)
    logits = run(first, params, shape)
    first.sample(logits, sampler, jnp.zeros(2, jnp.int32), np.zeros(2, np.int32))
    assert first.compiles == 2 and len(list(tmp_path.iterdir())) == 2
    again, params = make(tmp_path)
    for name in ("_step", "_sample"):
        monkeypatch.setattr(again, name, None)  # nothing to trace
    np.testing.assert_array_equal(run(again, params, shape), logits)
    again.sample(logits, sampler, jnp.zeros(2, jnp.int32), np.zeros(2, np.int32))
    assert again.temp_bytes(shape) == first.temp_bytes(shape)

    other, params = make(tmp_path, num_pages=9)  # another shape of the pool is another program
    run(other, params, shape)
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        path.write_bytes(b"damaged")
    mended, params = make(tmp_path)
    np.testing.assert_array_equal(run(mended, params, shape), logits)
    assert "cannot be used" in caplog.text


def test_a_directory_that_cannot_be_written_only_costs_time(changed, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    programs, params = make(tmp_path / "file" / "steps")
    run(programs, params, StepShape(2, 2, 2, True, False))
    assert "a compiled step is not kept" in caplog.text


def test_every_sampling_takes_one_of_the_forms_that_are_compiled_ahead():
    known = {SampleShape.of(s) for s in sampling_shapes((2, 4), 300, 100, 256)}
    rng = np.random.default_rng(0)
    for _ in range(50):
        params = SamplingParams(
            temperature=float(rng.integers(2)),
            top_k=int(rng.integers(2)),
            presence_penalty=float(rng.integers(2)),
            logit_bias=dict.fromkeys(range(int(rng.choice([0, 1, 17, 1024]))), 1.0),
            logprobs=rng.choice([None, 0, 3]),
        )
        tokens = [1] * int(rng.integers(1, 100))
        tokens = [1] * int(rng.integers(1, 100))
        row = RowSampling(params=params, tokens=tokens, prompt_len=1, top_logprobs=params.logprobs)
        size = int(rng.choice([4, 300]))
        assert SampleShape.of(with_all_features(build_sampling([row], size), 100, 256)) in known
