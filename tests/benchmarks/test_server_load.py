"""benchmarks/server_load on a tiny model: server, load generator and bare engine, each a process."""

import json
import os
import re

import pytest

from benchmarks.server_load import __main__ as server_load
from benchmarks.server_load.workload import engine_config, serve_flags
from slora_jax.cli.parser import parse_arguments

OPTIONS = """
    --model random:tiny-gqa --adapters 9 --rank 8,4 --share-weights --streams 12 --requests 30 --distinct 0
    --prompt 4,9 --answer 2,9 --max-seqs 4 --max-model-len 64 --page-pool 8000000
"""


@pytest.mark.parametrize("device", ["real", "simulated"])
def test_every_call_is_answered(tmp_path, capfd, device):
    out = tmp_path / "out.json"
    simulated = ["--simulated-step-ms", "2"] if device == "simulated" else []
    result = server_load.main([*OPTIONS.split(), *simulated, "--json", str(out)])
    assert result["server"]["outcome"] == {"complete": 30} and result["device"].startswith(device)
    assert result["server"]["tokens_per_event"] >= 1 and result["server"]["event_loop_microseconds_per_token"] >= 0
    assert result["server"]["health_seconds"]["asked"] > 0
    assert result["server"]["seconds_until_ready"] > 0
    lines = [line for line in capfd.readouterr().err.split("\n") if re.match(r"\d\d:\d\d:\d\d ", line)]
    lines = [line for line in lines if "requests are answered" not in line]  # only where it takes long
    told = ("are written", "the server was ready", "measuring", "the server answered")
    told += ("the bare engine was ready", "measuring", "the bare engine answered")
    assert len(lines) == len(told) and all(text in line for text, line in zip(told, lines, strict=True))
    assert json.loads(out.read_text())["share_of_bare_engine"] == result["share_of_bare_engine"] > 0


def test_server_and_bare_engine_have_the_same_steps():
    args = server_load._parser().parse_args([*OPTIONS.split(), "--targets", "q,k,o"])
    serve = parse_arguments(["serve", args.model, *serve_flags(args)])
    settings = engine_config(args)
    assert settings.lora_targets == tuple(serve.lora_targets) == ("q", "k", "o")
    assert settings.max_lora_rank == serve.max_lora_rank == 8


def test_the_server_has_processors_of_its_own():
    before = os.sched_getaffinity(0)
    first = min(before)
    try:
        with server_load.on_cpus([first]):
            assert os.sched_getaffinity(0) == {first}
        assert os.sched_getaffinity(0) == (before - {first} or before)
    finally:
        os.sched_setaffinity(0, before)
    with pytest.raises(SystemExit, match="there are only 0 to"), server_load.on_cpus([first, 100_000]):
        pass
    with server_load.on_cpus([]):
        assert os.sched_getaffinity(0) == before
