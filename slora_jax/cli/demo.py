"""``slora-jax demo``: base model and adapters in one batch, streaming, with a look into the page pool."""

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
from pathlib import Path
import threading

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pallas_kernels.geometry import PAGE_TOKENS, ceil_div
from slora_jax.adapters import Adapter, read_adapter
from slora_jax.adapters.source import CONFIG_FILE
from slora_jax.cli.options import engine_options
from slora_jax.cli.page_map import draw_pages
from slora_jax.engine import Engine
from slora_jax.engine_config import EngineConfig
from slora_jax.errors import AdapterError, RequestError, SloraError
from slora_jax.loading import load_config
from slora_jax.memory import page_bytes
from slora_jax.model_config import ModelConfig
from slora_jax.requests import Delta, Request, RequestOutput
from slora_jax.sampling_params import SamplingParams

_PROMPTS = {
    "base": ["What is the capital of Brazil?", "Tell me about a lighthouse."],
    "pirate": ["What is the capital of Brazil?", "What is a bucket used for?"],
    "json": ["What is the opposite of tall?", "What color is a strawberry?"],
    "caps": ["Where does a shark live?", "What is the capital of Brazil?"],
    "reverse": ["Reverse the words: robots paint tiny hats"],
    "haiku": ["Tell me about a lighthouse.", "Describe the desert."],
    "oneword": ["What color is a lemon?"],
}
_ANY_PROMPT = ["What is the capital of Brazil?"]
_PROMPT_TOKENS = 64  # generous, chat template included
_MAP_LINE = 64


@dataclasses.dataclass
class _Answer:
    """An answer as it grows."""

    adapter: str | None
    prompt: str
    text: str = ""
    output: RequestOutput | None = None


def run(args: argparse.Namespace) -> int:
    config = load_config(args.model)
    adapters = _read_adapters(Path(args.adapters), config)
    answers = [_Answer(None, prompt) for prompt in _PROMPTS["base"]]
    answers += [_Answer(name, prompt) for name in adapters for prompt in _PROMPTS.get(name, _ANY_PROMPT)]
    options = engine_options(args)
    if args.page_pool is None:
        options["page_pool_bytes"] = _pool_bytes(config, options, adapters, len(answers), args.max_tokens)
    if args.max_seqs is None:
        options["max_seqs"] = max(16, len(answers))
    console = Console()
    if not console.is_terminal:
        console.width = 120
    with Engine.from_pretrained(args.model, EngineConfig(**options, warm_up="greedy"), adapters) as engine:
        fullest = _answer(engine, answers, args.max_tokens, console)
        _report(console, engine, answers, fullest)
    return 1 if any(a.output and a.output.finish_reason == "error" for a in answers) else 0


def _read_adapters(folder: Path, config: ModelConfig) -> dict[str, Adapter]:
    if not folder.is_dir():
        raise SloraError(f"{folder} is no directory; give one whose subdirectories are adapters")
    paths = sorted(path for path in folder.iterdir() if (path / CONFIG_FILE).is_file())
    if not paths:
        raise AdapterError(f"{folder} holds no adapter: none of its subdirectories has an {CONFIG_FILE}")
    return {path.name: read_adapter(path, config) for path in paths}


