"""Pieces that are written without a task: what they look like, when they are, and that they are the same answers."""

import contextlib
import http.client
import json
from types import SimpleNamespace

import pytest

from slora_jax.requests import Delta
from slora_jax.server.event_template import EventTemplate
from slora_jax.server.events import event
from slora_jax.server.merging import merged
from slora_jax.server.openai_format import ChatFormat, CompletionFormat
from slora_jax.server.protocol import BodyWriter

NASTY = ["", "a", '"\\\n', "\0", "[0]", "é 🙂", "</script>"]


def plain(text: str, tokens=(7,), index: int = 0, **fields) -> Delta:
    return Delta("r", index, text, tokens, **fields)


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("usage_follows", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_filled_in_events_are_those_that_are_written_whole(chat, usage_follows, token_ids):
    common = ("id", 'model "\0" [0]', None, token_ids, usage_follows)
    form = ChatFormat(*common, None) if chat else CompletionFormat(*common, 2, None, False)
    outputs = [SimpleNamespace(adapter_digest="d", completions=[]) for _ in range(2)]
    assert form.plain(1, plain("a", index=1)) is None  # nothing of this choice was written yet
    list(form.events([(1, plain("a", index=1))], outputs))
    for text in NASTY:
        for tokens in ((1,), (0, 31_999)):
            piece = plain(text, tokens, index=1)
            chunk = form.chunk(1, piece, outputs[1])
            found = form.plain(1, piece)
            if found is None:  # chat's tokens without text have another form
                assert chat and token_ids and not text
                continue
            assert found == (event(chunk | ({"usage": None} if usage_follows else {})) if chunk else b"")
    assert form.plain(0, plain("a", index=1)) is None and form.plain(1, plain("a")) is None
    assert form.plain(1, plain("a", index=1, finish_reason="length")) is None
    assert form.plain(1, plain("a", index=1, logprobs=[])) is None


def test_a_template_finds_its_places_behind_whatever_a_caller_named():
    template = EventTemplate(event({"model": "\0[0]", "text": EventTemplate.TEXT, "ids": list(EventTemplate.TOKENS)}))
    assert template.fill("\0", (0, 1)) == event({"model": "\0[0]", "text": "\0", "ids": [0, 1]})


def test_pieces_that_gathered_become_one_a_choice():
    end = plain("c", (3,), finish_reason="length")
    pieces = [(0, plain("a", (1,))), (1, plain("x")), (0, plain("b", (2,))), (0, plain("y", index=1)), (0, end)]
    assert merged(pieces) == [
        (0, plain("abc", (1, 2, 3), finish_reason="length")),
        (1, plain("x")),
        (0, plain("y", index=1)),
    ]
    apart = [(0, plain("a")), (0, plain("b", logprobs=[])), (0, plain("", (), finish_reason="abort"))]
    assert merged(apart) == apart and merged(apart[:1]) == apart[:1]


def test_bodies_are_written_only_to_who_keeps_up_with_a_response_that_runs():
    flow = SimpleNamespace(write_paused=False)
    cycle = SimpleNamespace(response_started=True, response_complete=False, disconnected=False, flow=flow)
    writer = BodyWriter(cycle)
    assert writer.ready()
    for place, name in ((cycle, "response_complete"), (cycle, "disconnected"), (flow, "write_paused")):
        setattr(place, name, True)
        assert not writer.ready()
        setattr(place, name, False)
    cycle.response_started = False
    assert not writer.ready()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("version", [11, 10])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_streams_are_the_whole_answer(running, monkeypatch, path, version, fails):
    """Over a socket, where pieces are written without a task; fails: and where that does not work."""
    written = []
    write = BodyWriter.write

    def counted(self, body: bytes) -> None:
        if fails:
            raise RuntimeError
        written.append(body)
        write(self, body)

    monkeypatch.setattr(BodyWriter, "write", counted)
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn", version)
    monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn_str", f"HTTP/1.{version % 10}")
    host = {"host": "localhost"} if version == 10 else {}  # http.client sends one with HTTP/1.1 only
    said = {"prompt": "hello"} if path == "completions" else {"messages": [{"role": "user", "content": "hello"}]}
    body = {"model": "one", "max_tokens": 60, "ignore_eos": True, "temperature": 0, "return_token_ids": True} | said
    with running() as server:
        answers = []
        for streamed in (False, True):
            asked = body | {"stream": streamed}
            with contextlib.closing(server.post(asked, f"/v1/{path}", **host)) as connection:
                answers.append(connection.getresponse().read())
    whole = json.loads(answers[0])["choices"][0]
    events = [json.loads(line[6:]) for line in answers[1].split(b"\n\n") if line.startswith(b"data: {")]
    assert answers[1].endswith(b"data: [DONE]\n\n") and bool(written) is not fails
    choices = [choice for e in events for choice in e["choices"]]
    tokens = [token for choice in choices for token in choice.get("token_ids", ())]
    texts = [c["text"] if path == "completions" else c["delta"].get("content", "") for c in choices]
    assert tokens == whole["token_ids"] and len(tokens) == 60
    assert "".join(texts) == (whole["text"] if path == "completions" else whole["message"]["content"])
