"""``slora-jax generate``."""

import argparse
from collections.abc import Iterator
import json
from pathlib import Path
import sys

from slora_jax.cli.options import engine_options, sampling_from_args
from slora_jax.cli.rows import Row, answer_row, parse_row
from slora_jax.engine import Engine
from slora_jax.engine_config import EngineConfig
from slora_jax.errors import SloraError
from slora_jax.requests import Delta, Request, RequestOutput
from slora_jax.sampling_params import SamplingParams


def run(args: argparse.Namespace) -> int:
    """Exit status 1 if a request could not be served."""
    _check(args)
    sampling = sampling_from_args(args)
    params = SamplingParams(**sampling)  # so that a bad flag is told before anything is loaded
    if args.jsonl is not None:
        rows = [parse_row(line, sampling) for line in _lines(args.jsonl) if line.strip()]
    else:
        prompts = args.prompts or [_stdin_prompt()]
    adapters = dict(args.adapter)
    with Engine.from_pretrained(args.model, EngineConfig(**engine_options(args)), adapters) as engine:
        if args.jsonl is not None:
            return _answer_rows(engine, rows)
        users = [None if name == "base" else name for name in args.use or adapters or ["base"]]
        requests = [_request(engine, prompt, user, params, args) for prompt in prompts for user in users]
        if args.json:
            return _answer_rows(engine, [Row(request) for request in requests])
        if len(requests) == 1 and params.n == 1:
            return _stream(engine, requests[0])
        headings = [f"[{user or 'base'}] {_shorten(prompt)}" for prompt in prompts for user in users]
        return _answer_texts(engine, requests, headings)


def _check(args: argparse.Namespace) -> None:
    if args.jsonl is not None and (args.prompts or args.use or args.raw or args.system):
        raise SloraError("--jsonl goes with neither prompts nor --use, --raw or --system: its rows say all that")
    if args.raw and args.system:
        raise SloraError("--system needs the chat template; leave --raw out")
    names = [name for name, _ in args.adapter]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SloraError(f"--adapter gives {twice!r} twice; give each adapter a name of its own")
    missing = next((name for name in args.use or () if name not in (*names, "base")), None)
    if missing:
        raise SloraError(f"--use {missing}: no adapter has that name; add it with --adapter {missing}=PATH")


def _lines(path: str) -> Iterator[str]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SloraError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    yield from text.split("\n")  # not splitlines: JSON strings may hold other line separators


def _stdin_prompt() -> str:
    if sys.stdin.isatty():
        print("type a prompt, then Ctrl-D:", file=sys.stderr)
    text = sys.stdin.read().strip("\n")
    if not text:
        raise SloraError("there is no prompt: give one as an argument or on standard input, or a file with --jsonl")
    return text


def _request(
    engine: Engine, prompt: str, adapter: str | None, params: SamplingParams, args: argparse.Namespace
) -> Request:
    tokenizer = engine.model.tokenizer
    if args.raw or tokenizer is None or not tokenizer.has_chat_template:
        if args.system:
            raise SloraError(f"{engine.model.name} has no chat template, which --system needs")
        return Request(prompt, adapter, params)
    system = [{"role": "system", "content": args.system}] if args.system else []
    return Request(messages=[*system, {"role": "user", "content": prompt}], adapter=adapter, sampling=params)


def _start(engine: Engine, request: Request | None, error: str | None) -> Iterator[Delta] | str:
    """A running request, or why there is none."""
    if request is None:
        return error or ""
    try:
        return engine.stream(request)
    except SloraError as refused:
        return str(refused)


def _finish(deltas: Iterator[Delta]) -> RequestOutput:
    for delta in deltas:
        if delta.output:
            return delta.output
    raise AssertionError("a stream always ends with an output")


def _answer_rows(engine: Engine, rows: list[Row]) -> int:
    """All rows are started at once and answered in order, a bad row by its error."""
    failed = 0
    started = [_start(engine, row.request, row.error) for row in rows]
    for row, deltas in zip(rows, started, strict=True):
        if isinstance(deltas, str):
            answer = {**({} if row.id is None else {"id": row.id}), "error": deltas}
        else:
            answer = answer_row(_finish(deltas), row.id)
        failed += "error" in answer
        print(json.dumps(answer, ensure_ascii=False), flush=True)
    if failed:
        print(f"slora-jax generate: {failed} of {len(rows)} rows failed; their answers say why", file=sys.stderr)
    return 1 if failed else 0


def _answer_texts(engine: Engine, requests: list[Request], headings: list[str]) -> int:
    failed = False
    started = [_start(engine, request, None) for request in requests]
    for heading, deltas in zip(headings, started, strict=True):
        if isinstance(deltas, str):
            print(f"{heading}\nerror: {deltas}\n", flush=True)
            failed = True
            continue
        completions = _finish(deltas).completions
        for completion in completions:
            number = f" ({completion.index + 1} of {len(completions)})" if len(completions) > 1 else ""
            error = f"error: {completion.error}" if completion.error else ""
            print(f"{heading}{number}\n{completion.text}{error}\n", flush=True)
            failed |= completion.error is not None
    return 1 if failed else 0


def _stream(engine: Engine, request: Request) -> int:
    for delta in engine.stream(request):
        print(delta.text, end="", flush=True)
        if delta.output:
            print()
            error = delta.output.completions[0].error
            if error:
                raise SloraError(error)
    return 0


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:69] + "…"
