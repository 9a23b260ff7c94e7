"""Small steps that say their adapters are few: when they do, and what is compiled for it. Answers stay the same."""

import dataclasses

from engines import PROMPT, config, greedy
import jax
from jax import numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FEW_TILE_TOKENS, FEW_TOKENS
from sharding import Layout
from slora_jax import Engine, EngineConfig, Request, SloraError, make_forward, model
from slora_jax.adapter_pages import adapter_owner
from slora_jax.adapters import random_adapter
from slora_jax.batch_builder import BatchBuilder
from slora_jax.buckets import Buckets
from slora_jax.cli.options import engine_options
from slora_jax.cli.parser import parse_arguments
from slora_jax.model_config import param_specs
from slora_jax.page_pool import PagePool
from slora_jax.placement import new_state
from slora_jax.program_shapes import StepOptions, StepShape
from slora_jax.programs import Programs
from slora_jax.seats import sequence_owner
from slora_jax.sequence import AdapterUse, Chunk, Sequence
from slora_jax.shapes import named_shape

CONFIG = named_shape("tiny-gqa")
PAGES = 400
BUCKETS = Buckets(seqs=(1, 2, 4, 8), tokens=(FEW_TOKENS, FEW_TOKENS + 8))


def by_layer(*ranks):
    """An adapter on q, k and v with these ranks in the first layer, and in the second the same in reverse."""
    table = np.zeros((CONFIG.num_layers, 7), np.int32)
    table[0, : len(ranks)], table[1, : len(ranks)] = ranks, ranks[::-1]
    return random_adapter(CONFIG, table)


def builder(few_adapters=True, **options):
    return BatchBuilder(CONFIG.geometry, BUCKETS, PAGES, 96, few_adapters=few_adapters, **options)


