"""Adapters added, replaced, removed and asked for at random, with room for two: whose contents every answer was of."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest
from tier_engines import ADAPTERS, MODEL, PAGE, PAGES, ask, config, settle

from slora_jax import Engine
from slora_jax.adapters import save_adapter

OPERATIONS = st.one_of(
    st.tuples(st.just("ask"), st.lists(st.tuples(st.integers(0, 4), st.integers(1, 70)), min_size=1, max_size=6)),
    st.tuples(st.just("add"), st.integers(0, 3), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("files"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.integers(0, 3)),
    st.tuples(st.just("prefetch"), st.integers(0, 3)),
    st.tuples(st.just("abort"), st.integers(0, 3)),
)


EVERYTHING = [
    *(("add", i, i, i % 2 == 0) for i in range(4)),
    ("ask", [(i, 20 * i + 1) for i in range(5)]),
    ("prefetch", 3),
    ("add", 3, 2, True),
    ("ask", [(3, 50), (2, 17), (0, 33), (1, 64)]),
    ("abort", 2),
    ("remove", 0),
    ("ask", [(i, 10) for i in (1, 2, 3)]),
]


@settings(max_examples=12, deadline=None)
@example(operations=EVERYTHING)
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=12))
def test_whatever_happens_every_answer_is_that_of_the_contents_its_name_had(
    operations, small_engine, alone, tmp_path_factory
):
    """Adds, replacements, removals, requests and aborts at random, with pages and host memory for two adapters."""
    engine = small_engine
    root = tmp_path_factory.mktemp("adapters")
    means: dict[str, int] = {}  # name -> which adapter
    started = []
    for operation in operations:
        match operation:
            case ("ask", wanted):
                for index, length in wanted:
                    name = None if index == 4 else f"n{index}"
                    if name is None or name in means:
                        prompt = [(7 * t + length) % 256 for t in range(length)]
                        which = -1 if name is None else means[name]
                        started.append((engine.stream(ask(name, prompt)), which, prompt))
            case ("add", index, which, lazy):
                name = f"n{index}"
                path = save_adapter(ADAPTERS[which], root / f"{name}-{which}-{len(started)}")
                engine.add_adapter(name, path if lazy else ADAPTERS[which], lazy=lazy)
                means[name] = which
            case ("files", index, which):  # others in the place of those that were added, which nobody was told
                save_adapter(ADAPTERS[which], root / f"n{index}-0-0")
            case ("remove", index):
                if means.pop(f"n{index}", None) is not None:
                    try:
                        engine.remove_adapter(f"n{index}", timeout=0)
                    except TimeoutError:
                        pass
            case ("prefetch", index):
                if f"n{index}" in means:
                    engine.prefetch_adapter(f"n{index}")
            case ("abort", index):
                if index < len(started):
                    started.pop(index)[0].close()
        tier = engine.stats()["adapter_tiers"]["host"]
        assert tier["bytes"] <= tier["budget"]
        engine.check_integrity()
    for stream, which, prompt in started:
        output = list(stream)[-1].output
        if output.finish_reason == "error":
            assert "have changed since the adapter was added" in output.completions[0].error
            continue
        assert output.token_ids == alone(which, prompt)
        assert output.adapter_digest == (None if which < 0 else ADAPTERS[which].digest)
    for name in means:
        engine.remove_adapter(name)
    settle(lambda: not engine.list_requests() and engine.stats()["adapter_tiers"]["host"]["bytes"] == 0)
    used = engine.stats()["pages"]
    assert used["kv"] == used["adapter"] == used["idle_adapter"] == 0
    engine.check_integrity()


@pytest.fixture(scope="module")
def small_engine():
    pages = PAGES[3] + PAGES[2] + 12
    budget = (PAGES[3] + PAGES[1]) * PAGE
    options = dict(host_adapter_bytes=budget, adapter_chunk_bytes=2 * PAGE, adapter_step_bytes=4 * PAGE)
    with Engine(MODEL, config(pages=pages, **options)) as engine:
        yield engine
        stats = engine.stats()["adapter_tiers"]
        assert stats["host"]["evictions"] > 0 and stats["pages"]["evictions"] > 0


@pytest.fixture(scope="module")
def alone():
    """Answers of an engine with space for everything, one request at a time."""
    names = {f"a{i}": a for i, a in enumerate(ADAPTERS)}
    known = {}
    with Engine(MODEL, config(), names) as engine:

        def answer(which, prompt):
            key = which, len(prompt)
            if key not in known:
                known[key] = engine.generate([ask(None if which < 0 else f"a{which}", prompt)])[0].token_ids
            return known[key]

        yield answer
