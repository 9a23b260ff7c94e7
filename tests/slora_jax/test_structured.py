"""Answers that must have a form: every token is allowed by the grammar, whatever the model wants to say."""

import contextlib
import dataclasses
import json
import random
import re

from byte_tokenizer import byte_tokenizer
import jax
import jsonschema
import numpy as np
import pytest

from slora_jax import Engine, EngineConfig, Request, RequestError, SamplingParams, StructuredOutput, grammar_check
from slora_jax.adapters import random_adapter
from slora_jax.grammar import Grammars, token_masks
from slora_jax.loading import LoadedModel
from slora_jax.loading.gguf import GGUFFile
from slora_jax.loading.gguf_tokenizer import tokenizer_from_gguf
from slora_jax.loading.random import random_params
from slora_jax.memory import page_bytes
from slora_jax.sampling import sample
from slora_jax.sampling_batch import RowSampling, build_sampling
from slora_jax.shapes import named_shape

WORDS = ["red", "green", 'a "quoted" word', "naïve", "日本", "line\nbreak", ""]


def make_engine(tokenizer, vocab_size: int, pages: int) -> Engine:
    config = dataclasses.replace(named_shape("tiny-tied"), vocab_size=vocab_size)
    params = random_params(config, dtype="float32")
    model = LoadedModel(
        config=config, params=params, tokenizer=tokenizer, eos_token_ids=tokenizer.eos_token_ids, name="tiny"
    )
    settings = EngineConfig(
        dtype="float32",
        max_seqs=64,
        max_step_tokens=64,
        seq_buckets=(16, 64),
        token_buckets=(64,),
        compile_cache_dir="",
        page_pool_bytes=pages * page_bytes(config, "float32"),
    )
    adapter = random_adapter(config, 8, ["q", "v"], seed=1, dtype=np.dtype("float32"))
    return Engine(model, settings, {"one": adapter})


@pytest.fixture(scope="module")
def engine():
    with make_engine(byte_tokenizer(), 256, pages=40) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture(scope="module")
def smollm2_engine(smollm2_gguf):
    tokenizer = tokenizer_from_gguf(GGUFFile(smollm2_gguf), model_vocab_size=49152)
    with make_engine(tokenizer, 49152, pages=1000) as engine:
        yield engine