def build(builder, chunks, pool=None):
    """The batch of chunks, each an adapter, or None, and how many tokens."""
    pool = pool or PagePool(PAGES)
    adapters = {adapter.digest: adapter for adapter, _ in chunks if adapter is not None}
    for digest, adapter in adapters.items():
        if not pool.holds(adapter_owner(digest)):
            pool.allocate(adapter_owner(digest), adapter.num_pages(CONFIG.geometry))
    made = []
    for i, (adapter, length) in enumerate(chunks):
        use = AdapterUse(adapter.digest, 1) if adapter is not None else None
        seq = Sequence(seq_id=i, tokens=[1] * length, prompt_len=length, max_tokens=1, adapter=use)
        pool.allocate(sequence_owner(seq), -(-length // 16))
        made.append(Chunk(seq, 0, length))
    batch, _ = builder.build(made, pool, adapters)
    for chunk in made:
        pool.release(sequence_owner(chunk.seq))
    return batch


SMALL, TWENTY, HALF, MOST, MORE = (
    random_adapter(CONFIG, rank, ["q", "up"], seed=rank) for rank in (8, 20, 64, 128, 129)
)


@pytest.mark.parametrize(
    ("chunks", "few"),
    [
        pytest.param([(HALF, 1), (random_adapter(CONFIG, 57, ["q"]), 1)], True, id="at the bound"),
        pytest.param([(HALF, 1), (random_adapter(CONFIG, 65, ["q"]), 1)], False, id="over it"),
        pytest.param([(MOST, 1), (None, 1)], True, id="one adapter at the bound, and the base model"),
        pytest.param([(MORE, 1), (None, 1)], False, id="one adapter over it"),
        pytest.param([(MOST, 1), (random_adapter(CONFIG, 128, ["k"]), 1)], True, id="on different modules"),
        pytest.param([(by_layer(8, 0, 64), 1), (by_layer(64, 0, 64), 1)], True, id="the largest layers, at the bound"),
        pytest.param([(by_layer(8, 0, 72), 1), (by_layer(64, 0, 0), 1)], False, id="the largest layers, over it"),
        pytest.param([(MOST, 1), (MOST, 1)], True, id="two sequences of one segment"),
        pytest.param([(HALF, 1), (None, 1), (HALF, 1)], True, id="two segments of one adapter, at the bound"),
        pytest.param([(HALF, 1), (SMALL, 1), (HALF, 1)], False, id="two segments of one adapter, over it"),
        pytest.param([(SMALL, 1), (None, 1)] * 4, True, id="each as 16, at most"),
        pytest.param([(TWENTY, 1), (None, 1)] * 4, True, id="each as 32, at the bound"),
        pytest.param([(TWENTY, 1), (SMALL, 1)] * 4, False, id="as 32 and as 16, over it"),
        pytest.param([(None, 1), (None, 1)], False, id="no adapters"),
        pytest.param([(SMALL, 1)], False, id="a single token"),
        pytest.param([(SMALL, FEW_TOKENS)], True, id="as many tokens as can be"),
        pytest.param([(SMALL, FEW_TOKENS - 9), (HALF, 8)], True, id="prompts that are padded to so many"),
        pytest.param([(SMALL, FEW_TOKENS + 1)], False, id="more tokens"),
    ],
)
def test_steps_say_that_their_adapters_are_few_where_it_holds(chunks, few):
    batch = build(builder(), chunks)
    assert batch.few_adapters is few and StepShape.of(batch).few is few
    assert not build(builder(few_adapters=False), chunks).few_adapters
    deterministic = builder(deterministic=True)
    assert not deterministic.few_adapters and not build(deterministic, chunks).few_adapters


def test_rows_that_changed_hands_count_with_their_present_adapter():
    made = BatchBuilder(CONFIG.geometry, Buckets(seqs=(2,), tokens=(8,)), PAGES, 96, few_adapters=True)
    pool, large = PagePool(PAGES), random_adapter(CONFIG, 72, ["q"])
    steps = [(HALF, SMALL), (HALF, large), (HALF, SMALL), (large, None), (large, HALF), (HALF, None)]
    found = [build(made, [(adapter, 1) for adapter in step], pool).few_adapters for step in steps]
    assert found == [True, False, True, True, False, True]


def test_not_on_several_devices():
    layout = Layout(devices=2, geometry=CONFIG.geometry, vocab_size=CONFIG.vocab_size, lora=("comm-free",) * 4)
    assert not builder(layout=layout).few_adapters


def shapes(few_adapters=True, deterministic=False, **kinds):
    options = StepOptions(config=CONFIG, dtype=jnp.dtype("float32"), max_rank=8, implementation="xla", loop="scan")
    programs = Programs(options, {}, builder(few_adapters, deterministic=deterministic))
    return programs.step_shapes(**dict(adapters=True, embeddings=True) | kinds)


def test_small_steps_with_adapters_have_two_shapes():
    found, plain = shapes(), shapes(few_adapters=False)
    few = [shape for shape in found if shape.few]
    assert not any(shape.few for shape in plain) and [shape for shape in found if not shape.few] == plain
    small = [shape for shape in plain if shape.use_adapters and 2 <= shape.tokens <= FEW_TOKENS]
    assert {(shape.tokens, shape.hidden) for shape in small} == {
        (2, False),
        (4, False),
        (8, False),
        (64, False),
        (64, True),
    }
    assert len(set(found)) == len(found) and set(few) == {dataclasses.replace(shape, few=True) for shape in small}
    assert not any(shape.few for shape in shapes(adapters=False))
    assert shapes(deterministic=True) == shapes(few_adapters=False, deterministic=True)


def test_steps_of_256_tokens_have_so_too_where_outputs_are_many():
    wide = dataclasses.replace(CONFIG, mlp_size=64 * 141).geometry
    of_wide = BatchBuilder(wide, BUCKETS, PAGES, 96, few_adapters=True)
    sizes = [n for n in range(2, 400) if of_wide.may_promise_few(n)]
    assert sizes == [*range(2, FEW_TOKENS + 1), FEW_TILE_TOKENS]
    assert not builder().may_promise_few(FEW_TILE_TOKENS)


def test_a_shape_and_its_padding_agree():
    made = builder()
    batch = made.padding(8, 8, decode_only=True, use_adapters=True, few_adapters=True)
    shape = StepShape(8, 8, 8, True, True, few=True)
    assert StepShape.of(batch) == shape and str(shape) == "decode step of 8 tokens with few adapters"


@pytest.mark.parametrize("few", [False, True])
def test_the_kernels_are_told(monkeypatch, few):
    told = []

    def record(name):
        call = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda *args, **kw: (told.append((name, kw["few_adapters"])), call(*args, **kw))[1]
        )

    record("lora_matmul")
    record("lora_matmul_silu_mul")
    batch = builder().padding(8, 8, decode_only=True, use_adapters=True, few_adapters=few)
    params = {name: jnp.zeros(spec.shape) for name, spec in param_specs(CONFIG).items()}
    forward = make_forward(CONFIG, dtype=jnp.float32, loop="scan")
    jax.eval_shape(forward, params, new_state(CONFIG, PAGES, np.dtype("float32")), batch)
    assert set(told) == {("lora_matmul", few), ("lora_matmul_silu_mul", few)}


def shapes_from_now_on(engine):
    """A list that the shapes of the engine's steps will be appended to."""
    programs, found = engine._core.runner.programs, []
    forward = programs.forward
    programs.forward = lambda *args: (found.append(StepShape.of(args[-1])), forward(*args))[1]
    return found


def test_answers_are_the_same_and_nothing_is_compiled_while_serving():
    base, settings = config(max_model_len=64, max_lora_rank=128, warm_up="greedy")
    options = dict(targets=["q", "down"], scale=0.5)
    adapters = {f"r{rank}": random_adapter(base.config, rank, seed=rank, **options) for rank in (8, 12, 32, 96)}
    requests = [
        Request(None, name, greedy(9), [*PROMPT, i])
        for i, name in enumerate(["r8", "r12", None, "r32", "r8", "r96", "r12"])
    ]
    answers = []
    for few in (False, True):
        with Engine(base, dataclasses.replace(settings, few_adapters=few), adapters) as engine:
            steps = shapes_from_now_on(engine)
            answers.append([o.token_ids for some in (requests, requests[:5]) for o in engine.generate(some)])
            assert engine.stats()["compiles"] == 0
        kinds = {(shape.decode_only, shape.few) for shape in steps if shape.use_adapters}
        # all seven take 192 ranks, the first five 64
        assert kinds == {(decode, kind) for decode in (False, True) for kind in {False, few}}
    assert answers[0] == answers[1]


def test_what_excludes_each_other_is_named():
    with pytest.raises(SloraError, match="few_adapters and deterministic"):
        EngineConfig(few_adapters=True, deterministic=True)
    with pytest.raises(SloraError, match="few_adapters needs tensor_parallel 1, not 2"):
        EngineConfig(few_adapters=True, tensor_parallel=2)
    EngineConfig(few_adapters=False, deterministic=True, tensor_parallel=2)


@pytest.mark.parametrize(("implementation", "few"), [("auto", True), ("xla", False)])
def test_an_engine_has_the_steps_that_its_kernels_take_and_one_that_takes_a_runner_over_leaves_them(
    implementation, few
):
    base, settings = config()
    settings = dataclasses.replace(settings, few_adapters=True, implementation=implementation)
    with Engine(base, settings, {"a": SMALL}) as engine:
        runner = engine._core.runner
    with Engine(base, dataclasses.replace(settings, few_adapters=False), {"a": SMALL}, runner=runner):
        assert runner.builder.few_adapters is few


@pytest.mark.parametrize(("flags", "few"), [([], False), (["--few-adapters"], True)])
def test_the_command_line(flags, few):
    args = parse_arguments(["generate", "random:tiny-gqa", "hi", *flags])
    assert EngineConfig(**engine_options(args)).few_adapters is few
