"""Structured output through the API: every field that asks for it, streamed and not, with adapters."""

import asyncio
import json
import re

import jsonschema
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
FORMS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA, "strict": True}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    {"guided_json": SCHEMA},
]
LINES = [
    {"structured_outputs": {"regex": "[a-c]{4}"}},
    {"structured_outputs": {"grammar": 'start: "a" start | "b"'}, "seed": 3},
    {"guided_choice": ["a", "b", "cc"]},
    {"guided_regex": "b+c"},
    {"guided_grammar": 'root ::= "c" [ab]'},
]


def chunks(text: str) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]


@pytest.mark.parametrize("form", FORMS)
def test_a_schema_is_kept_in_chats(serving, form):
    async def main():
        async with serving() as (client, _):
            body = {"messages": [{"role": "user", "content": "weather?"}], "max_tokens": 150, "n": 2, "seed": 1} | form
            for model in ("tiny", "one"):
                answer = (await client.post("/v1/chat/completions", json=body | {"model": model})).json()
                streamed = await client.post("/v1/chat/completions", json=body | {"model": model, "stream": True})
                for choice in answer["choices"]:
                    assert choice["finish_reason"] == "stop", choice
                    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
                    pieces = [c for e in chunks(streamed.text) for c in e["choices"] if c["index"] == choice["index"]]
                    text = "".join(c["delta"].get("content") or "" for c in pieces)
                    assert text == choice["message"]["content"]

    asyncio.run(main())


@pytest.mark.parametrize("form", LINES)
def test_other_forms_are_kept_in_completions(serving, form):
    async def main():
        async with serving() as (client, _):
            body = {"model": "two", "prompt": ["hello", "you"], "max_tokens": 40, "seed": 1} | form
            return (await client.post("/v1/completions", json=body)).json()["choices"]

    for choice in asyncio.run(main()):
        assert choice["finish_reason"] in ("stop", "length") and re.fullmatch("[abc]+", choice["text"])


def test_any_object_and_plain_text(serving):
    async def main():
        async with serving() as (client, _):
            body = {"model": "one", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
            bodies = [body | {"response_format": {"type": kind}} for kind in ("json_object", "text")]
            return [(await client.post("/v1/chat/completions", json=each)).json() for each in bodies]

    some_object, text = asyncio.run(main())
    assert some_object["choices"][0]["message"]["content"].startswith("{")
    assert text["choices"][0]["finish_reason"] == "length"
