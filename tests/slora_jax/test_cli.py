"""The command line without running a model: arguments, help, errors, JSON lines, inspect and convert."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

from slora_jax import Completion, RequestOutput, Timings, TokenLogprob, __version__
from slora_jax.cli import main
from slora_jax.cli.options import byte_size
from slora_jax.cli.page_map import choose_letters, draw_pages
from slora_jax.cli.rows import answer_row, parse_row
from slora_jax.sampling_params import SamplingParams

PEFT = Path(__file__).parent.parent / "data" / "peft"


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        status = main([str(arg) for arg in argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("command", ["", "demo", "generate", "convert", "inspect", "simulate"])
def test_help(capsys, command):
    status, out, err = run(capsys, *([command] if command else []), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: slora-jax {command}".strip())


def test_help_and_version_import_no_jax():
    code = "import sys; from slora_jax.cli import main\ntry: main(['--version'])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == [f"slora-jax {__version__}", "False"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["generate"], "required: MODEL"),
        (["generate", "m", "hi", "--max-tokens", "few"], "--max-tokens: invalid int value: 'few'"),
        (["generate", "m", "hi", "--max-tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["generate", "m", "hi", "--top-p", "2"], "top_p must be above 0 and at most 1, not 2.0"),
        (["generate", "m", "hi", "--adapter", "x"], "'x' is not NAME=PATH"),
        (["generate", "m", "hi", "--adapter", "base=x"], "base stands for the base model"),
        (["generate", "m", "hi", "--adapter", "a=x", "--adapter", "a=y"], "--adapter gives 'a' twice"),
        (["generate", "m", "hi", "--use", "a"], "--use a: no adapter has that name"),
        (["generate", "m", "hi", "--logit-bias", "5"], "'5' is not ID=BIAS"),
        (["generate", "m", "hi", "--page-pool", "much"], "'much' is not a size"),
        (["generate", "m", "hi", "--raw", "--system", "x"], "leave --raw out"),
        (["generate", "m", "hi", "--jsonl", "x"], "--jsonl goes with neither prompts"),
        (["generate", "m", "--jsonl", "/no/such/file"], "/no/such/file cannot be read: No such file"),
        (["generate", "/no/such/model", "hi", "--quiet"], "no model at /no/such/model"),
        (["generate", "random:tiny-gqa", "hi", "--adapter", "a=/no/dir"], "adapter 'a': /no/dir: no such directory"),
        (["generate", "random:tiny-gqa", "hi", "--max-seqs", "0"], "max_seqs must be at least 1"),
        (["serve", "random:tiny-gqa", "--lora-targets", "q,x"], "lora_targets names 'x'; modules are q, k, v, o, gate"),
        (["demo", "--model", "random:tiny-gqa", "--adapters", "/no/dir"], "/no/dir is no directory"),
        (["demo", "--model", "random:tiny-gqa", "--adapters", "."], "holds no adapter"),
        (["convert", "random:none", "never-written"], "no model shape is called 'none'"),
        (["simulate", "--shape", "none"], "no model shape is called 'none'"),
        (["simulate", "--policy", "best"], "policy must be one of 'fcfs', 'cluster'"),
        (["simulate", "--policy", "fair", "--policy-option", "x=1"], "policy 'fair' has no option 'x'"),
        (["simulate", "--policy-option", "x"], "'x' is not NAME=VALUE"),
        (["simulate", "--trace", "/no/such/file"], "/no/such/file cannot be read"),
        (["simulate", "--rate", "0"], "rate, seconds and requests of a trace must be positive"),
        (["simulate", "--rank", "0"], "ranks must be at least 1, not 0"),
        (["simulate", "--seconds", "0.01"], "less than one request"),
        (["simulate", "--max-seqs", "0"], "max_seqs must be at least 1, not 0"),
        (["simulate", "--max-seqs", "4096"], "max_step_tokens 2048 is less than max_seqs 4096"),
        (["simulate", "--slo", "0"], "slo must be positive"),
        (["simulate", "--cost", "/no/such/file"], "cost model /no/such/file cannot be read"),
        (["simulate", "--page-pool", "1M"], "less than one page of this model"),
        (["simulate", "--page-pool", "64M"], "of the trace can never run"),
        (["convert", "random:tiny-gqa", "."], "add --overwrite"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(capsys, argv, message):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert message in err
    assert err.startswith("slora-jax")


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    from slora_jax.cli import inspect

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert run(capsys, "inspect", "x") == (130, "", "slora-jax inspect: interrupted\n")


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("4k", 4096), ("1.5G", 3 << 29), ("2GiB", 2 << 30)])
def test_sizes(text, size):
    assert byte_size(text) == size


def test_row_of_json():
    line = json.dumps(
        {
            "id": 7,
            "prompt": "x",
            "adapter": "a",
            "temperature": 1,
            "stop": "end",
            "logit_bias": {"5": -1},
            "top_k": None,
        }
    )
    row = parse_row(line, {"max_tokens": 9, "temperature": 0.5})
    assert (row.error, row.id) == (None, 7)
    assert (row.request.prompt, row.request.adapter) == ("x", "a")
    assert row.request.sampling == SamplingParams(max_tokens=9, temperature=1, stop=("end",), logit_bias={5: -1.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"prompts": "x"}', "unknown field 'prompts'"),
        ('{"prompt": "x", "max_tokens": "9"}', "max_tokens must be an integer, not '9'"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens must be an integer, not True"),
        ('{"prompt": "x", "top_p": 3}', "top_p must be above 0"),
        ('{"prompt": "x", "stop_token_ids": 3}', "stop_token_ids must be a list"),
        ('{"prompt": "x", "stop": ["a", 1]}', "stop must be a string, not 1"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}', "logit_bias must map token ids"),
        ('{"prompt": "x", "adapter": 3}', "adapter must be a name"),
        ('{"prompt_token_ids": "12"}', "prompt_token_ids must be a list of integers"),
    ],
)
def test_bad_rows_of_json(line, message):
    row = parse_row(line, {})
    assert row.request is None
    assert message in row.error


def test_answer_as_json():
    logprob = TokenLogprob(4, -0.5, {4: -0.5, 2: -1.0})
    completions = [
        Completion(0, "hi", [4], [logprob], "stop", "end"),
        Completion(1, "", [], [], "error", None, "the step failed"),
    ]
    timings = Timings(1.0, 1.0, 1.25, 1.5)
    output = RequestOutput(
        request_id="r",
        prompt="x",
        prompt_token_ids=[1, 2],
        adapter="a",
        adapter_digest="d",
        completions=completions,
        prompt_logprobs=[None, logprob],
        timings=timings,
    )
    row = answer_row(output, "mine")
    shown = {"token_id": 4, "logprob": -0.5, "top": {4: -0.5, 2: -1.0}}
    assert row["id"] == "mine"
    assert row["adapter"] == "a"
    assert (row["text"], row["stop_reason"], row["logprobs"]) == ("hi", "end", [shown])
    assert row["prompt_logprobs"] == [None, shown]
    assert row["completions"][1]["error"] == "the step failed"
    assert (row["prompt_tokens"], row["ttft_seconds"], row["latency_seconds"]) == (2, 0.25, 0.5)
    json.dumps(row)


def test_letters_of_the_page_map():
    assert choose_letters(["json", "jazz", "JJ", "7b"]) == {"json": "j", "jazz": "a", "JJ": "J", "7b": "7"}
    many = choose_letters([f"{i:03}" for i in range(80)])
    assert len(set(many.values())) == 63
    assert many["079"] == "*"


def test_page_map():
    text = draw_pages(["kv", "d1", None, "d2", *["kv"] * 62], {"d1": "json", "d2": "haiku"})
    first, second, blank, legend = text.split("\n")
    assert first == "    0 #j.h" + "#" * 60
    assert second == "   64 ##"
    assert blank == ""
    assert legend == "# KV cache 63   j json 1   h haiku 1   . free 1"


def test_inspect_a_model(capsys):
    status, out, err = run(capsys, "inspect", "random:llama-3.1-8b")
    assert (status, err) == (0, "")
    assert "32 heads and 8 KV heads of 128" in out
    assert "llama3 scaling 8" in out
    assert "14.96 GiB of weights; a page of 16 tokens takes 2 MiB" in out
    assert "rank 8, 16, 64 on all seven projections: 20, 40, 160 pages" in out  # 40: as worked out in DESIGN.md
    assert out.split("\n")[-2].startswith("accepted      yes")


def test_inspect_an_adapter(capsys):
    adapter = PEFT / "llama" / "list"
    status, out, _ = run(capsys, "inspect", adapter, "--base", PEFT / "llama")
    assert status == 0
    assert "ranks         8 on q k v o gate up down, in 3 of 3 layers" in out
    assert "scaling       2\n" in out
    assert f"accepted      yes, for {PEFT / 'llama'}" in out
    status, out, _ = run(capsys, "inspect", adapter)
    assert status == 0
    assert "add --base MODEL" in out
    status, out, _ = run(capsys, "inspect", adapter, "--base", "random:tiny-gqa")
    assert status == 1
    assert "accepted      no: " in out


def test_inspect_what_is_refused(capsys, tmp_path):
    assert run(capsys, "inspect", tmp_path)[:2] == (
        1,
        f"accepted      no: {tmp_path} holds no model: looked for config.json (Hugging Face), *.gguf and "
        "slora_model.json (slora-jax convert)\n",
    )
    fields = json.loads((PEFT / "llama" / "list" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "use_dora": True}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    status, out, _ = run(capsys, "inspect", tmp_path)
    assert status == 1
    assert "use_dora" in out


def test_convert_and_inspect_the_result(capsys, tmp_path):
    out_dir = tmp_path / "converted"
    status, out, err = run(capsys, "convert", "random:tiny-gqa", out_dir, "--quiet")
    assert (status, err) == (0, "")
    assert out == f"wrote tiny-gqa, 0.00 GiB in bfloat16, which has no tokenizer, to {out_dir}\n"
    assert "converted by slora-jax" in run(capsys, "inspect", out_dir)[1]
    assert run(capsys, "convert", "random:tiny-gqa", out_dir, "--quiet")[0] == 2
    assert run(capsys, "convert", "random:tiny-gqa", out_dir, "--quiet", "--overwrite")[0] == 0