def random_schema(rng: random.Random, depth: int = 0):
    """A schema whose instances are short, so that a model that says anything comes to an end."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["object", "array", "anyOf"] * 2 if depth < 3 else []
    match "object" if depth == 0 else rng.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": rng.randint(1, 8)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-f0-9]{4}$", "^(yes|no)$", r"^\d{2}:\d{2}$"])}
        case "integer":
            low = rng.randint(-500, 500)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 100)}
        case "enum":
            return {"enum": rng.sample([*WORDS, 1, 2.5, None, True], 3)}
        case "const":
            return {"const": rng.choice(WORDS)}
        case "array":
            low = rng.randint(0, 2)
            items = random_schema(rng, depth + 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
        case "object":
            names = rng.sample(["a", "name", "größe", "x y", "items", "n-1"], rng.randint(0 if depth else 1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }
        case kind:
            return {"type": kind}


def ask(engine: Engine, structured: StructuredOutput, **options):
    params = SamplingParams(structured=structured, **(dict(max_tokens=200, temperature=1.0, seed=0) | options))
    return engine.generate([Request("hello", sampling=params)])[0]


def check_schemas(engine: Engine, count: int) -> dict[str, int]:
    """Answers of a random model to random schemas. What ended is valid; what was cut is a beginning of JSON."""
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(count)]
    requests = [
        Request(
            f"hello {i}",
            adapter=rng.choice([None, "one"]),
            sampling=SamplingParams(
                max_tokens=160,
                temperature=5.0 if i < 12 else 0.0,
                seed=i,
                structured=StructuredOutput(json_schema=schema),
            ),
        )
        for i, schema in enumerate(schemas)
    ]
    reasons: dict[str, int] = {}
    outputs = engine.generate(requests[:12]) + engine.generate(requests[12:])  # drawing is slow on a CPU
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.finish_reason is not None
        reasons[output.finish_reason] = reasons.get(output.finish_reason, 0) + 1
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
        else:
            assert output.finish_reason == "length" and output.text.lstrip().startswith("{"), output
    return reasons


def test_200_random_schemas_with_a_real_vocabulary(smollm2_engine):
    reasons = check_schemas(smollm2_engine, 200)
    assert reasons["stop"] >= 190, reasons


def test_random_schemas_with_bytes_as_tokens(engine):
    reasons = check_schemas(engine, 10)
    assert reasons["stop"] >= 7, reasons  # a byte a token: longer answers than those of a real vocabulary


@pytest.mark.parametrize(
    "form, pattern",
    [
        (StructuredOutput(regex=r"[a-c]{3}-\d{2}"), r"[a-c]{3}-\d{2}"),
        (StructuredOutput(regex=r"é+!"), "é+!"),
        (StructuredOutput(choice=["yes", "no", "“maybe”"]), "yes|no|“maybe”"),
        (StructuredOutput(grammar='start: "(" start ")" | "x"'), r"\(*x\)*"),
        (StructuredOutput(grammar='root ::= "a" [0-9] "b"'), r"a\db"),
    ],
)
def test_other_forms(engine, form, pattern):
    for seed in range(5):
        output = ask(engine, form, seed=seed, n=2)
        assert len({c.text for c in output.completions}) <= 2
        for done in output.completions:
            assert done.finish_reason == "stop" and re.fullmatch(pattern, done.text), done


def test_any_object_and_no_endless_white_space(engine):
    biased = {engine.model.tokenizer.encode(" ")[0]: 90.0}
    output = ask(engine, StructuredOutput(json_schema={"type": "array", "items": {"type": "null"}, "maxItems": 2}))
    assert output.finish_reason == "stop" and len(json.loads(output.text)) <= 2
    form = StructuredOutput(json_schema={"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]})
    spaced = ask(engine, form, logit_bias=biased, temperature=0.0, max_tokens=8)
    assert "  " not in spaced.text  # a model that wants nothing but spaces still makes progress
    cut = ask(engine, StructuredOutput(json_object=True), max_tokens=5)
    assert cut.finish_reason == "length" and cut.text.startswith("{")


def test_the_answer_depends_on_its_own_grammar_only(engine):
    forms = [None, StructuredOutput(regex="[a-z]{20}"), StructuredOutput(choice=["left", "right"]), None]
    requests = [
        Request(f"prompt {i}", None if i % 2 else "one", SamplingParams(max_tokens=12, seed=i, structured=form))
        for i, form in enumerate(forms)
    ]
    together = [output.token_ids for output in engine.generate(requests)]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    assert together == alone
    assert requests[0].sampling.structured is None and len(together[0]) == 12


def test_streams_stops_and_log_probabilities(engine):
    params = SamplingParams(max_tokens=50, logprobs=2, structured=StructuredOutput(regex="[ab]{10}"))
    deltas = list(engine.stream(Request("x", sampling=params)))
    output = deltas[-1].output
    assert "".join(d.text for d in deltas) == output.text and len(output.text) == 10
    assert len(output.completions[0].logprobs) == 10
    cut = ask(engine, StructuredOutput(regex="a{10}"), stop="aaa")
    assert (cut.text, cut.finish_reason) == ("", "stop")
    short = ask(engine, StructuredOutput(regex="a{10}"), max_tokens=4)
    assert (short.text, short.finish_reason) == ("aaaa", "length")
    exact = ask(engine, StructuredOutput(regex="a{4}"), max_tokens=4)
    assert exact.finish_reason == "stop"  # complete is complete, even at the limit


def test_an_end_token_is_allowed_only_where_the_grammar_may_end(smollm2_engine):
    eos = smollm2_engine.model.eos_token_ids[0]
    for ignore in (False, True):
        output = ask(smollm2_engine, StructuredOutput(regex="x{3}y*"), logit_bias={eos: 100.0}, ignore_eos=ignore)
        assert (output.text, output.finish_reason, output.token_ids[-1]) == ("xxx", "stop", eos)


def test_many_answers_with_few_pages_are_computed_again_and_stay_valid(engine):
    params = SamplingParams(max_tokens=120, temperature=1.0, structured=StructuredOutput(regex="[0-9]{100}"))
    before = engine.stats()["preemptions"]
    outputs = engine.generate([Request("hello", sampling=dataclasses.replace(params, seed=i)) for i in range(8)])
    assert all(re.fullmatch("[0-9]{100}", o.text) for o in outputs)
    assert engine.stats()["preemptions"] > before


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
        ({"regex": ""}, "regex is empty"),
        ({"choice": []}, "1 to 1024"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": "abc"}, "list of strings"),
        ({"regex": "a" * 70_000}, "65536 are allowed"),
        ({"json_schema": {"a": {1, 2}}}, "not JSON"),
        ({"json_schema": {"a": float("nan")}}, "not JSON"),
    ],
)
def test_a_form_that_is_none_is_refused_at_once(fields, words):
    with pytest.raises(RequestError, match=words):
        StructuredOutput(**fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"json_schema": {"type": "frob"}}, "json_schema: Invalid type"),
        ({"json_schema": {"not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "json_schema"),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "json_schema"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[" * 30_000}, "json_schema"),
        ({"json_schema": "\ud800"}, "json_schema"),
        ({"regex": "("}, "regex: "),
        ({"regex": "(?=a)"}, "regex: "),
        ({"regex": "(|)"}, "no text but the empty one"),
        ({"grammar": "start: nothing"}, "grammar: "),
        ({"grammar": "%import /etc/passwd"}, "grammar: "),
        ({"grammar": "root ::= (((((("}, "grammar: "),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_and_nothing_is_queued(engine, fields, words):
    with pytest.raises(RequestError, match=words) as caught:
        ask(engine, StructuredOutput(**fields))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert engine.list_requests() == []


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_is_served(engine, monkeypatch):
    monkeypatch.setattr(grammar_check, "_SECONDS", 0.5)
    for _ in range(2):
        with pytest.raises(RequestError, match="too long or too much memory"):
            ask(engine, StructuredOutput(json_schema={"type": "integer", "multipleOf": 7**9}))
    monkeypatch.undo()
    assert ask(engine, StructuredOutput(choice=["good", "fine"])).text in ("good", "fine")


def test_a_model_without_tokenizer_has_no_forms(engine):
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Grammars(None, (), 256).start(StructuredOutput(regex="a"))


def test_masks_on_the_device():
    with contextlib.closing(Grammars(byte_tokenizer(), (), 256)) as grammars:
        constraint, another = grammars.start(StructuredOutput(regex="[k-m]"), 2)
    plain = RowSampling(params=SamplingParams())
    held = [dataclasses.replace(plain, constraint=c) for c in (constraint, another)]
    logits = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    masks = token_masks({1: constraint, 2: another}, 4)
    assert masks.shape == (4, 8) and (masks[[0, 3]] == 0xFFFFFFFF).all()
    allowed = [byte_tokenizer().encode(c)[0] for c in "klm"]
    bits = np.unpackbits(masks[1].view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == sorted(allowed)
    tokens = jax.jit(sample)(logits, build_sampling([plain, *held], 4)).tokens
    assert int(tokens[0]) == logits[0].argmax()
    for row in (1, 2):
        assert int(tokens[row]) == max(allowed, key=lambda t: logits[row, t])
    assert build_sampling([plain], 4).allowed.shape == (4, 0)  # costs nothing where nobody asks for it
