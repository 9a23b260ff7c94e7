"""``slora-jax generate`` and ``demo`` on a tiny model with a tokenizer and PEFT adapters."""

import io
import json
from pathlib import Path
import shutil

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slora_jax.cli import main
from slora_jax.progress import progress_bar

PEFT = Path(__file__).parent.parent / "data" / "peft" / "llama"
WORDS = [f"w{i}" for i in range(64)]
OPTIONS = ["--quiet", "--max-seqs", "4", "--page-pool", "2M"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}w9"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """tests/data/peft/llama with a tokenizer of 64 words."""
    path = tmp_path_factory.mktemp("model")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(PEFT / file, path / file)
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*argv, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = main([str(arg) for arg in argv])
        return status, *capsys.readouterr()

    return run


def test_json_lines(run, model):
    lines = [
        {"id": "first", "prompt": "w5 w6 w7", "max_tokens": 4},
        {"prompt": "w5 w6 w7", "adapter": "list"},
        {"id": 3, "prompt": "w5", "adapter": "lits"},
        {"messages": [{"role": "user", "content": "w5 w6"}], "n": 2, "temperature": 1.0, "seed": 1, "logprobs": 1},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 4},
        {"prompt": "w1 " * 70},
        {"prompt": ""},
        {"prompt": "w5", "max_tokens": -1},
        {"prompt": "w5", "prompt_token_ids": [5]},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnot json\n"
    status, out, err = run(
        "generate", model, "--jsonl", "-", "--adapter", f"list={PEFT / 'list'}", "--max-tokens", 3, *OPTIONS, stdin=text
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert err == "slora-jax generate: 6 of 10 rows failed; their answers say why\n"
    assert len(answers) == 10
    assert (answers[0]["id"], answers[0]["adapter"], len(answers[0]["token_ids"])) == ("first", None, 4)
    assert answers[0]["text"] == " ".join(f"w{token}" for token in answers[0]["token_ids"])
    assert (answers[1]["adapter"], len(answers[1]["token_ids"])) == ("list", 3)
    assert answers[2] == {"id": 3, "error": "adapter 'lits' is unknown: did you mean 'list'?"}
    assert len(answers[3]["completions"]) == 2
    assert len(answers[3]["logprobs"]) == len(answers[3]["token_ids"])
    assert answers[3]["prompt_tokens"] == 3
    assert answers[4]["token_ids"] == answers[0]["token_ids"]
    assert "the prompt has 210 characters" in answers[5]["error"]
    assert "the prompt is empty" in answers[6]["error"]
    assert "max_tokens must be at least 1" in answers[7]["error"]
    assert "exactly one of prompt" in answers[8]["error"]
    assert "not JSON" in answers[9]["error"]


def test_prompts_from_arguments_and_standard_input(run, model):
    short = ["--max-tokens", 4, *OPTIONS]
    adapter = ["--adapter", f"list={PEFT / 'list'}"]
    status, out, _ = run("generate", model, "w5 w6", "w7", *adapter, "--use", "base", "--use", "list", *short)
    assert status == 0
    blocks = out.split("\n\n")
    assert [block.split("\n")[0] for block in blocks[:4]] == ["[base] w5 w6", "[list] w5 w6", "[base] w7", "[list] w7"]

    status, streamed, _ = run("generate", model, *short, stdin="w5 w6\n")  # one prompt: its text alone, as it comes
    assert (status, streamed) == (0, blocks[0].split("\n")[1] + "\n")

    status, out, _ = run("generate", model, "w5 w6 w9", "--raw", "--json", *short)  # what the chat template makes of it
    assert json.loads(out)["text"] == streamed.strip()

    status, out, err = run("generate", model, "w1 " * 70, "w7", *short)
    assert status == 1
    assert "error: the prompt has 213 characters" in out
    assert blocks[2].split("\n")[1] in out


def test_demo(run, model, tmp_path):
    for name in ("list", "only_q", "regex"):
        shutil.copytree(PEFT / name, tmp_path / name)
    status, out, err = run("demo", "--model", model, "--adapters", tmp_path, "--max-tokens", 4, "--max-seqs", 4)
    assert status == 0
    assert "loading: done" in err
    assert "compiling: done" in err
    assert "5 requests" in out
    legend = out.strip().split("\n")[-1]
    assert [part.split()[:-1] for part in legend.split("   ")] == [
        ["#", "KV", "cache"],
        ["l", "list"],
        ["o", "only_q"],
        ["r", "regex"],
        [".", "free"],
    ]
    assert "#" in out.split("page pool at its fullest")[1].split("\n")[2]


def test_progress_on_a_pipe_is_a_few_lines(capsys):
    with progress_bar("working", True) as report:
        for done in range(1000):
            report(done, 1000, "thing")
    with progress_bar("silent", False) as report:
        report(1, 2, "thing")
    assert capsys.readouterr().err.splitlines()[1:] == []


def test_progress_on_a_terminal_is_a_bar_drawn_now_and_then(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar("working", True) as report:
        for done in range(100_000):
            report(done, 100_000, "thing")
        report(100_000, 100_000, "done")
    text = terminal.getvalue()
    assert text.count("\r") < 100
    assert "working: 100%" in text
    assert text.endswith("\n")
