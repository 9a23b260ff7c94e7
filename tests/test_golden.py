"""The whole path on a real model: SmolLM2-135M-Instruct and six adapters trained with PEFT, against PEFT's own answers.

The smallest gap between the reference's two best logits is 0.005, so a correct float32 implementation gives the very
same tokens.
"""

from golden import ADAPTERS, GOLDEN, ROWS, make_engine, requests
import numpy as np
import pytest
from steps import prompt_logits

from slora_jax import Request, SamplingParams, read_adapter
from slora_jax.loading import load_model, save_orbax

BUCKETS = dict(seq_buckets=(1, 64), token_buckets=(64, 256))  # few programs to compile


def check(outputs) -> None:
    for (name, row), output in zip(ROWS, outputs, strict=True):
        got, want = output.token_ids, row["output_token_ids"]
        if got != want:
            step = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
            assert row["gaps"][step] < 1e-3, f"{name or 'base'}/{row['name']} differs at step {step}: {got} {want}"


@pytest.fixture(scope="module")
def engine(smollm2_gguf):
    with make_engine(smollm2_gguf, **BUCKETS) as engine:
        yield engine


@pytest.fixture(scope="module")
def mixed(engine):
    return engine.generate(requests())


def test_base_and_all_adapters_in_one_mixed_batch(mixed, engine):
    check(mixed)
    engine.check_integrity()


def test_logits_of_the_first_token(engine):
    """All prompts at once, in one step."""
    config = engine.model.config
    adapters = {name: read_adapter(path, config) for name, path in ADAPTERS.items()} | {None: None}
    prompts = [(row["prompt_token_ids"], adapters[name]) for name, row in ROWS]
    logits = prompt_logits(config, engine.model.params, prompts, last_only=True, loop="scan")
    for (_, row), got in zip(ROWS, logits, strict=True):
        ids, want = np.array(row["first_top8"]).T
        assert np.argsort(-got[0])[:8].tolist() == ids.astype(int).tolist()
        np.testing.assert_allclose(got[0, ids.astype(int)], want, atol=2e-3)


@pytest.mark.timeout(1500)  # some 1,800 steps
def test_one_at_a_time_gives_the_same(mixed, engine):
    alone = [engine.generate([r])[0] for r in requests()]
    assert [o.token_ids for o in alone] == [o.token_ids for o in mixed]


def test_base_requests_in_a_mixed_batch_get_exactly_the_base_model(engine):
    """Bit for bit: the same step shapes, with and without adapters in the other half of the batch."""
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=8)
    base = [Request(None, None, params, row["prompt_token_ids"]) for row in GOLDEN["base"][:4]]
    adapted = [
        Request(None, name, params, GOLDEN["base"][4 + i]["prompt_token_ids"]) for i, name in enumerate(ADAPTERS)
    ]
    plain = [Request(None, None, params, r.prompt_token_ids) for r in adapted]
    for others in (plain, adapted):  # so that both runs below find all prompts in the prefix cache
        engine.generate(base + others)
    among_base = engine.generate(base + plain)[: len(base)]
    among_adapters = engine.generate(base + adapted)[: len(base)]
    assert [o.completions[0].logprobs for o in among_base] == [o.completions[0].logprobs for o in among_adapters]


def test_text_ends_where_the_reference_ends(engine):
    rows = [(name, row) for name, row in ROWS if row["eos_at"] is not None]
    outputs = engine.generate(
        [Request(None, name, SamplingParams(max_tokens=32), row["prompt_token_ids"]) for name, row in rows]
    )
    for (_, row), output in zip(rows, outputs, strict=True):
        assert output.token_ids == row["output_token_ids"][: row["eos_at"] + 1]
        assert output.finish_reason == "stop" and output.completions[0].stop_reason == output.token_ids[-1]


def test_chat_messages_and_text_prompts_give_the_reference_prompts(engine):
    for _, row in ROWS:
        if row["chat"]:
            request = Request(messages=[{"role": "user", "content": row["user_text"]}])
        else:
            request = Request(row["prompt_text"])
        assert engine.prompt_ids(request) == row["prompt_token_ids"]


def test_stop_strings_and_streaming(engine):
    _, row = next((n, r) for n, r in ROWS if n is None and " the " in r["output_text"])
    params = SamplingParams(max_tokens=32, ignore_eos=True, stop=" the ")
    request = Request(None, None, params, row["prompt_token_ids"])
    deltas = list(engine.stream(request))
    text = "".join(d.text for d in deltas)
    assert text == row["output_text"][: row["output_text"].index(" the ")]
    assert deltas[-1].output.text == text and deltas[-1].output.completions[0].stop_reason == " the "


def test_the_same_through_an_orbax_checkpoint(tmp_path, smollm2_gguf):
    loaded = load_model(str(smollm2_gguf), dtype="float32", weight_dtype="bfloat16")
    save_orbax(
        tmp_path / "smol", loaded.config, loaded.params, tokenizer=loaded.tokenizer, eos_token_ids=loaded.eos_token_ids
    )
    del loaded
    with make_engine(str(tmp_path / "smol"), **BUCKETS) as engine:
        check(engine.generate(requests()))
