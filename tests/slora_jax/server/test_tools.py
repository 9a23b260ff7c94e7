"""Tool calls: found in text of every format however it is cut in pieces, and forced where the caller asks for it."""

import asyncio
import dataclasses
import json

from hypothesis import given
from hypothesis import strategies as st
import jsonschema
import pytest

from slora_jax import StructuredOutput
from slora_jax.server import routes_openai
from slora_jax.server.tools import ToolParser, format_of

CALL = '{"name": "add", "arguments": {"a": 1, "b": "}</x>"}}'
CALL_SUB = '{"name": "sub", "arguments": {}}'
UNKNOWN = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": "}</x>"}}'
ARGUMENTS = '{"a": 1, "b": "}</x>"}'
ADD, SUB = ("add", ARGUMENTS), ("sub", "{}")

CASES = [
    ("hermes", "Hello <tool> there", "Hello <tool> there", []),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [ADD]),
    ("hermes", f"\nLet me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL_SUB}</tool_call>\n",
     "Let me see.\n", [ADD, SUB]),
    ("hermes", f"<tool_call>{CALL}", "", [ADD]),  # some models leave the end out
    ("hermes", "<tool_call>{bad}</tool_call> so", "<tool_call>{bad}</tool_call> so", []),
    ("hermes", UNKNOWN, UNKNOWN, []),
    ("hermes", '<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    ("hermes", "a < b <tool_ca", "a < b <tool_ca", []),
    ("llama3", LLAMA, "", [ADD]),
    ("llama3", f'<|python_tag|>{LLAMA}; {{"name": "sub", "parameters": {{}}}}', "", [ADD, SUB]),
    ("llama3", "Just text with {braces}", "Just text with {braces}", []),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", '{"name": "add", ', '{"name": "add", ', []),
    ("mistral", f"[TOOL_CALLS][{CALL}]", "", [ADD]),
    ("mistral", f'[TOOL_CALLS] [{CALL}, {{"name": "sub", "arguments": {{}}}}]', "", [ADD, SUB]),
    ("mistral", f"Sure.[TOOL_CALLS]add[ARGS]{ARGUMENTS}[TOOL_CALLS]sub{{}}", "Sure.", [ADD, SUB]),
    ("mistral", "[TOOL_CALLS]nothing", "[TOOL_CALLS]nothing", []),
    ("mistral", "no [TOOL] here", "no [TOOL] here", []),
    ("forced", f'[{CALL}, {{"name": "sub", "arguments": {{}}}}]', "", [ADD, SUB]),
    ("forced", f"[{CALL[:-2]}", f"[{CALL[:-2]}", []),
]  # fmt: skip


def parse(form, pieces):
    parser = ToolParser(form, ["add", "sub"])
    said, calls = "", []
    for i, piece in enumerate(pieces):
        text, found = parser.push(piece, final=i == len(pieces) - 1)
        said, calls = said + text, calls + found
    return said, [(c.name, c.arguments) for c in calls]


@pytest.mark.parametrize("form, text, said, calls", CASES)
def test_calls_are_found_however_the_text_is_cut(form, text, said, calls):
    assert parse(form, [text]) == (said, calls)
    assert parse(form, [*text, ""]) == (said, calls)
    for at in range(len(text)):
        assert parse(form, [text[:at], text[at:]]) == (said, calls), at


ODD = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", CALL, LLAMA]
ODD += ["[", "]", "add", " ", ";", "x", "{", "}"]


@given(st.sampled_from(["hermes", "llama3", "mistral", "forced"]), st.lists(st.sampled_from(ODD), max_size=12))
def test_odd_texts_neither_fail_nor_lose_anything(form, parts):
    text = "".join(parts)
    whole = parse(form, [text])
    assert parse(form, [*text, ""]) == whole
    if not whole[1]:
        assert whole[0].strip() == text.strip()


def test_formats_are_known_by_their_templates():
    assert format_of("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert format_of("{% if tools %}[TOOL_CALLS]{% endif %}") == "mistral"
    assert format_of('{% if tools %}{"name": ..., "parameters": ...}{% endif %}') == "llama3"
    assert format_of("{{ messages }}") is None and format_of("<tool_call>") is None


TEMPLATE = """{% if tools %}Call with <tool_call>: {{ tools | tojson }}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}
{% endfor %}assistant:"""
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "Oslo"]}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
NOW = {"type": "function", "function": {"name": "now", "parameters": NOTHING}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}, NOW]
BODY = {"model": "one", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "max_tokens": 150, "seed": 2}


async def both(client, **body) -> tuple[dict, dict, str]:
    """The message of an answer, the same put together from a stream, and the finish reason."""
    whole = (await client.post("/v1/chat/completions", json=BODY | body)).json()["choices"][0]
    text = (await client.post("/v1/chat/completions", json=BODY | body | {"stream": True})).text
    said, calls, reason = "", {}, None
    for line in text.split("\n\n")[1:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        said += choice["delta"].get("content") or ""
        reason = choice["finish_reason"] or reason
        for call in choice["delta"].get("tool_calls", ()):
            calls[call["index"]] = call["function"]
    assert reason == whole["finish_reason"]
    message = whole["message"]
    assert said == (message["content"] or "")
    assert [calls[i] for i in range(len(calls))] == [c["function"] for c in message.get("tool_calls", ())]
    return message, calls, reason


def test_a_call_can_be_required(serving):
    async def main():
        async with serving() as (client, _):
            return await both(client, tool_choice="required")

    message, _, reason = asyncio.run(main())
    assert reason == "tool_calls" and message["content"] is None
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    assert len(message["tool_calls"]) >= 1
    for call in message["tool_calls"]:
        assert len(call["id"]) == 9 and call["type"] == "function"
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])


def test_a_function_can_be_named(serving):
    async def main():
        async with serving() as (client, _):
            return await both(client, tool_choice={"type": "function", "function": {"name": "weather"}})

    message, _, reason = asyncio.run(main())
    assert reason == "stop"
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)


def test_calls_are_found_in_what_the_model_says(serving, engine, monkeypatch):
    tokenizer = engine.model.tokenizer
    monkeypatch.setattr(tokenizer._fast, "chat_template", TEMPLATE)
    chosen = routes_openai.choose_tools

    def saying(body, template):  # the random model is made to say what a good one would
        tools = chosen(body, template)
        said = r'Sure\. <tool_call>\{"name": "now", "arguments": \{\}\}</tool_call>'
        return tools and dataclasses.replace(tools, structured=StructuredOutput(regex=said))

    monkeypatch.setattr(routes_openai, "choose_tools", saying)
    said = {"id": "123456789", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [said]},
        {"role": "tool", "tool_call_id": "123456789", "content": "noon"},
    ]

    async def main():
        async with serving() as (client, _):
            found = await both(client, messages=history, tools=[NOW])
            body = BODY | {"tool_choice": "none", "max_tokens": 3}
            return found, (await client.post("/v1/chat/completions", json=body)).json()

    (message, _, reason), silent = asyncio.run(main())
    assert (message["content"], reason) == ("Sure. ", "tool_calls")
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "now", "arguments": "{}"}]
    assert "tool_calls" not in silent["choices"][0]["message"]
    rendered = tokenizer.render([{"role": "user", "content": "?"}], tools=TOOLS)
    assert rendered.startswith("Call with <tool_call>: [{") and "weather" in rendered