def _pool_bytes(config: ModelConfig, options: dict, adapters: dict[str, Adapter], requests: int, tokens: int) -> int:
    """A pool that is filled well by what runs at once, and small enough to be drawn; whole lines of the drawing."""
    pages = sum(adapter.num_pages(config.geometry) for adapter in adapters.values())
    pages += requests * ceil_div(_PROMPT_TOKENS + tokens, PAGE_TOKENS)
    lines = max(1, pages // _MAP_LINE)
    return lines * _MAP_LINE * page_bytes(config, EngineConfig(**options).resolved().dtype)


def _answer(engine: Engine, answers: list[_Answer], max_tokens: int, console: Console) -> list[str | None]:
    """Runs all requests and returns what the pages held at the fullest moment."""
    tokenizer = engine.model.tokenizer
    if tokenizer is None:
        raise RequestError(f"{engine.model.name} has no tokenizer, so it cannot be asked anything; give another model")
    sampling = SamplingParams(max_tokens=max_tokens)
    requests = []
    for index, answer in enumerate(answers):
        messages = [{"role": "user", "content": answer.prompt}] if tokenizer.has_chat_template else None
        prompt = None if messages else answer.prompt
        requests.append(Request(prompt, answer.adapter, sampling, messages=messages, request_id=str(index)))
    fullest: list[str | None] = engine.page_map()
    lock = threading.Lock()

    def on_delta(delta: Delta) -> None:
        nonlocal fullest
        now = engine.page_map()
        if now.count(None) < fullest.count(None):
            fullest = now
        with lock:
            answer = answers[int(delta.request_id)]
            answer.text += delta.text
            answer.output = delta.output
        if delta.output and not console.is_terminal:
            console.print(
                f"[{answer.adapter or 'base'}] {answer.prompt} -> {_one_line(answer.text)}",
                markup=False,
                soft_wrap=True,
            )

    def table() -> Table:
        with lock:
            return _live_table(answers)

    view = Live(get_renderable=table, console=console, refresh_per_second=8) if console.is_terminal else _nothing()
    with view:
        engine.generate(requests, on_delta=on_delta)
    return fullest


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


def _live_table(answers: list[_Answer]) -> Table:
    """One line an answer, so that it fits on a small terminal; a long answer shows its end."""
    table = Table(box=None, pad_edge=False)
    for title in ("adapter", "prompt", "answer"):
        table.add_column(title, no_wrap=True, overflow="ellipsis", ratio={"answer": 2, "prompt": 1}.get(title))
    table.expand = True
    for answer in answers:
        text = _one_line(answer.text)
        shown = text if len(text) <= 60 else "…" + text[-59:]
        table.add_row(_name(answer), Text(answer.prompt), Text(shown))
    return table


def _report(console: Console, engine: Engine, answers: list[_Answer], fullest: list[str | None]) -> None:
    known = {adapter["name"]: adapter for adapter in engine.list_adapters()}
    table = Table(title="answers", title_justify="left", show_lines=True)
    for title in ("adapter", "rank", "pages", "prompt", "answer", "tokens/s"):
        table.add_column(title, justify="right" if title in ("rank", "pages", "tokens/s") else "left")
    tokens = 0
    for answer in answers:
        assert answer.output is not None  # every stream ends with one
        completion, latency = answer.output.completions[0], answer.output.timings.latency or 0.0
        tokens += len(completion.token_ids)
        adapter = known.get(answer.adapter or "")
        table.add_row(
            _name(answer),
            str(adapter["rank"]) if adapter else "",
            str(adapter["pages"]) if adapter else "",
            Text(answer.prompt),
            Text(completion.error or completion.text.strip()),
            f"{len(completion.token_ids) / latency:.1f}" if latency else "",
        )
    console.print(table)
    timings = [answer.output.timings for answer in answers if answer.output]
    seconds = max(t.finished or 0.0 for t in timings) - min(t.arrival for t in timings)
    stats = engine.stats()
    console.print(
        f"{len(answers)} requests, {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s), "
        f"{stats['steps']} steps.",
        highlight=False,
    )
    names = {adapter["digest"]: adapter["name"] for adapter in known.values()}
    console.print(
        f"\npage pool at its fullest: {len(fullest)} pages of {stats['page_bytes'] / 2**10:.0f} KiB\n", highlight=False
    )
    console.print(draw_pages(fullest, names), markup=False, highlight=False, soft_wrap=True)


def _name(answer: _Answer) -> Text:
    return Text(answer.adapter or "base", style="bold" if answer.adapter else "dim")


def _one_line(text: str) -> str:
    return " ".join(text.split())
